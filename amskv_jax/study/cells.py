"""The cells of a study: arms planned for a model, one cell per seed, the most important first."""

from dataclasses import dataclass

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.study.arms import FULL, Arm, full_arm
from amskv_jax.study.sections import SECTIONS

Key = tuple[RetentionPlan, str]
"""Plan and dtype: what has to be compiled once."""
IMPORTANCE = "cdabfeg"
"""The sections in the order in which they are drawn; the full cache comes before them all."""
NOISY = "cdb"
"""Sections of which every seed is drawn before the less important sections begin."""


@dataclass(frozen=True, eq=False)
class Cell:
    """An arm drawn with one seed.

    Attributes:
      arm: see there.
      plan: what its cache keeps.
      seed: of the pictures.
    """

    arm: Arm
    plan: RetentionPlan
    seed: int

    @property
    def name(self) -> str:
        """Name in the results."""
        return f"{self.arm.name}/seed{self.seed}"

    @property
    def is_full(self) -> bool:
        """Whether its pictures are those with which the others are compared."""
        return self.arm.section == FULL

    @property
    def key(self) -> Key:
        """What has to be compiled for it."""
        return self.plan, self.arm.dtype

    @property
    def signature(self) -> tuple[Key, int]:
        """Cells of equal signatures have equal pictures."""
        return self.key, self.seed


def study_arms(letters: str, shape: CacheShape, dtype: str) -> dict[str, Arm]:
    """Return the arms of some sections by their names, the full cache first, then by importance.

    Args:
      letters: of the sections.
      shape: of the model's cache; its channels per head do not matter.
      dtype: of all arms but those of section g.

    Raises:
      UsageError: if there is no such section.
    """
    if set(letters) - set(SECTIONS) or not letters:
        raise UsageError(f"unknown sections {letters!r}: expected letters out of a-g")
    arms = {(full := full_arm(dtype)).name: full}
    for letter in filter(letters.__contains__, IMPORTANCE):
        arms |= SECTIONS[letter].arms(shape, dtype)
    return arms


def plan_arms(
    arms: dict[str, Arm], shape: CacheShape, stats: LayerStats
) -> tuple[dict[str, RetentionPlan], dict[str, str]]:
    """Return the plans of arms for a model, and why the others cannot be, by their names."""
    plans, impossible = {}, {}
    for name, arm in arms.items():
        try:
            plans[name] = arm.plan(shape, stats)
        except AmskvError as error:
            impossible[name] = str(error)
    return plans, impossible


def order_cells(
    arms: dict[str, Arm], plans: dict[str, RetentionPlan], seeds: tuple[int, ...]
) -> list[Cell]:
    """Return all arms that have a plan with all seeds, the most important first.

    First the full cache with every seed, then the sections in their order, those which compare
    policies with every seed, the others with the first; last the other seeds of the others.
    """

    def importance(cell: Cell) -> tuple[bool, int, int]:
        section, position = cell.arm.section, seeds.index(cell.seed)
        late = section not in (*NOISY, FULL) and position > 0
        return late, IMPORTANCE.find(section), position

    cells = [Cell(arms[name], plan, seed) for name, plan in plans.items() for seed in seeds]
    return sorted(cells, key=importance)
