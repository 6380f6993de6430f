"""The arms of a study: ways of caching, whatever the model."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import StaticRow
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import CONDENSED, Policy
from amskv_jax.policies.full import Full
from amskv_jax.schedule import ScaleSchedule

FULL = "full"
"""Section, label and policy of the arm with which all others are compared."""
Choose = Callable[[CacheShape, LayerStats], Policy]
"""Returns the policy that suits a model's cache and its calibration."""


@dataclass(frozen=True)
class Arm:
    """One way of caching that the study looks at.

    Attributes:
      section: "full", or the letter of a section.
      label: what tells it from the others of its section.
      policy: name of the policy.
      choose: the policy, or how it follows from the model.
      dtype: of weights, products and cache.
      facts: what its section's finding knows it by; they stand in its records.
    """

    section: str
    label: str
    policy: str
    choose: Policy | Choose
    dtype: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name on the command line and in the results: "d/h2o-50%"."""
        return f"{self.section}/{re.sub(r'[^A-Za-z0-9.%_]+', '-', self.label)}"

    def plan(self, shape: CacheShape, stats: LayerStats) -> RetentionPlan:
        """Return what the cache of a model keeps; raises AmskvError if this arm cannot be."""
        policy = self.choose(shape, stats) if callable(self.choose) else self.choose
        return policy.plan(shape, stats)


def full_arm(dtype: str) -> Arm:
    """Return the arm with which all others are compared."""
    return Arm(FULL, FULL, FULL, Full(), dtype)


@dataclass(frozen=True)
class DropScales(Policy):
    """The policy that never caches these scales, and keeps all others to the end."""

    scales: tuple[int, ...]

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        schedule = shape.schedule
        kept = [j for j in range(schedule.num_scales) if j not in self.scales]
        held = [[j for j in kept if j < i] for i in range(schedule.num_scales)]
        row = StaticRow.from_scales(schedule, held)
        note = f"never caches the scales {', '.join(map(str, self.scales))}"
        return RetentionPlan(schedule, (row,) * shape.num_layers, note)


def capacities(schedule: ScaleSchedule) -> list[int]:
    """Return capacities that make a difference, ascending.

    The condensed scales and one of the four latest scales that are stored, then the condensed
    scales and the latest two, the latest three, and all.
    """
    stored = schedule.tokens[:-1]
    condensed, later = sum(stored[:CONDENSED]), stored[CONDENSED:]
    single = {condensed + tokens for tokens in later[-4:]}
    return sorted(single | {condensed + sum(later[-count:]) for count in (2, 3, len(stored))})
