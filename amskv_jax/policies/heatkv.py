"""HeatKV: (head, scale) blocks removed in a fixed order, within a budget at every layer."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import HeadRow, StaticRow
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import Policy
from amskv_jax.policies.heads import head_mass
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class HeatKV(Policy):
    """Keeps, per scale, all heads but those that attend to it least, as the budget demands.

    Head-tuned KV-cache compression, arXiv 2605.14877, with the schedule of its published code. The
    coarsest scales are protected. Every other source scale has an order of all heads of all layers:
    by the attention which later scales give to it (S-CAS), least first. Before every step the same
    number of heads is removed from every source scale, the smallest that keeps to the budget. While
    a step runs and its layers write one after the other, some of what goes at its end goes
    beforehand, so that what all layers hold together is within the budget at all times.

    The paper's S-CAS is of the conditional row alone. Ours is of what ``calibrate`` measured, the
    mean of both rows of guidance; with guidance off it is the paper's.

    Attributes:
      budget: share of what a cache of all scales but the last holds, 0 to 1.
      protected: number of coarsest scales which every head keeps.
      orders: a file of removal orders, as the paper's code publishes them, in place of the
        calibration; see ``read_orders``.

    Raises:
      UsageError: if an option is out of range.
    """

    budget: float = 0.1
    protected: int = 3
    orders: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 1:
            raise UsageError(f"the budget must be a share from 0 to 1, not {self.budget}")
        if self.protected < 0:
            raise UsageError(f"protected must be 0 or more scales, not {self.protected}")

    @property
    def uses_stats(self) -> bool:
        """See ``Policy.uses_stats``."""
        return self.orders is None

    def with_budget(self, tokens: int, shape: CacheShape) -> Policy:
        """Return this policy with a budget; see ``Budgeted.with_budget``."""
        return replace(self, budget=min(1.0, tokens / max(1, shape.schedule.offsets[-2])))

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        schedule = shape.schedule
        protected = min(self.protected, schedule.num_scales - 1)
        if self.orders is not None:
            orders, source = read_orders(self.orders, shape, protected), Path(self.orders).name
        elif stats is not None:
            stats.check(shape)
            orders, source = removal_orders(stats, protected), "calibration"
        else:
            raise UsageError(
                "the heatkv policy needs removal orders, or the attention of a calibration run: "
                "give the file of either"
            )
        tables = strict_schedule(shape, orders, protected, self.budget)
        rows = _rows(schedule, tables.seen)
        slots = sum(row.head_slots(shape.num_heads) for row in rows)
        full = shape.num_layers * shape.num_heads * schedule.offsets[-2]
        note = (
            f"HeatKV: budget {self.budget:g}, {protected} scales protected, orders from {source}, "
            f"{slots / max(1, full):.2%} of all scales but the last allocated"
        )
        return RetentionPlan(schedule, rows, note)


class Tables(NamedTuple):
    """What HeatKV's schedule keeps.

    Attributes:
      seen: [S, layers, heads, S] bool: whether a head reads a source scale, the last index, while a
        step, the first index, attends; never the step's own scale.
      after: like ``seen``: whether the scale is still held once the step is over. The last step
        stores nothing.
    """

    seen: np.ndarray
    after: np.ndarray


def cumulative_attention(stats: LayerStats) -> np.ndarray:
    """Return the Scale-dependent Cumulative Attention Score (S-CAS, HeatKV, arXiv 2605.14877).

    Returns:
      [layers, heads, S - 1]: the attention that queries of a later scale give to a source scale,
      averaged over the later scales.
    """
    return head_mass(stats.head_density)


def removal_orders(stats: LayerStats, protected: int) -> np.ndarray:
    """Return the order in which heads are removed from every source scale.

    Returns:
      [S - 1 - protected, layers * heads, 2] int: (head, layer), the pair to remove first first:
      ascending by score, then head, then layer.
    """
    scores = cumulative_attention(stats)
    layer, head = (index.ravel() for index in np.indices(scores.shape[:2]))
    orders = [
        np.lexsort((layer, head, scores[:, :, scale].ravel()))
        for scale in range(protected, scores.shape[2])
    ]
    pairs = np.stack([head, layer], axis=-1)
    return pairs[np.array(orders, int).reshape(-1, len(pairs))]


def read_orders(path: str, shape: CacheShape, protected: int) -> np.ndarray:
    """Read a file of removal orders of the paper's code; see ``removal_orders`` for the result.

    It is JSON: one list per source scale, from the first that is not protected to the last but one
    of the schedule, each with every ``[head, layer]`` once; or that under the key "orders".

    Raises:
      AmskvError: if the file is no such file, or is for another model or schedule.
    """
    orders = [_pairs(path, order) for order in _read_json(path)]
    schedule, (layers, heads) = shape.schedule, (shape.num_layers, shape.num_heads)
    sources = schedule.num_scales - 1 - protected
    if len(orders) != sources:
        raise AmskvError(
            f"{path} has orders for {len(orders)} source scales, but this model's schedule, "
            f"{schedule}, has {sources} between the {protected} protected scales and the last: "
            "give orders of this schedule, or calibrate this model"
        )
    every = {(head, layer) for head in range(heads) for layer in range(layers)}
    for scale, order in enumerate(orders, protected):
        found = set(map(tuple, order.tolist()))
        if found == every and len(order) == len(every):
            continue
        if len(found) != len(order):
            raise AmskvError(f"{path}: the order of source scale {scale} names a head twice")
        most_heads, most_layers = order.max(0, initial=-1) + 1
        raise AmskvError(
            f"{path} has orders of another model: source scale {scale} orders {len(order)} heads, "
            f"of {most_layers} layers with up to {most_heads}; this one has {len(every)}, of "
            f"{layers} layers with {heads}"
        )
    return np.array(orders, int).reshape(sources, len(every), 2)


def removed_counts(
    schedule: ScaleSchedule, heads: int, protected: int, budget: float
) -> tuple[int, ...]:
    """Return how many heads of the model every source scale has lost when each step starts.

    Of C cached tokens per head, P of them protected, each removed head gives up C - P. So
    x = ceil(heads * (C - budget * full) / (C - P)), and 0 while C is within the budget.

    Args:
      schedule: the scales.
      heads: of all layers together.
      protected: number of coarsest scales which every head keeps, at most all but the last.
      budget: share of the ``full`` tokens of all scales but the last.

    Returns:
      One number per step.

    Raises:
      AmskvError: if the protected scales alone exceed the budget.
    """
    full, kept = schedule.offsets[-2], schedule.offsets[protected]
    if budget + 1e-12 < kept / max(1, full):
        least = math.ceil(1e4 * kept / full) / 1e4
        raise AmskvError(
            f"the budget is {budget:g}, but the {protected} protected scales need {least:g} of the "
            f"cache ({kept} of {full} tokens): raise the budget or protect fewer scales"
        )
    # In floating point as in the published code, so that the roundings are the same.
    allowed = budget * full
    counts = []
    for cached in schedule.offsets[:-1]:
        over = heads * (cached - allowed)
        needed = math.ceil(over / (cached - kept)) if cached > max(allowed, kept) else 0
        counts.append(min(heads, max(0, needed)))
    return tuple(counts)


def strict_schedule(shape: CacheShape, orders: np.ndarray, protected: int, budget: float) -> Tables:
    """Return what is read at every step, and held after it, when ``orders`` meet a budget.

    Args:
      shape: of the model's cache; its channels do not matter.
      orders: see ``removal_orders``.
      protected: number of coarsest scales which every head keeps, at most all but the last.
      budget: see ``HeatKV``.

    Raises:
      AmskvError: if the budget cannot be met.
    """
    schedule, scales = shape.schedule, shape.schedule.num_scales
    layers, heads = shape.num_layers, shape.num_heads
    counts = removed_counts(schedule, layers * heads, protected, budget)
    ranks = np.full((layers, heads, scales), layers * heads)  # those protected are never removed
    for scale, order in enumerate(orders, protected):
        ranks[order[:, 1], order[:, 0], scale] = np.arange(len(order))
    source = np.arange(scales)
    seen, after = (np.zeros((scales, layers, heads, scales), bool) for _ in range(2))
    removed = np.zeros((layers, heads, scales), bool)
    for step in range(scales - 1):
        due = (ranks < counts[step + 1]) & (source <= step)
        early = _brought_forward(schedule, ranks, removed, due, step, protected, budget)
        seen[step] = ~(removed | early) & (source < step)
        after[step] = ~due & (source <= step)
        removed = due
    seen[-1] = ~removed & (source < scales - 1)
    return Tables(seen, after)


def _brought_forward(
    schedule: ScaleSchedule,
    ranks: np.ndarray,
    removed: np.ndarray,
    due: np.ndarray,
    step: int,
    protected: int,
    budget: float,
) -> np.ndarray:
    """Return which removals due at the end of a step must come before it, [layers, heads, S] bool.

    Layer after layer removes what is due and writes its own scale. Whenever all layers together
    then hold too much, later layers give up what is due of earlier scales: the last layer first,
    within it the latest scale, within that by rank.

    Args:
      schedule: the scales.
      ranks: of every (layer, head, source scale) in the order of its source scale.
      removed: what was removed before the step.
      due: what is removed after it.
      step: the step.
      protected: see ``strict_schedule``.
      budget: see there.

    Raises:
      AmskvError: if that is not enough.
    """
    early = np.zeros_like(removed)
    layers, heads, _ = removed.shape
    limit = budget * layers * heads * schedule.offsets[-2]
    tokens = np.array(schedule.tokens)
    waiting = np.argwhere(due & ~removed & (np.arange(len(tokens)) < step))
    order = np.lexsort((ranks[tuple(waiting.T)], -waiting[:, 2], -waiting[:, 0]))
    candidates = iter(waiting[order].tolist())
    earlier = slice(protected, step)
    held = layers * heads * schedule.offsets[min(protected, step)]
    held += int((~removed[..., earlier] * tokens[earlier]).sum())
    for own in range(layers if step >= protected else 0):
        going = due[own] & ~removed[own] & ~early[own]
        held -= int((going[:, earlier] * tokens[earlier]).sum())
        held += int((~due[own, :, step]).sum()) * schedule.tokens[step]
        while held > limit:
            layer, head, scale = next(candidates, (0, 0, 0))
            if layer <= own:
                raise AmskvError(
                    f"a budget of {budget:g} cannot be met at step {step}, layer {own}: raise it"
                )
            early[layer, head, scale] = True
            held -= schedule.tokens[scale]
    return early


def _rows(schedule: ScaleSchedule, seen: np.ndarray) -> tuple[HeadRow, ...]:
    """Return the rows of layers that read ``seen`` [S, layers, heads, S]."""
    made: dict[bytes, StaticRow] = {}

    def row(kept: np.ndarray) -> StaticRow:
        key = kept.tobytes()
        if key not in made:
            made[key] = StaticRow.from_scales(
                schedule, [map(int, np.flatnonzero(scales)) for scales in kept]
            )
        return made[key]

    per_layer = seen.transpose(1, 2, 0, 3)  # [layers, heads, S, S]
    return tuple(HeadRow(tuple(row(head) for head in layer)) for layer in per_layer)


def _read_json(path: str) -> list[Any]:
    try:
        data = json.loads(Path(path).read_text())
        found = data["orders"] if isinstance(data, dict) else data
        return [*found]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_orders(path, error) from error


def _pairs(path: str, order: Any) -> np.ndarray:
    try:
        pairs = np.array([(int(head), int(layer)) for head, layer in order], int)
    except (ValueError, TypeError, OverflowError) as error:
        raise _no_orders(path, error) from error
    return pairs.reshape(-1, 2)


def _no_orders(path: str, error: Exception) -> AmskvError:
    return AmskvError(
        f"cannot read the removal orders {path}: expected a list of [head, layer] pairs for every "
        f"source scale, found {error!r}"
    )
