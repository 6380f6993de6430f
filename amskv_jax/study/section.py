"""What a section of the study is, and how its part of the report is written."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from amskv_jax.plan.shape import CacheShape
from amskv_jax.policies.base import Policy
from amskv_jax.study.arms import Arm, Choose
from amskv_jax.study.summary import ArmResult, StudyResults
from amskv_jax.study.tables import figures_table

Arms = list[ArmResult]
"""Arms of a section, as far as they were drawn."""


class Section(ABC):
    """A question of the study.

    Attributes:
      letter: by which it is called.
      title: of its part of the report.
      text: what it does, for the report.
    """

    letter: ClassVar[str]
    title: ClassVar[str]
    text: ClassVar[str]

    @abstractmethod
    def _arms(self, shape: CacheShape, dtype: str) -> Iterator[Arm]:
        """Yield its arms; of few scales some may come twice."""

    @abstractmethod
    def _finding(self, results: StudyResults, arms: Arms) -> list[str]:
        """Return sentences on its results, of one arm or more."""

    def _tables(self, results: StudyResults, arms: Arms) -> Iterator[str]:
        """Yield the tables of its results."""
        yield figures_table(results, arms)

    def arms(self, shape: CacheShape, dtype: str) -> dict[str, Arm]:
        """Return its arms by their names; ``dtype`` is that of the study.

        They do not depend on the shape's channels per head, only their plans do.
        """
        arms: dict[str, Arm] = {}
        for arm in self._arms(shape, dtype):
            arms.setdefault(arm.name, arm)
        return arms

    def finding(self, results: StudyResults) -> list[str]:
        """Return sentences on its results; none where they are missing."""
        arms = results.arms.get(self.letter, [])
        return self._finding(results, arms) if arms else []

    def report(self, results: StudyResults) -> Iterator[str]:
        """Yield the paragraphs of its part of the report."""
        letter, arms = self.letter, results.arms.get(self.letter, [])
        impossible, missing = results.impossible(letter), results.missing(letter)
        yield f"## {letter}. {self.title}"
        yield self.text
        if not arms and not impossible and not missing:
            yield "Not run yet."
        if arms:
            yield from self._tables(results, arms)
            yield "\n".join(f"- {sentence}" for sentence in self.finding(results))
        if missing:
            yield "Not run yet: " + ", ".join(f"`{name}`" for name in missing) + "."
        for name, reason in impossible:
            yield f"`{name}` cannot be: {reason}."
        yield f"`{results.command(letter)}`; one row alone by `--only {letter}/...`."
        if arms:
            yield "<details><summary>Plans</summary>"
            yield "\n".join(f"- `{arm.name}`: {arm.note}" for arm in arms)
            yield "</details>"

    def arm(
        self, dtype: str, label: str, policy: str, choose: Policy | Choose, **facts: Any
    ) -> Arm:
        """Return an arm of this section."""
        return Arm(self.letter, label, policy, choose, dtype, facts)
