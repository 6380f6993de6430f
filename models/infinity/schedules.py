"""The token maps that Infinity draws: fifteen aspect ratios in four sizes (arXiv 2412.04431).

A smaller size is the beginning of the 1M schedule of the same ratio, which holds for all published
schedules; rotary positions (see ``rotary``) always follow the 1M schedule.
"""

import math
from fractions import Fraction
from types import MappingProxyType

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.schedule import ScaleSchedule

SIZES = MappingProxyType({"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13})
"""Name of every size (of a square picture, in pixels) -> its number of scales."""

_TALL = (
    # Height over width of upright and lying pictures, heights and widths of the upright one's maps.
    ("1.0", "1.0", "1 2 4 6 8 12 16 20 24 32 40 48 64", "1 2 4 6 8 12 16 20 24 32 40 48 64"),
    ("1.25", "0.8", "1 2 3 5 10 15 20 25 30 35 45 55 70", "1 2 3 4 8 12 16 20 24 28 36 44 56"),
    ("1.333", "0.75", "1 2 4 8 12 16 20 24 28 36 48 60 72", "1 2 3 6 9 12 15 18 21 27 36 45 54"),
    ("1.5", "0.666", "1 2 3 6 9 15 21 27 33 39 48 63 78", "1 2 2 4 6 10 14 18 22 26 32 42 52"),
    ("1.75", "0.571", "1 2 3 7 11 14 21 28 35 42 56 70 84", "1 2 3 4 6 8 12 16 20 24 32 40 48"),
    ("2.0", "0.5", "1 2 4 6 10 16 22 30 38 46 60 74 90", "1 2 2 3 5 8 11 15 19 23 30 37 45"),
    ("2.5", "0.4", "1 2 5 10 15 20 25 30 40 50 65 80 100", "1 2 2 4 6 8 10 12 16 20 26 32 40"),
    ("3.0", "0.333", "1 2 6 9 15 21 27 36 45 54 72 90 111", "1 2 2 3 5 7 9 12 15 18 24 30 37"),
)

TOLERANCE = 0.03
"""How far a ratio W:H may lie from the next one of the table, so that 16:9 is drawn as 7:4."""


def _table() -> dict[str, ScaleSchedule]:
    table = {}
    for tall, wide, heights, widths in _TALL:
        grids = list(zip(map(int, heights.split()), map(int, widths.split()), strict=True))
        table[tall] = ScaleSchedule(tuple(grids))
        table[wide] = ScaleSchedule(tuple((width, height) for height, width in grids))
    return table


RATIOS = MappingProxyType(_table())
"""Height over width, as the reference names it -> the schedule of size 1M."""

SQUARE_1M = RATIOS["1.0"]
"""Schedule of the 1024-pixel square pictures: 10521 tokens."""


def schedule_of(aspect: str = "1:1", size: str = "1M") -> ScaleSchedule:
    """Return the schedule of an aspect ratio and a size.

    Args:
      aspect: "W:H", of which the nearest ratio is taken if it is near enough (``TOLERANCE``), or
        the table's height/width number such as "1.333".
      size: one of ``SIZES``.

    Raises:
      UsageError: if there is no such ratio or size; it lists what there is.
    """
    if size not in SIZES:
        raise UsageError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
    return _cut(RATIOS[_ratio(aspect)], SIZES[size])


def whole_of(schedule: ScaleSchedule) -> ScaleSchedule:
    """Return the 1M schedule of which a schedule is the beginning.

    Any number of scales will do that tells the ratio, so that tests can draw small pictures.

    Raises:
      AmskvError: if there is none, or several; it lists the nearest.
    """
    wholes = [w for w in RATIOS.values() if _cut(w, schedule.num_scales) == schedule]
    if len(wholes) == 1:
        return wholes[0]
    height, width = schedule.grids[-1]
    ratio = min(RATIOS, key=lambda name: abs(math.log(height / width / float(name))))
    sizes = {size: _cut(RATIOS[ratio], count) for size, count in SIZES.items()}
    size = min(sizes, key=lambda size: abs(math.log(sizes[size].tokens[-1] / height / width)))
    problem = "the beginning of several schedules" if wholes else "no schedule of Infinity"
    raise AmskvError(
        f"the scales {schedule} are {problem}: the nearest is aspect {ratio} of size {size} with "
        f"the scales {sizes[size]}"
    )


def _cut(whole: ScaleSchedule, num_scales: int) -> ScaleSchedule:
    return ScaleSchedule(whole.grids[:num_scales])


def _ratio(aspect: str) -> str:
    """Return the table's name of an aspect ratio."""
    try:
        if ":" in aspect:
            width, height = (Fraction(part.strip()) for part in aspect.split(":"))
            number, tolerance = float(height / width), TOLERANCE
        else:
            number, tolerance = float(aspect), 2e-3  # the table's 0.666 is 0.667 too
        distances = {name: abs(math.log(number / float(name))) for name in RATIOS}
    except (ValueError, ZeroDivisionError, OverflowError):
        distances = {}
    name = min(distances, key=distances.__getitem__, default="")
    if not name or not distances[name] <= tolerance:  # also if it is not a number
        known = ", ".join(f"{_words(name)} ({name})" for name in RATIOS)
        raise UsageError(
            f"unknown aspect ratio {aspect!r}: expected width:height, or height/width as a number, "
            f"of {known}"
        )
    return name


def _words(name: str) -> str:
    """Return a ratio of the table as "width:height"."""
    ratio = Fraction(float(name)).limit_denominator(7)
    return f"{ratio.denominator}:{ratio.numerator}"
