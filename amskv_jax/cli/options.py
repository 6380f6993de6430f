"""Options which several commands have, and readers of their values."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from amskv_jax.errors import UsageError


class Dtype(StrEnum):
    """Types of numbers in weights and cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Attention(StrEnum):
    """Attention back ends, see ``attention.attend``."""

    AUTO = "auto"
    CUDNN = "cudnn"
    XLA = "xla"


CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="Folder made by `amskv convert` or `amskv init`.")
]
OutFolderOption = Annotated[
    Path, typer.Option("--out", help="Folder to make; it must not exist or be empty.")
]
StatsOption = Annotated[
    Path | None,
    typer.Option(
        "--stats", help="Layer statistics of this model, for policies that follow from them."
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read numbers and ranges such as "207,360" or "0-9,12".

    Args:
      text: what was given.
      option: to which option, for the message.

    Raises:
      UsageError: if it is anything else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise UsageError(
                f"{option} {text!r}: expected numbers and ranges such as 207,360 or 0-9"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"{option} {text!r}: the range {first}-{last} is empty")
        numbers += range(first, last + 1)
    return tuple(numbers)
