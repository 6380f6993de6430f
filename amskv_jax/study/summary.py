"""Results of a study, gathered by arm: means over seeds, and how far seeds lie apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from amskv_jax.evaluation.results import Record
from amskv_jax.study.arms import FULL

ALLOWED_LOSS = 0.01
"""Most by which the Frechet distance may grow for a saving to count as free."""


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
      name: of the arm, see ``Arm``.
      label: see ``Arm``.
      policy: see ``Arm``.
      facts: see ``Arm``.
      note: how its plan was made.
      saving: share of a cache of all scales that it saves.
      cache_bytes: of the cache for one picture with guidance.
      records: one per seed, at least one.
    """

    name: str
    label: str
    policy: str
    facts: Mapping[str, Any]
    note: str
    saving: float
    cache_bytes: int
    records: tuple[Record, ...]

    @classmethod
    def of(cls, records: Sequence[Record]) -> "ArmResult":
        """Return what the records of one arm say."""
        names = "label", "policy", "facts", "note", "saving", "cache_bytes"
        own = {name: records[0][name] for name in names}
        return cls(records[0]["name"].rpartition("/")[0], records=tuple(records), **own)

    def figure(self, name: str) -> Spread | None:
        """Return a figure over all seeds; None if it is not defined."""
        values = [r[name] for r in self.records if r.get(name) is not None]
        if not values:
            return None
        return Spread(float(np.mean(values)), float(np.ptp(values)) / 2, len(values))

    @property
    def distance(self) -> Spread:
        """The Frechet distance, which every cell has."""
        spread = self.figure("frechet_distance")
        assert spread is not None
        return spread


@dataclass(frozen=True, eq=False)
class StudyResults:
    """All results of a study.

    Attributes:
      records: the finished cells.
      asked: names of all cells that the study was asked for.
      settings: what the cells have in common.
    """

    records: tuple[Record, ...]
    asked: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def arms(self) -> dict[str, list[ArmResult]]:
        """Section -> its arms, in the order of the study, their cells in the order of the seeds."""
        groups: dict[str, dict[str, list[Record]]] = {}
        cells = [record for record in self.records if "seed" in record]
        for record in sorted(cells, key=lambda cell: (cell["position"], cell["seed"])):
            section = groups.setdefault(record["section"], {})
            section.setdefault(record["label"], []).append(record)
        return {
            section: [ArmResult.of(own) for own in labels.values()]
            for section, labels in groups.items()
        }

    @property
    def full(self) -> ArmResult:
        """The full cache."""
        return self.arms[FULL][0]

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

    def all_arms(self, sections: Iterable[str]) -> list[ArmResult]:
        """Return the arms of several sections."""
        return [arm for section in sections for arm in self.arms.get(section, [])]

    @property
    def noise(self) -> float | None:
        """Largest distance of two seeds' Frechet distance of one arm, as a share; None if unknown.

        Over all arms with several seeds, the full cache's pictures among them.
        """
        spreads = [arm.distance for arm in self.all_arms(self.arms)]
        return max((2 * s.half / s.mean for s in spreads if s.count > 1), default=None)

    def excess(self, arm: ArmResult) -> float:
        """Return how much larger its Frechet distance is than the full cache's of the same seeds.

        As a share of the latter, averaged over the seeds which both have.
        """
        name = "frechet_distance"
        full = {r["seed"]: r[name] for r in self.full.records}
        shares = [r[name] / full[r["seed"]] - 1 for r in arm.records if r["seed"] in full]
        return float(np.mean(shares)) if shares else float("nan")

    def change(self, arm: ArmResult) -> str:
        """Return its excess in words: "+1.2%"."""
        return f"{self.excess(arm):+.1%}"

    def by_harm(self, arms: Iterable[ArmResult]) -> list[ArmResult]:
        """Return arms in the order of their excess, the lowest first."""
        return sorted(arms, key=self.excess)

    def listed(self, arms: Iterable[ArmResult]) -> str:
        """Return arms with their excess: "ams 50% (-2.6%), h2o 50% (-3.9%)"."""
        return ", ".join(f"{arm.label} ({self.change(arm)})" for arm in arms)

    def command(self, section: str) -> str:
        """Return the command that runs a section again."""
        conditions = self.settings["conditions"]
        seeds = sorted({r["seed"] for arm in self.arms.get(section, []) for r in arm.records})
        return (
            "amskv study run --checkpoint CHECKPOINT --real TRAINING_PICTURES --out STUDY "
            f"--sections {section} --seeds {','.join(map(str, seeds or [0, 1]))} "
            f"--num {conditions['num']} --cfg {conditions['cfg']} --top-k {conditions['top_k']} "
            f"--top-p {conditions['top_p']} --dtype {conditions['dtype']} "
            f"--calibration {conditions['calibration_pictures']}"
        )
