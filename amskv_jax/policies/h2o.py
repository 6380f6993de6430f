"""H2O: heavy hitters and recent tokens, chosen at run time."""

from dataclasses import dataclass, replace

from amskv_jax.errors import UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.runtime_rows import SelectingRow
from amskv_jax.plan.selectors import HeavyHitters
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import Policy, default_budget


@dataclass(frozen=True)
class H2O(Policy):
    """Keeps the tokens which received most attention so far, and the latest ones, per head.

    Heavy-hitter oracle, arXiv 2306.14048; all layers have the same budget.

    Attributes:
      budget: tokens of earlier scales per head; default: the mean of the default AMS-KV plan.
      recent: share of the budget which the latest tokens get, 0 to 1; the paper's is one half.

    Raises:
      UsageError: if a number is out of range.
    """

    budget: int | None = None
    recent: float = 0.5

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 0:
            raise UsageError(f"the budget must be 0 or more tokens, not {self.budget}")
        if not 0 <= self.recent <= 1:
            raise UsageError(f"the recent share must lie between 0 and 1, not {self.recent}")

    def with_budget(self, tokens: int, shape: CacheShape) -> Policy:
        """Return this policy with a budget; see ``Budgeted.with_budget``."""
        return replace(self, budget=tokens)

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        budget = default_budget(shape) if self.budget is None else self.budget
        recent = round(self.recent * budget)
        counts = tuple(min(budget, offset) for offset in shape.schedule.offsets[:-1])
        row = SelectingRow(counts, HeavyHitters(recent))
        note = f"H2O: {budget} tokens, the latest {recent} and {budget - recent} heavy hitters"
        return RetentionPlan(shape.schedule, (row,) * shape.num_layers, note)
