"""Plots that explain retention plans; they need matplotlib, the extra "plot"."""

import os
from collections.abc import Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from amskv_jax.errors import AmskvError
from amskv_jax.numbers import NUMBERS
from amskv_jax.plan.retention import RetentionPlan, layers_by_row
from amskv_jax.plan.rows import Row
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.words import decimal, number_ranges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 3
PANEL_INCHES = 4.0
KEPT, DROPPED, OWN = (0.22, 0.46, 0.72), (0.93, 0.93, 0.93), (0.95, 0.70, 0.25)
CHOSEN = (0.30, 0.62, 0.42)
FEW_BITS, MANY_BITS = (0.98, 0.80, 0.55), (0.35, 0.08, 0.40)


def save_plan_plot(plans: Mapping[str, RetentionPlan], path: str | os.PathLike[str]) -> None:
    """Draw which layers keep which scale at which step.

    Args:
      plans: name -> plan; each has one panel per group of layers that keep the same.
      path: the picture; its suffix says in which format.

    Raises:
      AmskvError: if matplotlib is missing, or does not know the format.
    """
    figure = plan_figure(plans)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise AmskvError(f"cannot draw the plan: {error}") from error


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches; raises AmskvError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise AmskvError("plots need matplotlib: pip install 'amskv-jax[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def scale_names(schedule: ScaleSchedule) -> list[str]:
    """Return the side of every scale's map, or "height x width" where these differ."""
    return [str(h) if h == w else f"{h}x{w}" for h, w in schedule.grids]


def plan_figure(plans: Mapping[str, RetentionPlan]) -> "Figure":
    """Return the figure which ``save_plan_plot`` writes; raises as it does."""
    panels = [
        (f"{name}\nlayers {number_ranges(layers)}: {row.capacity} slots", plan.schedule, row)
        for name, plan in plans.items()
        for row, layers in layers_by_row(plan).items()
    ]
    columns = min(len(panels), MAX_COLUMNS)
    rows = -(-len(panels) // columns)
    figure = new_figure(max(1.5, columns) * PANEL_INCHES, rows * (PANEL_INCHES + 0.4) + 0.4)
    from matplotlib.patches import Patch  # noqa: PLC0415

    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        _draw_row(axis, *panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("scale being drawn (side of its map), and tokens read from the cache")
    figure.supylabel("scale being read")
    meanings: dict[str, Any] = {"drawn by the step itself": OWN, "dropped": DROPPED}
    formats = {numbers for _, _, row in panels for numbers, _ in row.parts}
    for numbers in filter(formats.__contains__, (None, *NUMBERS)):
        meanings[f"kept as {numbers}" if numbers else "kept in the cache"] = _color(numbers)
    if any(np.isnan(row.shares(schedule)).any() for _, schedule, row in panels):
        meanings["chosen while drawing: share of all tokens"] = CHOSEN
    figure.legend(
        handles=[Patch(color=color, label=meaning) for meaning, color in meanings.items()],
        loc="outside upper center",
        ncols=len(meanings),
        frameon=False,
    )
    return figure


def _color(numbers: str | None) -> np.ndarray:
    """Return the color of what is kept in a format: the more bits, the darker; None is the cache's.

    From two bits a number to 32, in equal steps from one to twice as many.
    """
    if numbers is None:
        return np.array(KEPT)
    many = np.clip(np.log2(NUMBERS[numbers].bytes(64) * 8 / 64) / 4 - 0.25, 0, 1)
    color: np.ndarray = (1 - many) * np.array(FEW_BITS) + many * np.array(MANY_BITS)
    return color


def _draw_row(axis: Any, title: str, schedule: ScaleSchedule, row: Row) -> None:
    """Draw the share of every scale (upwards) that one row keeps at every step (rightwards).

    Where tokens are chosen while drawing, it is the share of all earlier tokens, alike for all.
    """
    scales = np.arange(schedule.num_scales)
    shares = row.shares(schedule)
    chosen = np.isnan(shares)
    even = np.array(row.kept_tokens) / np.maximum(schedule.offsets[:-1], 1)
    shares = np.where(chosen, even, shares)
    past = (1 - shares[..., None]) * DROPPED
    for numbers, part in row.parts:
        own = np.where(chosen, even, part.shares(schedule))[..., None]
        past += own * np.where(chosen[..., None], CHOSEN, _color(numbers))
    past[np.tril_indices(len(scales))] = 1  # the future: white
    past[scales, scales] = OWN
    axis.imshow(past, origin="lower", aspect="auto")
    for scale, step in zip(*np.nonzero((shares > 0) & (shares < 1)), strict=True):
        axis.text(step, scale, f"{shares[scale, step]:.0%}", ha="center", va="center", fontsize=7)
    axis.set_title("\n".join(fill(line, 46) for line in title.split("\n")), fontsize=10)
    sides = scale_names(schedule)
    read = [
        f"{side}\n{decimal(tokens)}" for side, tokens in zip(sides, row.kept_tokens, strict=True)
    ]
    axis.set_xticks(scales, read, fontsize=8)
    axis.set_yticks(scales, sides, fontsize=8)
    axis.set_xticks(scales[1:] - 0.5, minor=True)
    axis.set_yticks(scales[1:] - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
