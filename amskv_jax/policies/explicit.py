"""A plan from a file."""

from dataclasses import dataclass

from amskv_jax.errors import AmskvError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.stats import LayerStats
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class Explicit:
    """Keeps what a plan file says.

    Attributes:
      path: the file, see ``RetentionPlan.load``.
    """

    path: str

    def plan(
        self, schedule: ScaleSchedule, num_layers: int, stats: LayerStats | None = None
    ) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        plan = RetentionPlan.load(self.path, schedule)
        if plan.num_layers != num_layers:
            raise AmskvError(
                f"{self.path}: the plan has {plan.num_layers} layers, the model {num_layers}"
            )
        return plan
