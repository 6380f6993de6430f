"""The least damaging cache of a size: blocks and bits allotted by what they were measured to be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from amskv_jax.errors import UsageError
from amskv_jax.numbers import numbers_of
from amskv_jax.plan.damage import DamageRound
from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.mixed import MixedRow, mixed_row
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import Policy, default_budget, measured_damage
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.words import byte_size


@dataclass(frozen=True)
class Optimal(Policy):
    """Keeps the (head, scale) blocks, each in as many bits, whose loss was measured to damage most.

    Calibration on real pictures (``amskv calibrate --real``) estimates for every block by how much
    the model's predictions diverge if it is lost, or rounded to a format. Bytes then go where they
    undo the most damage, until the budget is spent. Slots which are not needed yet hold, meanwhile,
    blocks that are not kept to the end. No paper's method: it composes what AMS-KV (arXiv
    2511.16047), HeatKV (arXiv 2605.14877) and quantised caches do apart.

    Attributes:
      row_bytes: of the cache of one batch row; default: those of the default AMS-KV plan in
        bfloat16.
      formats: in which blocks may be kept, such as bfloat16 or int8+int4; default: all that were
        measured.

    Raises:
      UsageError: if the budget is negative; from ``plan``, if a format was not measured.
    """

    row_bytes: int | None = None
    formats: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.row_bytes is not None and self.row_bytes < 0:
            raise UsageError(f"the budget must be 0 or more bytes a row, not {self.row_bytes}")

    @property
    def uses_stats(self) -> bool:
        """See ``Policy.uses_stats``."""
        return True

    def within(self, max_bytes: int, geometry: CacheGeometry) -> Policy:
        """Return this policy with a budget; see ``Fitted.within``."""
        return replace(self, row_bytes=max_bytes // geometry.rows)

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        measured = measured_damage("optimal", shape, stats)
        if self.formats is not None:
            measured = measured.of_formats(self.formats)
        budget = self.row_bytes
        if budget is None:
            whole = CacheGeometry(1, shape.num_heads, shape.head_dim)
            budget = whole.bytes(shape.num_heads * shape.num_layers * default_budget(shape))
        around = measured.best(budget)
        rows, damage = allot_rows(shape, measured.formats, around, budget)
        note = (
            f"optimal: {byte_size(budget)} a row, "
            f"{damage:.4f} nats a token of divergence expected, by the damage around a cache of "
            f"{byte_size(around.row_bytes)} a row"
        )
        return RetentionPlan(shape.schedule, rows, note)


def allot_rows(
    shape: CacheShape, formats: tuple[str, ...], around: DamageRound, budget: int
) -> tuple[tuple[MixedRow, ...], float]:
    """Return the rows of all layers for at most ``budget`` bytes, and the divergence expected.

    Args:
      shape: of the model's cache.
      formats: in which blocks may be kept.
      around: what the choice of a format does to every block.
      budget: bytes of one batch row.
    """
    tokens = np.array(shape.schedule.tokens[:-1])
    per_token = [2 * numbers_of(name).bytes(shape.head_dim) for name in formats]
    sizes = tokens[:, None] * np.array(per_token)
    chosen = allot(_unread(around.damage), around.damage[..., -1], sizes, budget)
    rows = tuple(
        _row(shape.schedule, formats, own, damage)
        for own, damage in zip(chosen, around.damage, strict=True)
    )
    format_of, stop = plan_lives(rows, shape.schedule, formats)
    damage = around.damage[(*np.indices(stop.shape), np.maximum(format_of, 0), stop)]
    return rows, around.divergence + float(damage.sum())


def allot(lost: np.ndarray, kept: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    """Choose a format for every block, or none, so that the damage is least within a budget.

    Every block goes up along the lower convex hull of its (bytes, damage), the step that undoes the
    most damage per byte first.

    Args:
      lost: damage of a block that is not chosen, [layers, heads, S - 1].
      kept: of one that is kept to the end, [layers, heads, S - 1, formats].
      sizes: bytes of a block, [S - 1, formats].
      budget: bytes in all.

    Returns:
      The format of every block, [layers, heads, S - 1] int; -1 for none.
    """
    chosen = np.full(lost.shape, -1)
    steps = [
        (step.gain / step.cost, step)
        for block in np.ndindex(lost.shape)
        for step in _hull(block, float(lost[block]), kept[block], sizes[block[-1]])
    ]
    for _, step in sorted(steps, key=lambda ranked: -ranked[0]):
        if chosen[step.block] == step.before and step.cost <= budget:
            chosen[step.block] = step.after
            budget -= step.cost
    return chosen


class _Step(NamedTuple):
    """A block's way from one format to a larger one."""

    block: tuple[int, ...]
    before: int
    after: int
    cost: int
    gain: float


