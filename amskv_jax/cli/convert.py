"""``amskv convert``: from PyTorch checkpoints, one command for every kind and published model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from amskv_jax.checkpoints.published import PUBLISHED
from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.options import Dtype, OutFolderOption, parse_numbers
from amskv_jax.errors import UsageError
from amskv_jax.files import check_new_directory

app = typer.Typer(
    help="Convert weights of a PyTorch reference to a checkpoint.", no_args_is_help=True
)

TransformerOption = Annotated[
    Path,
    typer.Option(
        "--transformer",
        "--from",
        help="The transformer: .pth, .safetensors, a folder of the HF hub, or an address there, "
        'hf://user/repository[@revision]/path[#sha256=checksum] (needs the extra "hub").',
    ),
]
TokenizerOption = Annotated[
    Path,
    typer.Option(
        "--tokenizer", help="The VAE: the same kinds; may be the same training checkpoint."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="How the weights are stored.")]
KeepOption = Annotated[
    bool,
    typer.Option("--keep-not-finite", help="Take weights that hold NaN or infinity."),
]


@app.callback()
def convert() -> None:
    """Convert weights of a PyTorch reference to a checkpoint."""


@app.command()
def var(
    transformer: TransformerOption,
    tokenizer: TokenizerOption,
    out: OutFolderOption,
    dtype: DtypeOption = Dtype.FLOAT32,
    patch_nums: Annotated[
        str | None,
        typer.Option(
            help="Sides of the token maps, where the files do not tell them.", metavar="1,2,..."
        ),
    ] = None,
    keep_not_finite: KeepOption = False,
) -> None:
    """Convert a VAR transformer and its VQVAE (var_d16.pth ... var_d36.pth, vae_ch160v4096z32.pth).

    Depth, width, scales and classes follow from the files. Reading .pth needs PyTorch (the extra
    "convert"); .safetensors does not.
    """
    settings = {"patch_nums": parse_numbers(patch_nums, "--patch-nums")} if patch_nums else {}
    sources = {"transformer": transformer, "tokenizer": tokenizer}
    _convert("var", sources, out, dtype, settings, keep_not_finite)


@app.command()
def infinity(
    transformer: TransformerOption,
    tokenizer: TokenizerOption,
    out: OutFolderOption,
    text_encoder: Annotated[
        Path | None,
        typer.Option(
            help="The text encoder, such as flan-t5-xl: its folder of the HF hub, with "
            "tokenizer.json. Without it the checkpoint draws from files of text features."
        ),
    ] = None,
    dtype: DtypeOption = Dtype.FLOAT32,
    keep_not_finite: KeepOption = False,
) -> None:
    """Convert Infinity (infinity_2b_reg.pth, infinity_vae_d32reg.pth, flan-t5-xl, or 8B in shards).

    All sizes follow from the files. Besides the largest parameter little is held in memory.
    """
    sources = {"transformer": transformer, "tokenizer": tokenizer}
    if text_encoder is not None:
        sources["text_encoder"] = text_encoder
    _convert("infinity", sources, out, dtype, {}, keep_not_finite)


def _convert(
    kind: str,
    sources: Mapping[str, Path],
    out: Path,
    dtype: Dtype,
    settings: Mapping[str, Any],
    keep_not_finite: bool,
) -> None:
    """Convert the parts of a model; a part which a checkpoint can lack may not be among them."""
    from amskv_jax.convert import convert, fetch_sources  # noqa: PLC0415

    check_new_directory(out)  # before anything is downloaded
    fetched = fetch_sources(kind, sources, report=print_line)
    with progress("reading") as update:
        convert(
            kind,
            fetched,
            out,
            dtype=dtype.value,
            settings=settings,
            keep_not_finite=keep_not_finite,
            progress=update,
        )
    print_line(f"wrote {out}")


def _preset(name: str) -> Callable[..., None]:
    """Return the command that converts a published model."""

    def preset(
        out: OutFolderOption,
        dtype: DtypeOption = Dtype.FLOAT32,
        parts: Annotated[
            str | None,
            typer.Option(
                help="The parts to convert; all of them if not given.",
                metavar=",".join(PUBLISHED[name].parts),
            ),
        ] = None,
        keep_not_finite: KeepOption = False,
    ) -> None:
        published = PUBLISHED[name]
        wanted = [part.strip() for part in parts.split(",")] if parts else list(published.parts)
        unknown = sorted(set(wanted) - published.parts.keys())
        if unknown:
            raise UsageError(
                f"{name} has no part {unknown[0]!r}: expected {', '.join(published.parts)}"
            )
        sources = {part: Path(published.parts[part]) for part in wanted}
        _convert(published.kind, sources, out, dtype, {}, keep_not_finite)

    return preset


for _name, _published in PUBLISHED.items():
    app.command(_name, help=f"Download and convert {_published.description}.")(_preset(_name))
