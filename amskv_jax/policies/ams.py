"""AMS-KV: condensed scales locked, local scales rolling, capacity by layer."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import floor, isnan
from typing import Literal, NamedTuple

import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import StaticRow
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import CONDENSED, Policy, default_capacities, first_third
from amskv_jax.policies.theta import automatic_theta
from amskv_jax.policies.walk import adaptive_walk, distinct_capacities
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.words import number_ranges


class Classes(NamedTuple):
    """Which layers of a calibrated model are cache-demanding, and why.

    Attributes:
      theta: similarity below which a layer is demanding.
      how: a phrase on where theta comes from.
      overflows: the scales that find no room in C_min: only there similarity counts.
      lowest: lowest similarity at these scales, [layers]; infinite if there are none.
      expansions: per layer, the scale at which it gets C_max; None if it is efficient.
    """

    theta: float
    how: str
    overflows: tuple[int, ...]
    lowest: np.ndarray
    expansions: tuple[int | None, ...]

    @property
    def demanding(self) -> tuple[int, ...]:
        """The cache-demanding layers."""
        return tuple(i for i, scale in enumerate(self.expansions) if scale is not None)


@dataclass(frozen=True)
class AMSKV(Policy):
    """Keeps the condensed (coarsest) and the local (latest) scales, more in demanding layers.

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
      theta: similarity below which a layer is demanding; if not given, see ``automatic_theta``.
      saving: share to save of a cache of all scales in the same dtype, 0 to 1; the capacities which
        are not given are chosen to meet it, see ``fit``.
      max_tokens: the same, as the most tokens which all layers together may hold.
      allocation: "similarity" gives C_max to the demanding layers only (S2 in the paper's table
        2); "uniform" spreads the same sum of capacities evenly over all layers (S1). As only whole
        scales are kept, the uniform plan may hold fewer tokens than its capacity.

    Raises:
      UsageError: if C_max is below C_min, options exclude each other, or one is out of range.
    """

    c_min: int | None = None
    c_max: int | None = None
    condensed: int = CONDENSED
    demanding_layers: tuple[int, ...] | None = None
    theta: float | None = None
    saving: float | None = None
    max_tokens: int | None = None
    allocation: Literal["similarity", "uniform"] = "similarity"

    def __post_init__(self) -> None:
        if self.condensed < 0:
            raise UsageError(f"condensed must be 0 or more scales, not {self.condensed}")
        if self.demanding_layers is not None and self.theta is not None:
            raise UsageError(
                "give either the demanding layers or theta, which finds them, not both"
            )
        if self.theta is not None and isnan(self.theta):
            raise UsageError("theta must be a number, not NaN")
        if self.saving is not None and not 0 <= self.saving <= 1:
            raise UsageError(f"the saving must lie between 0 and 1, not {self.saving}")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise UsageError(f"the cache must hold 0 or more tokens, not {self.max_tokens}")
        if None not in (self.saving, self.max_tokens):
            raise UsageError("give either a saving or the most tokens or bytes to hold, not both")
        if self.allocation not in ("similarity", "uniform"):
            raise UsageError(
                f"unknown allocation {self.allocation!r}: expected similarity or uniform"
            )
        _check_capacities(self.c_min, self.c_max)

    @property
    def uses_stats(self) -> bool:
        """See ``Policy.uses_stats``."""
        return self.demanding_layers is None

    def within(self, max_bytes: int, geometry: CacheGeometry) -> Policy:
        """Return this policy with capacities that hold as many tokens as fit; see ``fit``."""
        return replace(self, max_tokens=geometry.tokens(max_bytes))

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        if stats is not None:
            stats.check(shape)
        budget = self._budget(shape)
        if budget is not None:
            max_tokens, aim = budget
            plan = self.fit(shape, max_tokens, stats).plan(shape, stats)
            return replace(plan, note=f"{plan.note}; capacities fitted to {aim}")
        schedule, num_layers = shape.schedule, shape.num_layers
        c_min, c_max = self.capacities(schedule)
        note = f"AMS-KV: C_min {c_min}, C_max {c_max}, condensed {self.condensed}"
        overflows = adaptive_walk(schedule, c_min, c_min, self.condensed).overflows
        expansions, how = self._expansions(num_layers, overflows, stats)
        note += f"; {how}"
        if self.allocation == "uniform":
            demanding = num_layers - expansions.count(None)
            total = demanding * c_max + (num_layers - demanding) * c_min
            c_min = c_max = total // num_layers
            note += f"; allocated uniformly: {c_min} tokens in every layer"
        rows = {
            step: StaticRow.from_scales(
                schedule, adaptive_walk(schedule, c_min, c_max, self.condensed, step).held
            )
            for step in set(expansions)
        }
        return RetentionPlan(schedule, tuple(rows[step] for step in expansions), note)

    def classify(self, stats: LayerStats) -> Classes:
        """Return which layers the calibrated similarities and theta make cache-demanding."""
        shape = stats.shape
        budget = self._budget(shape)
        fixed = self if budget is None else self.fit(shape, budget[0], stats)
        c_min, _ = fixed.capacities(shape.schedule)
        overflows = adaptive_walk(shape.schedule, c_min, c_min, self.condensed).overflows
        return self._classes(overflows, stats)

    def _budget(self, shape: CacheShape) -> tuple[int, str] | None:
        """Return the most tokens that all layers may hold, and a phrase on why, if that is set."""
        if self.saving is not None:
            kept = shape.schedule.total * shape.num_layers * (1 - self.saving)
            return floor(kept + 1e-6), f"save {self.saving:.1%}"
        if self.max_tokens is not None:
            return self.max_tokens, f"hold at most {self.max_tokens} tokens in all layers"
        return None

    def capacities(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """Return C_min and C_max, of which what is not given is the default or near it."""
        c_min, c_max = default_capacities(schedule, self.condensed)
        if self.c_min is not None:
            c_min, c_max = self.c_min, max(c_max, self.c_min)
        if self.c_max is not None:
            c_min, c_max = min(c_min, self.c_max) if self.c_min is None else c_min, self.c_max
        locked = self._locked_tokens(schedule)
        if c_min < locked:
            raise AmskvError(
                f"C_min is {c_min} tokens, but the {self.condensed} condensed scales need "
                f"{locked}: raise C_min or lock fewer scales"
            )
        return c_min, c_max

    def _locked_tokens(self, schedule: ScaleSchedule) -> int:
        """Return the tokens of the condensed scales, which no capacity can go below."""
        return sum(schedule.tokens[:-1][: self.condensed])

    def _classes(self, overflows: list[int], stats: LayerStats) -> Classes:
        """Classify layers that find no room for the scales ``overflows`` in C_min."""
        lowest = stats.similarity[:, overflows].min(1, initial=np.inf)
        if self.theta is None:
            theta, separation = automatic_theta(lowest)
            how = f"theta {theta:.6g} by Otsu's split (separation {separation:.2f})"
            if theta == -np.inf:
                how = "no theta, as similarity sets no layers apart"
        else:
            theta, how = self.theta, f"theta {self.theta:.6g} as given"
        expansions = tuple(
            next((scale for scale in overflows if similarity[scale] < theta), None)
            for similarity in stats.similarity
        )
        return Classes(theta, how, tuple(overflows), lowest, expansions)

    def _expansions(
        self, num_layers: int, overflows: list[int], stats: LayerStats | None
    ) -> tuple[tuple[int | None, ...], str]:
        """Return at which scale every layer gets C_max, and a sentence on how that was decided.

        A layer expands at the first scale which overflows C_min and is unlike the one before.
        """
        if self.demanding_layers is not None or (stats is None and self.theta is None):
            layers, how = self._stated_layers(num_layers)
            first = overflows[0] if overflows else None
            return tuple(first if i in layers else None for i in range(num_layers)), how
        if stats is None:
            raise UsageError("theta needs the similarities of a calibration run: give its file")
        classes = self._classes(overflows, stats)
        demanding = number_ranges(classes.demanding) or "none"
        return classes.expansions, f"calibrated, {classes.how}, demanding layers {demanding}"

    def _stated_layers(self, num_layers: int) -> tuple[tuple[int, ...], str]:
        if self.demanding_layers is None:
            layers = first_third(num_layers)
            return layers, "demanding layers: the first third, by default and not by measurement"
        layers = self.demanding_layers
        unknown = [layer for layer in layers if not 0 <= layer < num_layers]
        if unknown:
            raise AmskvError(f"demanding layers {unknown}: the model has layers 0-{num_layers - 1}")
        return layers, f"demanding layers given: {number_ranges(sorted(layers)) or 'none'}"

    def fit(self, shape: CacheShape, max_tokens: int, stats: LayerStats | None = None) -> "AMSKV":
        """Return this policy with the best capacities that ``max_tokens`` allow.

        AMS-KV keeps whole scales, so capacities lead to finitely many plans, and all are tried. The
        best one keeps the most attention: as measured or, without calibration, as if every query
        attended to all tokens alike. Capacities which are set already stay as they are; an
        automatic theta is found anew for every C_min.

        Args:
          shape: of the model's cache.
          max_tokens: most tokens that all layers together may hold.
          stats: calibration, see the class.

        Raises:
          AmskvError: if not even the smallest plan fits; it says how small that is.
          UsageError: if capacities are set for a uniform allocation, which has but one.
        """
        if self.allocation == "uniform" and (self.c_min, self.c_max) != (None, None):
            raise UsageError("a uniform allocation takes either capacities or a budget, not both")
        if stats is not None:
            stats.check(shape)
        schedule, num_layers = shape.schedule, shape.num_layers
        attention, tokens = _attention(schedule, num_layers, stats), schedule.tokens
        best, best_value, smallest = None, (-1.0, 0), schedule.total * num_layers
        for c_min in self._smaller_capacities(schedule):
            overflows = adaptive_walk(schedule, c_min, c_min, self.condensed).overflows
            expansions, _ = self._expansions(num_layers, overflows, stats)
            if self.allocation == "uniform":
                expansions = (None,) * num_layers
            # Layers that expand at the same scale go the same way, so their attention is added up.
            members = [
                (step, expansions.count(step), attention[[e == step for e in expansions]].sum(0))
                for step in set(expansions)
            ]
            for c_max in self._larger_capacities(schedule, c_min, expansions):
                kept, total = 0.0, 0
                for step, layers, worth in members:
                    held = adaptive_walk(schedule, c_min, c_max, self.condensed, step).held
                    kept += sum(
                        worth[i, scale] for i, scales in enumerate(held) for scale in scales
                    )
                    total += layers * max(sum(tokens[j] for j in scales) for scales in held)
                smallest = min(total, smallest)
                if total <= max_tokens and (kept, -total) > best_value:
                    best = replace(self, c_min=c_min, c_max=c_max, saving=None, max_tokens=None)
                    best_value = kept, -total
        if best is None:
            everything = schedule.total * num_layers
            given = {"C_min": self.c_min, "C_max": self.c_max, "condensed": self.condensed}
            options = [f"{name} {value}" for name, value in given.items() if value is not None]
            raise AmskvError(
                f"no AMS-KV plan holds at most {max_tokens} tokens in {num_layers} layers: "
                f"the smallest with {', '.join(options)} holds {smallest} "
                f"({1 - smallest / everything:.1%} saved of the full cache of all scales)"
            )
        return best

    def _smaller_capacities(self, schedule: ScaleSchedule) -> Iterable[int]:
        """Return one C_min for every way in which a layer can go as long as it is efficient."""
        if self.c_min is not None:
            return [self.c_min]
        start = self._locked_tokens(schedule)
        walk = partial(adaptive_walk, schedule, condensed=self.condensed)
        return distinct_capacities(lambda capacity: walk(c_min=capacity, c_max=capacity), start)

    def _larger_capacities(
        self, schedule: ScaleSchedule, c_min: int, expansions: Iterable[int | None]
    ) -> Iterable[int]:
        """Return one C_max for every set of ways in which the demanding layers can go."""
        if self.c_max is not None:
            return [self.c_max] if self.c_max >= c_min else []
        found = {c_min}
        for step in set(expansions) - {None}:
            walk = partial(adaptive_walk, schedule, c_min, condensed=self.condensed, expand_at=step)
            found.update(distinct_capacities(walk, c_min))
        return sorted(found)


def _attention(schedule: ScaleSchedule, num_layers: int, stats: LayerStats | None) -> np.ndarray:
    """Return how much attention all queries of one scale give to another, [layers, S, S]."""
    tokens = np.array(schedule.tokens)
    if stats is not None:
        return stats.density * tokens[:, None]
    even = np.outer(tokens / np.cumsum(tokens), tokens)
    return np.broadcast_to(even, (num_layers, *even.shape))


def _check_capacities(c_min: int | None, c_max: int | None) -> None:
    for name, capacity in (("C_min", c_min), ("C_max", c_max)):
        if capacity is not None and capacity < 0:
            raise UsageError(f"{name} must be 0 or more tokens, not {capacity}")
    if c_min is not None and c_max is not None and c_max < c_min:
        raise UsageError(
            f"C_max ({c_max} tokens) is below C_min ({c_min}): it is the larger budget"
        )
