"""What the study compares: arms (a plan and a dtype), in sections, and their order."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import StaticRow
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.ams import AMSKV
from amskv_jax.policies.base import CONDENSED, Policy
from amskv_jax.policies.budgets import BUDGETED, policy_for_saving
from amskv_jax.policies.full import Full
from amskv_jax.policies.theta import automatic_theta
from amskv_jax.policies.walk import adaptive_walk
from amskv_jax.schedule import ScaleSchedule

SECTIONS = "cdabfeg"
"""Sections in the order of their importance; the full cache comes before them all."""
NOISY_SECTIONS = "cdb"
"""Sections of which every seed is drawn before the less important sections begin."""
AMS_SAVINGS = (0.70, 0.787, 0.848, 0.90)
POLICY_SAVINGS = (0.50, 0.75, 0.85)


@dataclass(frozen=True)
class Arm:
    """One way of caching that the study looks at.

    Attributes:
      section: "full" or a letter, see the issue of the paper's tables in ``render``.
      label: what tells it from the others of its section.
      policy: name of the policy.
      plan: what the cache keeps.
      dtype: of weights, products and cache.
    """

    section: str
    label: str
    policy: str
    plan: RetentionPlan
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Name on the command line and in the results."""
        return cell_name(self.section, self.label)


@dataclass(frozen=True)
class Impossible:
    """An arm that cannot be: its name and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Cell:
    """An arm drawn with one seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Name in the results."""
        return f"{self.arm.name}/seed{self.seed}"


def cell_name(section: str, label: str) -> str:
    """Return the name of an arm: "d/h2o-50%"."""
    return f"{section}/{re.sub(r'[^A-Za-z0-9.%_]+', '-', label)}"


def order_cells(arms: Iterable[Arm], seeds: tuple[int, ...]) -> list[Cell]:
    """Return all arms with all seeds, the most important first.

    First the full cache with every seed, then the sections in their order, those which compare
    policies with every seed, the others with the first; last the other seeds of the others.
    """

    def importance(cell: Cell) -> tuple[bool, int, int]:
        section, position = cell.arm.section, seeds.index(cell.seed)
        late = section not in (*NOISY_SECTIONS, "full") and position > 0
        return late, SECTIONS.find(section), position

    return sorted((Cell(arm, seed) for arm in arms for seed in seeds), key=importance)


def full_arm(shape: CacheShape, dtype: str = "bfloat16") -> Arm:
    """Return the arm with which all others are compared."""
    return Arm("full", "full", "full", Full().plan(shape), dtype)


def study_arms(
    shape: CacheShape, stats: LayerStats, sections: str, dtype: str = "bfloat16"
) -> tuple[list[Arm], list[Impossible]]:
    """Return the arms of the sections, the full cache first, and those that cannot be.

    Args:
      shape: of the model's cache.
      stats: its calibration.
      sections: letters out of "abcdefg".
      dtype: of all arms but those of section g.

    Raises:
      UsageError: if there is no such section.
    """
    unknown = set(sections) - set(SECTIONS)
    if unknown or not sections:
        raise UsageError(f"unknown sections {sections!r}: expected letters out of a-g")
    builder = _Builder(shape, stats, dtype)
    for section in SECTIONS:
        if section in sections:
            getattr(builder, f"section_{section}")()
    return [full_arm(shape, dtype), *builder.arms], builder.impossible


class _Builder:
    """Collects arms; what cannot be planned for this model is noted with its reason."""

    def __init__(self, shape: CacheShape, stats: LayerStats, dtype: str) -> None:
        self.shape, self.stats, self.dtype = shape, stats, dtype
        self.arms: list[Arm] = []
        self.impossible: list[Impossible] = []

    def add(
        self, section: str, label: str, name: str, policy: Policy | Callable[[], Policy]
    ) -> None:
        if any(cell_name(section, label) == arm.name for arm in self.arms):
            return  # schedules of few scales leave few choices
        try:
            made = policy() if callable(policy) else policy
            plan = made.plan(self.shape, self.stats)
        except AmskvError as error:
            self.impossible.append(Impossible(cell_name(section, label), str(error)))
            return
        self.arms.append(Arm(section, label, name, plan, self.dtype))

    def _lowest_similarity(self, c_min: int) -> np.ndarray:
        """Return per layer the lowest similarity of the scales that C_min has no room for."""
        overflows = adaptive_walk(self.shape.schedule, c_min, c_min, CONDENSED).overflows
        lowest: np.ndarray = self.stats.similarity[:, overflows].min(1, initial=np.inf)
        return lowest

    def section_a(self) -> None:
        """Dropping condensed, intermediate or local scales: equal numbers, then equal tokens."""
        schedule, last = self.shape.schedule, self.shape.schedule.num_scales - 1
        third = last // 3
        for count in sorted({1, third} - {0}):
            drops = {
                "condensed": range(count),
                "intermediate": range(last - third - count, last - third),
                "local": range(last - count, last),
            }
            for kind, dropped_scales in drops.items():
                self.add("a", f"drop {count} {kind}", "explicit", DropScales(tuple(dropped_scales)))
        # Sets of about as many tokens as the coarse two thirds of the scales.
        coarse = tuple(range(last - third))
        tokens = sum(schedule.tokens[scale] for scale in coarse)
        nearest = min(range(last), key=lambda scale: abs(schedule.tokens[scale] - tokens))
        mixed = tuple(range(2, last - 2, 2))
        for scales in filter(None, (coarse, mixed, (nearest,))):
            dropped = sum(schedule.tokens[scale] for scale in scales)
            label = f"drop {dropped} tokens of scales {' '.join(map(str, scales))}"
            self.add("a", label, "explicit", DropScales(scales))

    def section_b(self) -> None:
        """S1 (uniform), S2 (by similarity), and S2 upside down, at the same sum of capacities."""
        ladder = capacities(self.shape.schedule)
        for low, high in ((2, 4), (1, 3), (1, 5)):
            c_min, c_max = ladder[min(low, len(ladder) - 1)], ladder[min(high, len(ladder) - 1)]
            similar = AMSKV(c_min=c_min, c_max=c_max)
            uniform = replace(similar, allocation="uniform")
            lowest = self._lowest_similarity(c_min)
            demanding = int((lowest < automatic_theta(lowest)[0]).sum())
            wrong = tuple(sorted(int(i) for i in np.argsort(-lowest, kind="stable")[:demanding]))
            upside_down = replace(similar, demanding_layers=wrong)
            for name, policy in (
                ("S1 uniform", uniform),
                ("S2 by similarity", similar),
                ("S2 upside down", upside_down),
            ):
                self.add("b", f"{name} {c_min} {c_max}", "ams", policy)

    def section_c(self) -> None:
        """AMS-KV at the paper's savings."""
        for saving in AMS_SAVINGS:
            self.add("c", f"ams {saving:.1%}", "ams", AMSKV(target_saving=saving))

    def section_d(self) -> None:
        """All policies at equal savings."""
        for saving in POLICY_SAVINGS:
            self.add("d", f"ams {saving:.0%}", "ams", AMSKV(target_saving=saving))
            for name, make in BUDGETED.items():
                solve = partial(policy_for_saving, make, saving, self.shape, self.stats)
                self.add("d", f"{name} {saving:.0%}", name, solve)

    def section_e(self) -> None:
        """C_min against C_max."""
        ladder = capacities(self.shape.schedule)
        for c_min in ladder[:4]:
            for c_max in ladder[2:6]:
                if c_max >= c_min:
                    policy = AMSKV(c_min=c_min, c_max=c_max)
                    self.add("e", f"C_min {c_min} C_max {c_max}", "ams", policy)

    def section_f(self) -> None:
        """Automatic theta against thetas that make 0, 1/6, ... all layers demanding."""
        depth = self.shape.num_layers
        ladder = capacities(self.shape.schedule)
        base = AMSKV(c_min=ladder[min(2, len(ladder) - 1)], c_max=ladder[-2:][0])
        assert base.c_min is not None
        lowest = np.sort(self._lowest_similarity(base.c_min))
        thetas = [lowest[0] - 1, *(lowest[:-1] + lowest[1:]) / 2, lowest[-1] + 1]
        self.add("f", "automatic theta", "ams", base)
        for count in sorted({round(share * depth / 6) for share in range(7)}):
            label = f"{count} demanding layers"
            self.add("f", label, "ams", replace(base, theta=float(thetas[count])))

    def section_g(self) -> None:
        """The other type of numbers, for the full cache and AMS-KV."""
        own, other = self.dtype, "float32" if self.dtype == "bfloat16" else "bfloat16"
        self.dtype = other
        self.add("g", f"full {other}", "full", Full())
        self.add("g", f"ams 78.7% {other}", "ams", AMSKV(target_saving=0.787))
        self.dtype = own


@dataclass(frozen=True)
class DropScales:
    """The policy that never caches these scales, and keeps all others to the end."""

    scales: tuple[int, ...]

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        schedule = shape.schedule
        kept = [j for j in range(schedule.num_scales) if j not in self.scales]
        held = [[j for j in kept if j < i] for i in range(schedule.num_scales)]
        row = StaticRow.from_scales(schedule, held)
        note = f"never caches the scales {', '.join(map(str, self.scales))}"
        return RetentionPlan(schedule, (row,) * shape.num_layers, note)


def capacities(schedule: ScaleSchedule) -> list[int]:
    """Return capacities that make a difference, ascending.

    The condensed scales and one of the four latest scales that are stored, then the condensed
    scales and the latest two, the latest three, and all.
    """
    return sorted(set(_capacities(schedule)))


def _capacities(schedule: ScaleSchedule) -> Iterator[int]:
    stored = schedule.tokens[:-1]
    condensed, later = stored[:CONDENSED], stored[CONDENSED:]
    for tokens in later[-4:]:
        yield sum(condensed) + tokens
    for count in (2, 3, len(later)):
        yield sum(condensed) + sum(later[max(0, len(later) - count) :])
