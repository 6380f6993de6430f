"""Words and numbers for people."""

import re
from collections.abc import Iterable

GIB = 2**30
MOST_NUMBERS = 10**6
"""What a range may hold at most: more is a slip, and would fill the memory."""


def number_ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ranges: 0, 1, 2, 7 becomes "0-2, 7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] + 1 == number:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)


def read_ranges(text: str, separator: str = ",") -> tuple[int, ...]:
    """Read numbers and ranges such as "0-9,12"; the inverse of ``number_ranges``.

    Args:
      text: what was given.
      separator: between numbers and ranges.

    Raises:
      ValueError: if it is anything else; the message goes on after the text.
    """
    numbers: list[int] = []
    for part in text.split(separator):
        match = re.fullmatch(r"\s*(-?[0-9]{1,99})\s*(?:-\s*([0-9]{1,99})\s*)?", part)
        if not match:
            raise ValueError(
                f"expected numbers and ranges such as 207{separator}360 or 0-9{separator}12"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {first}-{last} is empty")
        if last - first >= MOST_NUMBERS:
            raise ValueError(f"the range {first}-{last} has more than {MOST_NUMBERS} numbers")
        numbers += range(first, last + 1)
    return tuple(numbers)


def decimal(number: float) -> str:
    """Return a number with one decimal, or none if it is whole."""
    return f"{number:.1f}".removesuffix(".0")


def byte_size(count: int) -> str:
    """Return a number of bytes as "18.68 GiB", or in smaller units below a tenth of a GiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def read_bytes(text: str) -> int:
    """Read a number of bytes such as "2GiB", "1.5 GB" or "800000".

    Raises:
      ValueError: if it is anything else; the message goes on after the text.
    """
    pattern = r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(?:([KMGT])(i?))?B?\s*"
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    if not match:
        raise ValueError("expected bytes such as 2GiB, 500MB or 800000")
    number, prefix, binary = match.groups()
    power = " KMGT".index((prefix or " ").upper())
    return int(float(number) * (1024 if binary else 1000) ** power)
