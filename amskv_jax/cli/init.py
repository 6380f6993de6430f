"""``amskv init``: checkpoints with random weights."""

from typing import Annotated

import typer

from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.options import Dtype, OutFolderOption


def init(
    model: Annotated[str, typer.Option(help="Name of a known model, such as var-tiny or var-d16.")],
    out: OutFolderOption,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="How the weights are stored.")] = Dtype.FLOAT32,
) -> None:
    """Write a checkpoint with random weights, to try things with: its pictures are noise."""
    from amskv_jax import configs  # noqa: PLC0415
    from amskv_jax.checkpoints.initialize import init_checkpoint  # noqa: PLC0415

    known = configs.get(model)
    with progress("drawing weights"):
        init_checkpoint(known.model, out, seed=seed, dtype=dtype.value)
    print_line(f"wrote {out}")
