"""A plan from a file."""

from dataclasses import dataclass

from amskv_jax.errors import AmskvError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import Policy


@dataclass(frozen=True)
class Explicit(Policy):
    """Keeps what a plan file says.

    Attributes:
      path: the file, see ``RetentionPlan.load``.
    """

    path: str

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        plan = RetentionPlan.load(self.path, shape.schedule)
        try:
            plan.check(shape)
        except AmskvError as error:
            raise AmskvError(f"{self.path}: {error}") from error
        return plan
