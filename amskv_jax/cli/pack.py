"""``amskv pack``: a checkpoint in one small file."""

from pathlib import Path
from typing import Annotated

import typer

from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.files import check_outputs, check_suffix
from amskv_jax.cli.options import CheckpointOption
from amskv_jax.cli.wanted import CfgOption, drawing_of


def pack(
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    cfg: CfgOption = None,
) -> None:
    """Write a checkpoint as one file with 8-bit weights, which is read wherever a folder is.

    Weights are rounded: kernels to 8 bits with a scale per output channel, convolutions to float16.
    """
    check_suffix(out, {".safetensors"})
    check_outputs(out, force=False)

    from amskv_jax.checkpoints.folder import read_info  # noqa: PLC0415
    from amskv_jax.checkpoints.packed import pack_checkpoint  # noqa: PLC0415

    drawing = drawing_of(read_info(checkpoint).drawing, cfg=cfg)
    with progress("packing"):
        pack_checkpoint(checkpoint, out, drawing.cfg)
    print_line(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB")
