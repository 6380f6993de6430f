"""Words and numbers for people, shared by tables and plots."""

from collections.abc import Iterable

import numpy as np

from amskv_jax.memory import GIB
from amskv_jax.plan import HeadRow, RetentionPlan, Row, SelectingRow, StaticRow
from amskv_jax.schedule import ScaleSchedule


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


def layers_by_row(plan: RetentionPlan) -> dict[Row, list[int]]:
    """Return the distinct rows of a plan, in order of first appearance, and their layers."""
    layers: dict[Row, list[int]] = {}
    for layer, row in enumerate(plan.rows):
        layers.setdefault(row, []).append(layer)
    return layers


def scale_shares(row: Row, schedule: ScaleSchedule) -> np.ndarray:
    """Return which share of every scale's tokens a layer reads at every step, mean over its heads.

    Returns:
      [S, S]: entry (j, i) for scale j at step i; NaN where that is decided while drawing.
    """
    if isinstance(row, HeadRow):
        return np.mean([scale_shares(head, schedule) for head in row.heads], axis=0)
    if isinstance(row, StaticRow):
        read = np.zeros((schedule.num_scales, schedule.num_scales))
        for step, segments in enumerate(row.keep):
            for segment in segments:
                read[segment.scale, step] += segment.tokens
        return read / np.array(schedule.tokens)[:, None]
    shares = np.triu(np.ones((schedule.num_scales, schedule.num_scales)), 1)
    if isinstance(row, SelectingRow):
        chosen = np.array(row.counts) < schedule.offsets[:-1]
        nothing = np.array(row.counts) == 0
    else:
        chosen = np.array(schedule.offsets[:-1]) > row.c_min
        nothing = np.zeros(schedule.num_scales, bool)
    shares[:, nothing] = 0
    return np.where((shares > 0) & chosen, np.nan, shares)
