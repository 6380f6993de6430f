"""Options which several commands have, and readers of their values."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from amskv_jax.checkpoints.embedded import find_checkpoint, find_stats
from amskv_jax.cli.console import print_error
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.words import read_bytes, read_ranges


class Dtype(StrEnum):
    """Types of numbers in which weights are stored."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class ProductDtype(StrEnum):
    """Types of numbers in which matrix products are computed."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT8 = "float8"
    FLOAT8_FAST = "float8-fast"


class Attention(StrEnum):
    """Attention back ends, see ``attention.attend``."""

    AUTO = "auto"
    MOSAIC = "mosaic"
    CUDNN = "cudnn"
    XLA = "xla"


Value = TypeVar("Value")


def finding(find: Callable[[str], Value]) -> Callable[[str], Value]:
    """Return a parser of an option that finds something, and may have to download it.

    Its errors are printed as those of any command: typer would take them for wrong usage.
    """

    def parse(text: str) -> Value:
        try:
            return find(text)
        except AmskvError as error:
            print_error(str(error))
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error

    return parse


def _cached_as(name: str) -> str:
    """Return the name of a format of numbers; read only when given, as it imports much."""
    from amskv_jax.numbers import numbers_of  # noqa: PLC0415

    numbers_of(name)
    return name


def _read_size(text: str) -> int:
    """Read bytes of an option."""
    try:
        return read_bytes(text)
    except ValueError as error:
        raise UsageError(f"{text!r}: {error}") from error


CheckpointOption = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        help="Folder made by `amskv convert`, `train` or `init`, file made by `amskv pack`, "
        "repository made by `amskv push` (hf://user/repository), or the embedded model "
        "var-cifar10.",
        parser=finding(find_checkpoint),
        metavar="PATH",
    ),
]
OutFolderOption = Annotated[
    Path, typer.Option("--out", help="Folder to make; it must not exist or be empty.")
]
ClassifierOption = Annotated[
    Path | None,
    typer.Option(
        "--classifier",
        help="Classifier of the model's classes, see `amskv train classifier`; the one that comes "
        "with the package if not given.",
    ),
]
StatsOption = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        help="Layer statistics of this model, for policies that follow from them: a file made by "
        "`amskv calibrate`, its address on the hub (hf://...), or var-cifar10 for those of the "
        "embedded model.",
        parser=finding(find_stats),
        metavar="PATH",
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
MAX_SEED = 2**32 - 1
"""JAX takes 32 bits of a seed: a larger one would draw what a smaller one does."""

SeedOption = Annotated[
    int,
    typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of the random numbers, below 2**32."),
]
StoredDtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Of weights, products and cache; as stored if not given."),
]
ProductDtypeOption = Annotated[
    ProductDtype | None,
    typer.Option(
        "--dtype",
        help="Of weights, products and cache; as stored if not given. float8: products with "
        "much work in 8 bits, all else in bfloat16, on GPUs such as H100; float8-fast: on Ada "
        "and later, less exact.",
    ),
]
CacheDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--cache-dtype",
        help="How cached numbers are kept; as the products if not given. An unknown name lists "
        "all.",
        parser=finding(_cached_as),
        metavar="bfloat16, int8, ...",
    ),
]
AttentionOption = Annotated[Attention, typer.Option("--attention", help="Attention back end.")]
MeshOption = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="Share the work among devices: pictures over `data`, heads, with their part of the "
        "cache, and feed-forward layers over `model`. One device if not given.",
        metavar="data=N,model=M",
    ),
]
LowMemoryOption = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="For a device with little memory: text encoder, transformer and decoder are on it one "
        "after the other, and the transformer's weights in 8 bits, as `amskv pack` makes them.",
    ),
]
ManyOption = Annotated[int, typer.Option("--batch-size", min=1, help="Pictures generated at once.")]
DeviceMemoryOption = Annotated[
    int | None,
    typer.Option(
        "--device-memory",
        help="Memory that may be used of every device, such as 80GiB.",
        parser=finding(_read_size),
        metavar="SIZE",
    ),
]
CompilationCacheOption = Annotated[
    bool,
    typer.Option(
        "--compilation-cache/--no-compilation-cache",
        help="Keep compiled programs in the user's cache folder.",
    ),
]


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read numbers and ranges such as "207,360" or "0-9,12".

    Args:
      text: what was given.
      option: to which option, for the message.

    Raises:
      UsageError: if it is anything else.
    """
    try:
        return read_ranges(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: {error}") from error


def parse_seeds(text: str, option: str) -> tuple[int, ...]:
    """Read seeds; arguments and errors as in ``parse_numbers``, or one is no seed."""
    seeds = parse_numbers(text, option)
    wrong = next((seed for seed in seeds if not 0 <= seed <= MAX_SEED), None)
    if wrong is not None:
        raise UsageError(f"{option} {text!r}: {wrong} is no seed: expected 0 to {MAX_SEED}")
    return seeds
