"""``amskv convert``: from PyTorch checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.options import Dtype, OutFolderOption, parse_numbers

app = typer.Typer(
    help="Convert weights of a PyTorch reference to a checkpoint.", no_args_is_help=True
)


@app.callback()
def convert() -> None:
    """Convert weights of a PyTorch reference to a checkpoint."""


@app.command()
def var(
    transformer: Annotated[
        Path, typer.Option(help="The transformer: .pth, .safetensors, or a folder of the HF hub.")
    ],
    tokenizer: Annotated[
        Path, typer.Option(help="The VQVAE: the same kinds; may be the same training checkpoint.")
    ],
    out: OutFolderOption,
    dtype: Annotated[Dtype, typer.Option(help="How the weights are stored.")] = Dtype.FLOAT32,
    patch_nums: Annotated[
        str | None,
        typer.Option(
            help="Sides of the token maps, where the files do not tell them.", metavar="1,2,..."
        ),
    ] = None,
) -> None:
    """Convert a VAR transformer and its VQVAE (var_d16.pth ... var_d36.pth, vae_ch160v4096z32.pth).

    Depth, width, scales and classes follow from the files. Reading .pth needs PyTorch (the extra
    "convert"); .safetensors does not.
    """
    sides = parse_numbers(patch_nums, "--patch-nums") if patch_nums else None
    from amskv_jax.convert import convert_var  # noqa: PLC0415

    with progress("reading") as update:
        convert_var(
            transformer, tokenizer, out, dtype=dtype.value, patch_nums=sides, progress=update
        )
    print_line(f"wrote {out}")
