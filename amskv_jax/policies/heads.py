"""Per-head plans: every head keeps the scales which it attends to."""

from dataclasses import dataclass, replace

import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import HeadRow, StaticRow
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import Policy, default_budget
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class Heads(Policy):
    """Keeps, per head, the scales with the most calibrated attention per token.

    After the idea of HeatKV, arXiv 2605.14877 (which itself is the policy ``heatkv``): a static
    schedule of (head, scale) blocks. A block
    is worth the attention which the head gives to the scale, averaged over the later scales (the
    paper's S-CAS). The blocks worth most per token are kept to the end, as many as the budget of
    the whole model holds; slots not needed yet hold the latest other scales meanwhile.

    Attributes:
      budget: mean tokens per head, over all heads and layers, that are allocated; default: the mean
        of the default AMS-KV plan.
      protected: number of coarsest scales which every head keeps.
      patterns: most different sets of scales among all heads; default: any number, as all heads of
        a layer share one buffer and one attention call. Few sets follow the calibration less
        closely, and its noise too.

    Raises:
      UsageError: if an option is out of range.
    """

    budget: int | None = None
    protected: int = 2
    patterns: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 0:
            raise UsageError(f"the budget must be 0 or more tokens, not {self.budget}")
        if self.protected < 0:
            raise UsageError(f"protected must be 0 or more scales, not {self.protected}")
        if self.patterns is not None and self.patterns < 1:
            raise UsageError(f"the patterns must be 1 or more, not {self.patterns}")

    @property
    def uses_stats(self) -> bool:
        """See ``Policy.uses_stats``."""
        return True

    def with_budget(self, tokens: int, shape: CacheShape) -> Policy:
        """Return this policy with a budget; see ``Budgeted.with_budget``."""
        return replace(self, budget=tokens)

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        if stats is None:
            raise UsageError(
                "the heads policy needs the attention of a calibration run: give its file"
            )
        stats.check(shape)
        schedule = shape.schedule
        budget = default_budget(shape) if self.budget is None else self.budget
        tokens = np.array(schedule.tokens[:-1])
        least = int(tokens[: self.protected].sum())
        if budget < least:
            raise AmskvError(
                f"the budget is {budget} tokens, but the {self.protected} protected scales need "
                f"{least}: raise the budget or protect fewer scales"
            )
        mass = head_mass(stats.head_density)
        layers, heads, scales = mass.shape
        chosen = choose_blocks(
            mass.reshape(-1, scales), tokens, budget, self.protected, self.patterns
        )
        rows = {blocks: head_row(schedule, np.array(blocks)) for blocks in set(map(tuple, chosen))}
        per_head = [rows[tuple(blocks)] for blocks in chosen]
        note = (
            f"heads: mean budget {budget} tokens, {self.protected} scales protected, "
            f"{len(rows)} different sets of scales, "
            f"{(chosen @ tokens).mean():.0f} tokens a head allocated"
        )
        return RetentionPlan(
            schedule,
            tuple(
                HeadRow(tuple(per_head[start : start + heads]))
                for start in range(0, layers * heads, heads)
            ),
            note,
        )


def head_mass(head_density: np.ndarray) -> np.ndarray:
    """Return the attention to every source scale, averaged over the later scales.

    Args:
      head_density: see ``LayerStats``, [layers, heads, S, S].

    Returns:
      [layers, heads, S - 1]; the last scale is no source.
    """
    scales = head_density.shape[-1]
    return np.stack([head_density[:, :, j + 1 :, j].mean(-1) for j in range(scales - 1)], axis=-1)


