"""Giving every policy the same memory: budgets solved for a saving, or for a number of bytes."""

from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from math import floor

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import Budgeted, Fitted, Policy
from amskv_jax.words import byte_size


def memory_report(
    plan: RetentionPlan, shape: CacheShape, dtype: str = "bfloat16", rows_per_picture: int = 2
) -> MemoryReport:
    """Return the bytes of a plan's cache for one picture; see ``CacheGeometry.of``."""
    return MemoryReport.of(plan, CacheGeometry.of(shape, 1, dtype, rows_per_picture))


def has_budget(policy: Policy | type[Policy]) -> bool:
    """Return whether ``saving`` and ``within`` can solve for the policy's options."""
    kind = policy if isinstance(policy, type) else type(policy)
    return issubclass(kind, Budgeted | Fitted)


def with_saving(
    policy: Policy, saving: float, shape: CacheShape, stats: LayerStats | None = None
) -> Policy:
    """Return the policy with the largest budget whose cache saves at least ``saving``.

    Args:
      policy: its other options; it must be ``Budgeted`` or ``Fitted``.
      saving: share of a bfloat16 cache of all scales, 0 to 1.
      shape: of the model's cache.
      stats: calibration, for policies that use it.

    Raises:
      UsageError: if the policy has no budget, or it is set already.
      AmskvError: if no budget saves so much, or the policy refuses every budget that does.
    """
    if not 0 <= saving < 1:
        raise UsageError(f"the saving must be at least 0 and below 1, not {saving}")
    geometry = CacheGeometry.of(shape, 1, "bfloat16")
    full = geometry.bytes(shape.num_heads * shape.num_layers * shape.schedule.total)
    limit = floor(full * (1 - Fraction(str(float(saving)))))  # 0.9 is nine tenths, to the byte
    return _solve(policy, limit, geometry, shape, stats, f"saves {saving:.1%}")


def within_bytes(
    policy: Policy,
    max_bytes: int,
    geometry: CacheGeometry,
    shape: CacheShape,
    stats: LayerStats | None = None,
) -> Policy:
    """Return the policy with the largest budget whose cache takes at most ``max_bytes``.

    Args:
      policy: its other options; it must be ``Budgeted`` or ``Fitted``.
      max_bytes: of the cache of a whole batch.
      geometry: of this batch.
      shape: of the model's cache.
      stats: calibration, for policies that use it.

    Raises:
      UsageError: if the policy has no budget, or it is set already.
      AmskvError: if no budget takes so little, or the policy refuses every budget that does.
    """
    how = f"keeps the cache of the batch within {byte_size(max_bytes)}"
    return _solve(policy, max_bytes, geometry, shape, stats, how)


def _solve(
    policy: Policy,
    max_bytes: int,
    geometry: CacheGeometry,
    shape: CacheShape,
    stats: LayerStats | None,
    how: str,
) -> Policy:
    """Return the policy with the largest budget within ``max_bytes``; ``how`` is for the error.

    Bytes as they are allocated decide, scores included, not the tokens a policy means to keep.
    """
    if isinstance(policy, Fitted):
        fitted = policy.within(max_bytes, geometry)
        _check_unset(policy, fitted)
        return fitted
    if not isinstance(policy, Budgeted):
        raise UsageError(f"{type(policy).__name__} has no budget that could be solved for")
    _check_unset(policy, policy.with_budget(shape.schedule.total, shape))

    def fits(budget: int) -> bool:
        plan = policy.with_budget(budget, shape).plan(shape, stats)
        return MemoryReport.of(plan, geometry).plan <= max_bytes

    return policy.with_budget(_largest(fits, shape.schedule.total, how), shape)


def _largest(fits: Callable[[int], bool], stop: int, how: str) -> int:
    """Return the largest number below ``stop`` that fits, found by bisection.

    Numbers that are refused with an AmskvError, being too small for what the policy protects, lie
    below those that fit.
    """
    low, high, refusal = -1, stop, None
    while high - low > 1:
        middle = (low + high) // 2
        try:
            enough = fits(middle)
        except AmskvError as error:
            enough, refusal = True, error
        low, high = (middle, high) if enough else (low, middle)
    try:
        if low >= 0 and fits(low):
            return low
    except AmskvError as error:
        refusal = error
    raise AmskvError(f"no budget {how}" + (f": {refusal}" if refusal else ""))


def _check_unset(given: Policy, solved: Policy) -> None:
    """Raise UsageError if the option which is solved for has been given."""
    for field in fields(given):  # type: ignore[arg-type]  # policies are dataclasses
        value = getattr(given, field.name)
        if value != getattr(solved, field.name) and value != field.default:
            raise UsageError(
                f"give either {field.name} or the memory that it is to follow from, not both"
            )
