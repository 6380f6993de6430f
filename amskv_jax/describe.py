"""Words and numbers for people, shared by tables and plots."""

from collections.abc import Iterable

from amskv_jax.memory import GIB
from amskv_jax.plan import RetentionPlan, Row


def number_ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ranges: 0, 1, 2, 7 becomes "0-2, 7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] + 1 == number:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)


def byte_size(count: int) -> str:
    """Return a number of bytes as "18.68 GiB", or in smaller units below one hundredth GiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit / 100:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def layers_by_row(plan: RetentionPlan) -> dict[Row, list[int]]:
    """Return the distinct rows of a plan, in order of first appearance, and their layers."""
    layers: dict[Row, list[int]] = {}
    for layer, row in enumerate(plan.rows):
        layers.setdefault(row, []).append(layer)
    return layers
