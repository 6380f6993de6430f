"""Giving every policy the same memory: options solved for a saving."""

from collections.abc import Callable
from dataclasses import dataclass

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.ams import AMSKV
from amskv_jax.policies.base import Policy
from amskv_jax.policies.full import Full
from amskv_jax.policies.h2o import H2O
from amskv_jax.policies.heads import Heads
from amskv_jax.policies.scalekv import ScaleKV
from amskv_jax.policies.window import Sink, Window

HEAD_PATTERNS = 4
"""Most sets of scales among the heads: each is an attention call, and more compile for minutes."""

BUDGETED: dict[str, Callable[[int], Policy]] = {
    "window": lambda budget: Window(window=budget),
    "sink": lambda budget: Sink(window=max(0, budget - Sink.sink)),
    "h2o": lambda budget: H2O(budget=budget),
    "scalekv": lambda budget: ScaleKV(budget=budget),
    "heads": lambda budget: Heads(budget=budget, patterns=HEAD_PATTERNS),
}
"""Policies whose budget is a number of tokens."""


DEFAULTS: dict[str, Policy] = {
    "full": Full(),
    "ams": AMSKV(),
    "window": Window(),
    "sink": Sink(),
    "h2o": H2O(),
    "scalekv": ScaleKV(),
    "heads": Heads(patterns=HEAD_PATTERNS),
}


def memory_report(plan: RetentionPlan, shape: CacheShape, dtype: str = "bfloat16") -> MemoryReport:
    """Return the bytes of a plan's cache for one picture with guidance."""
    return MemoryReport.of(plan, CacheGeometry.of(shape, 1, dtype))


def policy_for_saving(
    make: Callable[[int], Policy],
    saving: float,
    shape: CacheShape,
    stats: LayerStats | None = None,
) -> Policy:
    """Return the policy with the largest budget whose cache saves at least ``saving``.

    Bytes as they are allocated decide, scores included, not the tokens a policy means to keep.

    Args:
      make: returns the policy with a budget in tokens per layer; its bytes grow with the budget.
      saving: share of a bfloat16 cache of all scales, 0 to 1.
      shape: of the model's cache.
      stats: calibration, for policies that use it.

    Raises:
      AmskvError: if no budget saves so much, or the policy refuses every budget that does.
    """

    def fits(budget: int) -> bool:
        plan = make(budget).plan(shape, stats)
        report = memory_report(plan, shape)
        return report.saving(report.full) >= saving

    low, high, refusal = -1, shape.schedule.total, None
    while high - low > 1:
        middle = (low + high) // 2
        try:
            enough = fits(middle)
        except AmskvError as error:  # budgets too small for what the policy protects
            enough, refusal = True, error
        low, high = (middle, high) if enough else (low, middle)
    try:
        if low >= 0 and fits(low):
            return make(low)
    except AmskvError as error:
        refusal = error
    raise AmskvError(f"no budget saves {saving:.1%}" + (f": {refusal}" if refusal else ""))


@dataclass(frozen=True)
class PolicyRequest:
    """A policy and, if one is asked for, what it shall save: "full", "ams", "ams:0.787".

    Attributes:
      name: of the policy.
      saving: share of a bfloat16 cache of all scales; None takes the policy's defaults.
    """

    name: str
    saving: float | None = None

    @classmethod
    def parse(cls, text: str) -> "PolicyRequest":
        """Read what was asked for.

        Raises:
          UsageError: if there is no such policy, or the saving is no share.
        """
        name, _, share = text.strip().partition(":")
        if name not in DEFAULTS:
            raise UsageError(f"unknown policy {name!r}: expected {', '.join(DEFAULTS)}")
        if not share:
            return cls(name)
        try:
            saving = float(share)
        except ValueError:
            saving = -1.0
        if name == "full" or not 0 <= saving < 1:
            raise UsageError(
                f"{text!r}: expected a policy other than full and a saving from 0 to 1, such as "
                "ams:0.787"
            )
        return cls(name, saving)

    def __str__(self) -> str:
        return self.name if self.saving is None else f"{self.name}-{100 * self.saving:g}%"

    @property
    def needs_stats(self) -> bool:
        """Whether the policy follows from a calibration."""
        return self.name in ("ams", "scalekv", "heads")

    def policy(self, shape: CacheShape, stats: LayerStats | None) -> Policy:
        """Return the policy; raises AmskvError if it cannot save so much."""
        if self.saving is None:
            return DEFAULTS[self.name]
        if self.name == "ams":
            return AMSKV(target_saving=self.saving)
        return policy_for_saving(BUDGETED[self.name], self.saving, shape, stats)
