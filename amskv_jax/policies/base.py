"""What every policy is, and the budgets which they share when none is given."""

from typing import Protocol, runtime_checkable

from amskv_jax.errors import UsageError
from amskv_jax.plan.damage import BlockDamage
from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.schedule import ScaleSchedule

CONDENSED = 2
"""Coarsest scales that AMS-KV locks by default."""


class Policy(Protocol):
    """Decides what the cache keeps: a frozen dataclass whose fields are the policy's options.

    Its docstring is its help on the command line: what it keeps, the paper, its attributes. One
    that has a budget is ``Budgeted`` besides.
    """

    @property
    def uses_stats(self) -> bool:
        """Whether what is kept follows from a calibration, so that statistics are wanted."""
        return False

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan for a model; raises AmskvError if the options do not fit it."""
        ...


@runtime_checkable
class Budgeted(Protocol):
    """A policy with a budget, which "saving" and "bytes" solve for; see ``budgets``."""

    def with_budget(self, tokens: int, shape: CacheShape) -> Policy:
        """Return this policy with a budget, so that the bytes of its cache grow with it.

        Args:
          tokens: mean over the layers, from 0 to all tokens of the schedule.
          shape: of the model's cache.
        """
        ...


@runtime_checkable
class Fitted(Protocol):
    """A policy which finds its options for a size of the cache by itself."""

    def within(self, max_bytes: int, geometry: CacheGeometry) -> Policy:
        """Return this policy, told the most bytes that the cache of a whole batch may take."""
        ...


def first_third(num_layers: int) -> tuple[int, ...]:
    """Return the layers which AMS-KV's paper finds cache-demanding in VAR: the first third."""
    return tuple(range(-(-num_layers // 3)))


def default_capacities(schedule: ScaleSchedule, condensed: int = CONDENSED) -> tuple[int, int]:
    """Return the default C_min and C_max in tokens.

    They hold what the last step finds of the condensed scales and of one (C_min) or three (C_max)
    local scales before it.
    """
    last = schedule.num_scales - 1

    def capacity(local: int) -> int:
        kept = set(range(condensed)) | set(range(last - local, last))
        return sum(schedule.tokens[scale] for scale in kept if 0 <= scale < last)

    return capacity(1), capacity(3)


def default_budget(shape: CacheShape) -> int:
    """Return the mean tokens per layer of the default AMS-KV plan, the budget of the baselines."""
    c_min, c_max = default_capacities(shape.schedule)
    demanding = len(first_third(shape.num_layers))
    return round((demanding * c_max + (shape.num_layers - demanding) * c_min) / shape.num_layers)


def measured_damage(policy: str, shape: CacheShape, stats: LayerStats | None) -> BlockDamage:
    """Return what calibration on real pictures measured, for the policy of that name.

    Raises:
      UsageError: if there is nothing of it.
      AmskvError: if the statistics are of another model.
    """
    if stats is None or stats.damage is None:
        raise UsageError(
            f"the {policy} policy needs the damage that the loss of every block does: give the "
            "file which `amskv calibrate --real PICTURES` writes"
        )
    stats.check(shape)
    return stats.damage