def _hull(block: tuple[int, ...], lost: float, kept: np.ndarray, sizes: np.ndarray) -> list[_Step]:
    """Return the steps of one block along its hull, each undoing less per byte than the last."""
    corners = [(0, lost, -1)]
    for index in np.argsort(sizes, kind="stable"):
        size, damage = int(sizes[index]), float(kept[index])
        if damage >= corners[-1][1]:
            continue
        while len(corners) > 1 and _rate(corners[-1], (size, damage)) >= _rate(*corners[-2:]):
            corners.pop()
        corners.append((size, damage, int(index)))
    return [
        _Step(block, before[2], after[2], after[0] - before[0], before[1] - after[1])
        for before, after in pairwise(corners)
    ]


def _rate(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    """Return the damage undone per byte."""
    return (before[1] - after[1]) / (after[0] - before[0])


def _unread(damage: np.ndarray) -> np.ndarray:
    """Return the damage of blocks that no step reads, [..., S - 1], from [..., S - 1, F, S + 1]."""
    sources = damage.shape[-3]
    return np.stack([damage[..., j, 0, j + 1] for j in range(sources)], axis=-1)


def _row(
    schedule: ScaleSchedule, formats: tuple[str, ...], chosen: np.ndarray, damage: np.ndarray
) -> MixedRow:
    """Return a layer's row; free slots go to blocks which are worth most per token until the end.

    Args:
      schedule: the scales, S of them.
      formats: names.
      chosen: [heads, S - 1].
      damage: [heads, S - 1, formats, S + 1].
    """
    worth = (_unread(damage) - damage[..., 0, -2]) / np.array(schedule.tokens[:-1])
    order = np.argsort(-worth, axis=None, kind="stable")
    blocks = [divmod(int(index), chosen.shape[1]) for index in order]
    lend = [(head, scale) for head, scale in blocks if chosen[head, scale] < 0]
    names = [[None if one < 0 else formats[one] for one in own] for own in chosen]
    return mixed_row(schedule, names, lend=lend)


def block_lives(
    row: MixedRow, schedule: ScaleSchedule, formats: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the format of every block and the first step that no longer reads it.

    Returns:
      Two arrays [heads, S - 1]; the format is -1 and the step that after the block's own where it
      is never read.
    """
    first = np.array(schedule.offsets[: schedule.num_scales - 1])
    steps = range(schedule.num_scales)
    parts = np.stack([row.formats(schedule, step)[:, first] for step in steps])
    own = np.array(
        [formats.index(numbers) if numbers in formats else 0 for numbers, _ in row.parts]
    )
    part = parts.max(0)
    stop = (parts >= 0).sum(0) + np.arange(1, len(first) + 1)
    return np.where(part < 0, -1, own[part]), stop


def plan_lives(
    rows: Sequence[MixedRow], schedule: ScaleSchedule, formats: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``block_lives`` of all layers, two arrays [layers, heads, S - 1]."""
    lives = [block_lives(row, schedule, formats) for row in rows]
    format_of, stop = (np.stack(parts) for parts in zip(*lives, strict=True))
    return format_of, stop
