"""The full cache."""

from dataclasses import dataclass

from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import StaticRow
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Keeps every scale that a later one can see (VAR, arXiv 2404.02905)."""

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        schedule = shape.schedule
        row = StaticRow.from_scales(schedule, [range(i) for i in range(schedule.num_scales)])
        return RetentionPlan(schedule, (row,) * shape.num_layers, "full cache")
