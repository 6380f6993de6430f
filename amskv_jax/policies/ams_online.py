"""AMS-KV as the paper runs it: every layer decides while pictures are drawn."""

from dataclasses import dataclass

from amskv_jax.errors import UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.runtime_rows import OnlineRow
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.ams import AMSKV
from amskv_jax.policies.base import CONDENSED, Policy


@dataclass(frozen=True)
class OnlineAMSKV(Policy):
    """Keeps what AMS-KV does, but finds demanding layers while drawing; saves no memory.

    Algorithm 1 of arXiv 2511.16047, run on the keys of the pictures themselves. As shapes are fixed
    beforehand, the buffers hold every scale that might be kept: for looking at decisions, not for
    saving.

    Attributes:
      c_min: tokens a cache-efficient layer reads; default: as ams has it.
      c_max: tokens a cache-demanding layer reads; default: as ams has it.
      condensed: number of coarsest scales which are locked (C_cds).
      theta: similarity below which a layer is demanding; if not given, it follows from a
        calibration, see ``automatic_theta``.

    Raises:
      UsageError: if C_max is below C_min, or an option is out of range.
    """

    c_min: int | None = None
    c_max: int | None = None
    condensed: int = CONDENSED
    theta: float | None = None

    def __post_init__(self) -> None:
        self._offline()

    @property
    def uses_stats(self) -> bool:
        """See ``Policy.uses_stats``."""
        return self.theta is None

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        if stats is not None:
            stats.check(shape)
        offline = self._offline()
        c_min, c_max = offline.capacities(shape.schedule)
        if stats is not None:
            theta, how = offline.classify(stats)[:2]
        elif self.theta is not None:
            theta, how = self.theta, f"theta {self.theta:.6g} as given"
        else:
            raise UsageError("ams-online needs theta, or the statistics of a calibration run")
        row = OnlineRow(shape.schedule.tokens, c_min, c_max, self.condensed, theta)
        note = (
            f"AMS-KV: C_min {c_min}, C_max {c_max}, condensed {self.condensed}; {how}; "
            "layers are classified while drawing"
        )
        return RetentionPlan(shape.schedule, (row,) * shape.num_layers, note)

    def _offline(self) -> AMSKV:
        """Return the policy which decides beforehand, with the same options."""
        return AMSKV(self.c_min, self.c_max, self.condensed, theta=self.theta)
