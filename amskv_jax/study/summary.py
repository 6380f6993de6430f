"""Results of a study, gathered by arm: means over seeds, and how far seeds lie apart."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.results import Record, read_cells
from amskv_jax.files import read_json_lines

FIGURES = (
    "frechet_distance",
    "score",
    "precision",
    "recall",
    "class_accuracy",
    "psnr",
    "ssim",
)


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, half the distance between the extremes, and the number of seeds."""

    mean: float
    half: float
    count: int


@dataclass(frozen=True, eq=False)
class ArmResult:
    """All finished cells of one arm.

    Attributes:
      records: one per seed, at least one.
    """

    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """Name of the arm."""
        return str(self.records[0]["name"]).rpartition("/")[0]

    @property
    def label(self) -> str:
        """What tells it from the others of its section."""
        return str(self.records[0]["label"])

    @property
    def note(self) -> str:
        """How its plan was made."""
        return str(self.records[0]["note"])

    @property
    def saving(self) -> float:
        """Share of a cache of all scales that it saves."""
        return float(self.records[0]["saving"])

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache for one picture with guidance."""
        return int(self.records[0]["cache_bytes"])

    def figure(self, name: str) -> Spread | None:
        """Return a figure over all seeds; None if it is not defined."""
        values = [r[name] for r in self.records if r.get(name) is not None]
        if not values:
            return None
        return Spread(float(np.mean(values)), float(np.ptp(values)) / 2, len(values))


@dataclass(frozen=True, eq=False)
class StudyResults:
    """All results of a study.

    Attributes:
      records: the finished cells.
      asked: names of all cells that the study was asked for.
    """

    records: tuple[Record, ...]
    asked: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> "StudyResults":
        """Read a study's folder.

        Raises:
          AmskvError: if there is no result of the full cache.
        """
        results = cls(
            tuple(read_json_lines(directory / "results.jsonl")), tuple(read_cells(directory))
        )
        if "full" not in results.arms:
            raise AmskvError(
                f"{directory} holds no result of the full cache: run the study there first"
            )
        return results

    @cached_property
    def arms(self) -> dict[str, list[ArmResult]]:
        """Section -> its arms, in the order of the study, their cells in the order of the seeds."""
        groups: dict[str, dict[str, list[Record]]] = {}
        cells = [record for record in self.records if "seed" in record]
        for record in sorted(cells, key=lambda cell: (cell["position"], cell["seed"])):
            section = groups.setdefault(record["section"], {})
            section.setdefault(record["label"], []).append(record)
        return {
            section: [ArmResult(tuple(own)) for own in labels.values()]
            for section, labels in groups.items()
        }

    @property
    def full(self) -> ArmResult:
        """The full cache."""
        return self.arms["full"][0]

    @property
    def real(self) -> Record | None:
        """Figures of held-out real pictures."""
        return next((r for r in self.records if r["section"] == "real"), None)

    def impossible(self, section: str) -> list[tuple[str, str]]:
        """Return names and reasons of the arms of a section that cannot be."""
        return [
            (r["name"], r["impossible"])
            for r in self.records
            if r["section"] == section and "impossible" in r
        ]

    def missing(self, section: str) -> list[str]:
        """Return the names of a section's cells which have no result yet."""
        finished = {record["name"] for record in self.records}
        return [n for n in self.asked if n.startswith(f"{section}/") and n not in finished]

    def excess(self, arm: ArmResult) -> float:
        """Return how much larger its Frechet distance is than the full cache's of the same seeds.

        As a share of the latter, averaged over the seeds which both have.
        """
        name = "frechet_distance"
        full = {r["seed"]: r[name] for r in self.full.records}
        shares = [r[name] / full[r["seed"]] - 1 for r in arm.records if r["seed"] in full]
        return float(np.mean(shares)) if shares else float("nan")

    def all_arms(self, sections: Iterable[str]) -> list[ArmResult]:
        """Return the arms of several sections."""
        return [arm for section in sections for arm in self.arms.get(section, [])]

    @property
    def noise(self) -> float | None:
        """Largest distance of two seeds' Frechet distance of one arm, as a share; None if unknown.

        Over all arms with several seeds, the full cache's pictures among them.
        """
        shares = [
            2 * spread.half / spread.mean
            for arm in self.all_arms(self.arms)
            if (spread := arm.figure("frechet_distance")) and spread.count > 1
        ]
        return max(shares, default=None)
