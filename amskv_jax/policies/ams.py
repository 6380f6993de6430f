"""AMS-KV: condensed scales locked, local scales rolling, capacity by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan import RetentionPlan, StaticRow
from amskv_jax.policies.base import CONDENSED, default_capacities, first_third
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.stats import LayerStats


@dataclass(frozen=True)
class AMSKV:
    """Keeps the condensed (coarsest) and the local (latest) scales, more of them in demanding layers.

    Adaptive multi-scale KV caching, arXiv 2511.16047. A layer starts with C_min tokens. When a
    scale no longer fits and is unlike the one before (similarity below theta), the layer is
    cache-demanding and gets C_max. The oldest scales that are not condensed make room.

    Attributes:
      c_min: tokens a cache-efficient layer holds; default: the condensed scales and the last but
        one.
      c_max: tokens a cache-demanding layer holds; default: two more local scales.
      condensed: number of coarsest scales which are locked (C_cds).
      demanding_layers: the cache-demanding layers; if not given, they follow from the calibrated
        similarities and ``theta``, and without those the first third of the layers is taken.
      theta: similarity below which a layer is demanding.

    Raises:
      UsageError: if C_max is below C_min, or layers and theta are both given.
    """

    c_min: int | None = None
    c_max: int | None = None
    condensed: int = CONDENSED
    demanding_layers: tuple[int, ...] | None = None
    theta: float | None = None

    def __post_init__(self) -> None:
        if self.condensed < 0:
            raise UsageError(f"condensed must be 0 or more scales, not {self.condensed}")
        if self.demanding_layers is not None and self.theta is not None:
            raise UsageError(
                "give either the demanding layers or theta, which finds them, not both"
            )
        _check_capacities(self.c_min, self.c_max)

    def plan(
        self, schedule: ScaleSchedule, num_layers: int, stats: LayerStats | None = None
    ) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        default_min, default_max = default_capacities(schedule, self.condensed)
        c_min = (
            self.c_min if self.c_min is not None else min(default_min, self.c_max or default_min)
        )
        c_max = self.c_max if self.c_max is not None else max(default_max, c_min)
        _check_capacities(c_min, c_max)
        locked = sum(schedule.tokens[: self.condensed])
        if c_min < locked:
            raise AmskvError(
                f"C_min is {c_min} tokens, but the {self.condensed} condensed scales need {locked}: "
                "raise C_min or lock fewer scales"
            )
        similarity, theta, how = self._similarities(schedule, num_layers, stats)
        rows = tuple(
            StaticRow.from_scales(
                schedule, adaptive_walk(schedule, c_min, c_max, self.condensed, layer, theta)
            )
            for layer in similarity
        )
        note = f"AMS-KV: C_min {c_min}, C_max {c_max}, condensed {self.condensed}; {how}"
        return RetentionPlan(schedule, rows, note)

    def _similarities(
        self, schedule: ScaleSchedule, num_layers: int, stats: LayerStats | None
    ) -> tuple[Sequence[Sequence[float]], float, str]:
        """Return similarities [layer][scale], theta, and a sentence on where they come from."""
        if self.theta is not None:
            if stats is None:
                raise UsageError("theta needs the similarities of a calibration run: give its file")
            return stats.similarity.tolist(), self.theta, f"calibrated, theta {self.theta:g}"
        layers = self.demanding_layers
        how = "demanding layers given"
        if layers is None:
            layers = first_third(num_layers)
            how = "demanding layers: the first third, by default and not by measurement"
        unknown = [layer for layer in layers if not 0 <= layer < num_layers]
        if unknown:
            raise AmskvError(f"demanding layers {unknown}: the model has layers 0-{num_layers - 1}")
        extremes = [-math.inf if layer in layers else math.inf for layer in range(num_layers)]
        return [[x] * schedule.num_scales for x in extremes], 0.0, how


def adaptive_walk(
    schedule: ScaleSchedule,
    c_min: int,
    c_max: int,
    condensed: int,
    similarity: Sequence[float],
    theta: float,
) -> list[list[int]]:
    """Walk one layer through the scales (Algorithm 1 of arXiv 2511.16047).

    Args:
      schedule: the scales.
      c_min: tokens at first.
      c_max: tokens once the layer has proved demanding.
      condensed: scales below this id are never evicted.
      similarity: per scale, to the scale before.
      theta: below it, a layer that overflows is demanding.

    Returns:
      The scale ids which the cache holds when each step attends.
    """
    budget, cached = c_min, list[int]()
    held = [[]]
    for scale, size in enumerate(schedule.tokens[:-1]):
        used = sum(schedule.tokens[j] for j in cached)
        if used + size > budget and scale >= 1 and similarity[scale] < theta:
            budget = c_max
        locked = sum(schedule.tokens[j] for j in cached if j < condensed)
        if locked + size <= budget:
            while used + size > budget:
                oldest = next(j for j in cached if j >= condensed)
                cached.remove(oldest)
                used -= schedule.tokens[oldest]
            cached.append(scale)
        held.append(list(cached))
    return held


def _check_capacities(c_min: int | None, c_max: int | None) -> None:
    for name, capacity in (("C_min", c_min), ("C_max", c_max)):
        if capacity is not None and capacity < 0:
            raise UsageError(f"{name} must be 0 or more tokens, not {capacity}")
    if c_min is not None and c_max is not None and c_max < c_min:
        raise UsageError(
            f"C_max ({c_max} tokens) is below C_min ({c_min}): it is the larger budget"
        )
