"""Words and numbers for people."""

from collections.abc import Iterable

GIB = 2**30


def number_ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ranges: 0, 1, 2, 7 becomes "0-2, 7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] + 1 == number:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)


def decimal(number: float) -> str:
    """Return a number with one decimal, or none if it is whole."""
    return f"{number:.1f}".removesuffix(".0")


def byte_size(count: int) -> str:
    """Return a number of bytes as "18.68 GiB", or in smaller units below a tenth of a GiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"
