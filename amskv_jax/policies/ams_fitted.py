"""AMS-KV with the numbers, which its paper leaves open, that measured damage asks for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.ams import AMSKV
from amskv_jax.policies.base import Policy, default_budget, measured_damage
from amskv_jax.policies.walk import Walk, adaptive_walk, distinct_capacities
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class FittedAMSKV(Policy):
    """Keeps what AMS-KV's rule keeps, its numbers chosen so that the loss damages least.

    The paper (arXiv 2511.16047) leaves C_min, C_max, the number of condensed scales and theta open.
    All that lead to different plans within the budget are tried. The best one has the least damage,
    which `amskv calibrate --real` measures, summed over everything that it drops.

    Attributes:
      max_tokens: the most tokens that all layers together may hold; default: those of the default
        AMS-KV plan.

    Raises:
      UsageError: if the budget is negative.
    """

    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise UsageError(f"the cache must hold 0 or more tokens, not {self.max_tokens}")

    @property
    def uses_stats(self) -> bool:
        """See ``Policy.uses_stats``."""
        return True

    def within(self, max_bytes: int, geometry: CacheGeometry) -> Policy:
        """Return this policy with a budget; see ``Fitted.within``."""
        return replace(self, max_tokens=geometry.tokens(max_bytes))

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        fitted = self.fit(shape, stats)
        plan = fitted.plan(shape, stats)
        return replace(plan, note=f"{plan.note}; fitted to the measured damage")

    def fit(self, shape: CacheShape, stats: LayerStats | None) -> AMSKV:
        """Return the policy whose plan does the least damage within the budget.

        Raises:
          UsageError: without damage in the statistics.
          AmskvError: if no plan is so small; it says how small the smallest is.
        """
        measured = measured_damage("ams-fitted", shape, stats)
        assert stats is not None, "it has the damage"
        schedule, layers = shape.schedule, shape.num_layers
        limit = layers * default_budget(shape) if self.max_tokens is None else self.max_tokens
        damage = measured.rounds[0].damage[:, :, :, 0].sum(1)
        best, least, smallest = None, np.inf, layers * schedule.total
        for condensed in range(schedule.num_scales):
            walk = cache(partial(adaptive_walk, schedule, condensed=condensed))
            for option in _options(schedule, stats, condensed):
                tokens, lost = 0, 0.0
                for layer, step in enumerate(option.expansions):
                    held = walk(c_min=option.c_min, c_max=option.c_max, expand_at=step).held
                    tokens += max(sum(schedule.tokens[j] for j in scales) for scales in held)
                    lost += _lost(damage[layer], held)
                smallest = min(smallest, tokens)
                if tokens <= limit and lost < least:
                    demanding = tuple(i for i, step in enumerate(option.expansions) if step)
                    best = AMSKV(option.c_min, option.c_max, condensed, demanding)
                    least = lost
        if best is None:
            raise AmskvError(
                f"no AMS-KV plan holds at most {limit} tokens in {layers} layers: the smallest "
                f"holds {smallest}"
            )
        return best


@dataclass(frozen=True)
class _Option:
    """One way in which the layers can go; see ``ams.Classes`` for the expansions."""

    c_min: int
    c_max: int
    expansions: tuple[int | None, ...]


def _options(schedule: ScaleSchedule, stats: LayerStats, condensed: int) -> Iterator[_Option]:
    """Yield all ways to go with a number of condensed scales, one for each that differs."""
    locked = sum(schedule.tokens[:-1][:condensed])
    walk = partial(adaptive_walk, schedule, condensed=condensed)

    def efficient(capacity: int) -> Walk:
        return walk(c_min=capacity, c_max=capacity)

    for c_min in distinct_capacities(efficient, locked):
        overflows = efficient(c_min).overflows
        nobody: tuple[int | None, ...] = (None,) * stats.num_layers
        yield _Option(c_min, c_min, nobody)
        if not overflows:
            continue
        # All demanding layers expand at the first overflow, as ``demanding_layers`` makes them.
        step = overflows[0]
        lowest = stats.similarity[:, overflows].min(1)
        for theta in np.unique(lowest):
            expansions = tuple(step if own <= theta else None for own in lowest)
            for c_max in distinct_capacities(partial(walk, c_min, expand_at=step), c_min):
                if c_max > c_min:
                    yield _Option(c_min, c_max, expansions)


def _lost(damage: np.ndarray, held: list[list[int]]) -> float:
    """Return the damage of what one layer drops, given that of its scales, [S - 1, S + 1]."""
    stops = [
        max((step + 1 for step, scales in enumerate(held) if scale in scales), default=scale + 1)
        for scale in range(len(damage))
    ]
    return float(damage[np.arange(len(damage)), stops].sum())
