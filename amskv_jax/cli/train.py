"""``amskv train``: tokenizers, transformers and classifiers from a folder of pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amskv_jax.cli import classifier
from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.cli.console import print_line
from amskv_jax.cli.options import Dtype
from amskv_jax.errors import AmskvError

if TYPE_CHECKING:
    from amskv_jax.training.config import Run
    from amskv_jax.training.data import Pictures

app = typer.Typer(help="Train a model on pictures of your own.", no_args_is_help=True)
app.command()(classifier.classifier)


ConfigOption = Annotated[
    str,
    typer.Option(
        "--config", help="Known model with settings for training, or a Python file of your own."
    ),
]
DataOption = Annotated[
    Path, typer.Option("--data", help="Packed .npz file or folder of class folders.")
]
ValidationOption = Annotated[
    Path | None,
    typer.Option("--validation", help="Held-out pictures, evaluated with every checkpoint."),
]
RunOption = Annotated[Path, typer.Option("--out", help="Folder of the run; one there goes on.")]
CropOption = Annotated[bool, typer.Option("--crop", help="Scale and crop pictures of other sizes.")]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, help="Optimiser steps; as in the config.")
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Pictures per step, on all devices together."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the run.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Of the computation; weights are float32.")
]
StopOption = Annotated[
    float | None,
    typer.Option("--stop-after", min=0, help="Seconds after which the run saves and stops."),
]


@app.command()
def tokenizer(
    data: DataOption,
    out: RunOption,
    config: ConfigOption = "var-cifar10",
    validation: ValidationOption = None,
    crop: CropOption = False,
    steps: StepsOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = None,
    dtype: DtypeOption = None,
    stop_after: StopOption = None,
) -> None:
    """Train a VQVAE, which turns pictures into token maps and back.

    A run that was stopped or killed goes on when the same command is given again. At its end its
    folder holds tokenizer.safetensors, for `amskv train var`, and a plot of the log.
    """
    from amskv_jax.training.recipe import TOKENIZER_FILE, find_recipe, save_tokenizer  # noqa: PLC0415
    from amskv_jax.training.tokenizer import train_tokenizer  # noqa: PLC0415

    use_compilation_cache()
    settings = find_recipe(config).tokenizer
    run = _changed(settings.run, dtype, steps=steps, batch_size=batch_size, seed=seed)
    settings = replace(settings, run=run)
    pictures, held_out = _pictures(data, validation, settings.model.picture_size, crop)
    with _plotting(out):
        params = train_tokenizer(
            settings, pictures, out, validation=held_out, stop_after=stop_after
        )
    save_tokenizer(out / TOKENIZER_FILE, settings.model, params)
    print_line(f"wrote {out / TOKENIZER_FILE}")


@app.command()
def var(
    data: DataOption,
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer's finished run.")],
    out: RunOption,
    config: ConfigOption = "var-cifar10",
    validation: ValidationOption = None,
    crop: CropOption = False,
    steps: StepsOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = None,
    dtype: DtypeOption = None,
    stop_after: StopOption = None,
) -> None:
    """Train a VAR transformer on the tokens of a trained tokenizer.

    The tokens are made first and kept in the run's folder. A run that was stopped or killed goes on
    when the same command is given again. At its end its folder holds a checkpoint for `amskv
    sample`, and a plot of the log.
    """
    from amskv_jax.checkpoints.folder import save_checkpoint  # noqa: PLC0415
    from amskv_jax.models.var.model import VARModel  # noqa: PLC0415
    from amskv_jax.training.recipe import find_recipe, load_tokenizer  # noqa: PLC0415
    from amskv_jax.training.tokens import kept_tokens  # noqa: PLC0415
    from amskv_jax.training.transformer import train_transformer  # noqa: PLC0415

    use_compilation_cache()
    tokenizer_config, tokenizer_params = load_tokenizer(tokenizer)
    settings = find_recipe(config).transformer
    run = _changed(settings.run, dtype, steps=steps, batch_size=batch_size, seed=seed)
    settings = replace(settings, tokenizer=tokenizer_config, run=run)
    pictures, held_out = _pictures(data, validation, tokenizer_config.picture_size, crop)
    pictures.check(tokenizer_config.picture_size, settings.model.num_classes)
    out.mkdir(parents=True, exist_ok=True)
    tokens = kept_tokens(
        out / "tokens.npz",
        tokenizer_config,
        tokenizer_params,
        pictures,
        copies=settings.copies,
        noise=settings.token_noise,
    )
    held_out_tokens = None
    if held_out is not None:
        held_out_tokens = kept_tokens(
            out / "validation.npz", tokenizer_config, tokenizer_params, held_out, copies=1
        )
    with _plotting(out):
        params = train_transformer(
            settings,
            tokens,
            tokenizer_params,
            out,
            validation=held_out_tokens,
            stop_after=stop_after,
        )
    checkpoint = out / "checkpoint"
    if not checkpoint.exists():  # it is there whole or not at all
        save_checkpoint(
            checkpoint,
            VARModel(settings.model, tokenizer_config),
            {"transformer": params, "tokenizer": tokenizer_params},
            pictures.classes,
        )
    print_line(f"wrote {checkpoint}")


def _changed(run: "Run", dtype: Dtype | None, **given: Any) -> "Run":
    """Return the settings of a run with those that were given on the command line."""
    given["dtype"] = dtype and dtype.value
    return replace(run, **{name: value for name, value in given.items() if value is not None})


def _pictures(
    data: Path, validation: Path | None, size: tuple[int, int], crop: bool
) -> "tuple[Pictures, Pictures | None]":
    """Load the pictures to train on and those to evaluate on."""
    from amskv_jax.training.data import load_pictures  # noqa: PLC0415

    pictures = load_pictures(data, size, crop)
    print_line(f"{len(pictures)} pictures of {len(pictures.classes)} classes")
    if validation is None:
        return pictures, None
    held_out = load_pictures(validation, size, crop)
    if held_out.classes != pictures.classes:
        raise AmskvError(
            f"{validation} has the classes {', '.join(held_out.classes)}, {data} has "
            f"{', '.join(pictures.classes)}: expected the same, in the same order"
        )
    return pictures, held_out


@contextmanager
def _plotting(directory: Path) -> Iterator[None]:
    """Plot the log of a run when it ends, even if it was stopped."""
    from amskv_jax.training.log import plot_log  # noqa: PLC0415

    try:
        yield
    finally:
        if (directory / "log.jsonl").exists():
            try:
                plot_log(directory / "log.jsonl", directory / "log.png")
            except AmskvError as error:  # nothing logged yet, or no matplotlib: no reason to fail
                print_line(f"no plot: {error}")