def choose_blocks(
    mass: np.ndarray, tokens: np.ndarray, budget: int, protected: int, patterns: int | None = None
) -> np.ndarray:
    """Choose the scales that every head keeps to the end.

    If the heads would get too many different sets, only some are offered: the one that an average
    head would get, which always fits, and those which most heads would get. Every head starts with
    the smallest, and moves to another as long as the budget lasts, the move which gains most per
    token first. With what is left, sets grow for all their heads.

    Args:
      mass: worth of every scale to every head, [N, S - 1].
      tokens: [S - 1] of every scale.
      budget: mean tokens per head.
      protected: coarsest scales that are always chosen; they fit.
      patterns: most different rows of the result; None for any number.

    Returns:
      [N, S - 1] bool. Of equal blocks the first head's, then the coarsest, is taken.
    """
    chosen = _best_blocks(mass, tokens, budget, protected)
    sets, heads = np.unique(chosen, axis=0, return_counts=True)
    if patterns is None or len(sets) <= patterns:
        return chosen
    average = _best_blocks(mass.mean(0, keepdims=True), tokens, budget, protected)
    others = sets[np.argsort(-heads, kind="stable")]
    others = others[(others != average).any(1)][: patterns - 1]
    chosen = _assign(mass, tokens, budget, np.concatenate([average, others]))
    return _grow(mass, tokens, budget, chosen)


def _best_blocks(mass: np.ndarray, tokens: np.ndarray, budget: int, protected: int) -> np.ndarray:
    """Choose the blocks worth most per token, however many sets that makes."""
    chosen = np.zeros(mass.shape, bool)
    chosen[:, :protected] = True
    left = budget * len(mass) - int((chosen @ tokens).sum())
    for head, scale in np.argwhere(~chosen)[np.argsort(-(mass / tokens)[~chosen], kind="stable")]:
        if tokens[scale] <= left:
            chosen[head, scale] = True
            left -= int(tokens[scale])
    return chosen


def _assign(mass: np.ndarray, tokens: np.ndarray, budget: int, sets: np.ndarray) -> np.ndarray:
    """Give every head one of the ``sets`` [P, S - 1], of which the smallest fits all."""
    price, worth = sets @ tokens, mass @ sets.T
    heads, own = np.arange(len(mass)), np.full(len(mass), price.argmin())
    while True:
        gain = worth - worth[heads, own][:, None]
        cost = price - price[own][:, None]
        possible = (gain > 0) & (cost <= budget * len(mass) - price[own].sum())
        if not possible.any():
            return sets[own]
        rate = np.where(cost > 0, gain / np.maximum(cost, 1), np.inf)
        head, chosen = np.unravel_index(np.where(possible, rate, -1).argmax(), rate.shape)
        own[head] = chosen


def _grow(mass: np.ndarray, tokens: np.ndarray, budget: int, chosen: np.ndarray) -> np.ndarray:
    """Add blocks for all heads with the same set, those worth most per token first."""
    sets, owner = np.unique(chosen, axis=0, return_inverse=True)
    owner = owner.ravel()
    heads = np.bincount(owner)
    worth = np.stack([mass[owner == index].mean(0) for index in range(len(sets))]) / tokens
    left = budget * len(mass) - int((chosen @ tokens).sum())
    for index, scale in np.argwhere(~sets)[np.argsort(-worth[~sets], kind="stable")]:
        if heads[index] * tokens[scale] <= left:
            sets[index, scale] = True
            left -= int(heads[index] * tokens[scale])
    return sets[owner]


def head_row(schedule: ScaleSchedule, chosen: np.ndarray) -> StaticRow:
    """Return the row of a head that keeps the ``chosen`` scales to the end, [S - 1] bool.

    Slots which later chosen scales will need are lent to the latest scales that fit them whole.
    """
    tokens = schedule.tokens
    capacity = sum(tokens[scale] for scale in np.flatnonzero(chosen))
    alive: list[int] = []
    held = [alive]
    for step in range(1, schedule.num_scales):
        alive = [*alive, step - 1]
        kept = [scale for scale in alive if chosen[scale]]
        left = capacity - sum(tokens[scale] for scale in kept)
        for scale in reversed(alive):
            if not chosen[scale] and tokens[scale] <= left:
                kept.append(scale)
                left -= tokens[scale]
        alive = sorted(kept)
        held.append(alive)
    return StaticRow.from_scales(schedule, held)
