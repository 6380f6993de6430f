"""``amskv encode``: text features of prompts, so that drawing needs no text encoder."""

from pathlib import Path
from typing import Annotated

import typer

from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.files import check_outputs, check_suffix
from amskv_jax.cli.options import CheckpointOption, Dtype, ForceOption
from amskv_jax.cli.wanted import NegativePromptOption


def encode(
    *,
    checkpoint: CheckpointOption,
    prompts: Annotated[Path, typer.Option(help="File of prompts, one in a line.")],
    out: Annotated[Path, typer.Option(help="Write the features here (.npz).")],
    negative_prompt: NegativePromptOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts encoded at once.")] = 8,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the encoder's products; as stored if not given.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Encode prompts with the text encoder of a checkpoint, for `--text-features`."""
    check_suffix(out, {".npz"})
    check_outputs(out, force=force)

    from amskv_jax.text import read_prompts, write_features  # noqa: PLC0415
    from amskv_jax.text.reader import load_text_encoder  # noqa: PLC0415

    texts = read_prompts(prompts)
    with progress("loading the text encoder") as update:
        encoder = load_text_encoder(checkpoint, dtype.value if dtype else None, batch_size)
        update("encoding", None)
        features = encoder(texts, negative_prompt or None)
    write_features(out, features)
    print_line(f"wrote {out}: {len(texts)} prompts, {features.lengths.sum()} tokens")
