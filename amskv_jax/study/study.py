"""The study: every policy's pictures measured, cell by cell, resumable after any interruption.

A study lives in one directory: ``settings.json``, ``stats.npz`` (the calibration), ``cells.json``
(the names of all cells it was asked for), ``results.jsonl`` (a line per finished cell),
``samples.npz`` (a few pictures of the first seed's cells) and ``originals-*.npz`` (the full cache's
pictures, drawn again if they are missing).
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.comparison import Comparison, open_folder
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.results import Record, add_cells, read_arrays, write_arrays
from amskv_jax.pipeline import Pipeline
from amskv_jax.study.cells import Cell, Key, order_cells, plan_arms, study_arms
from amskv_jax.study.devices import FAILURES, Compiler, Program, run_on_devices


@dataclass(frozen=True)
class Extent:
    """Which cells to run, and how; may change from call to call.

    Attributes:
      sections: letters out of "abcdefg".
      seeds: the first is every section's.
      batch: pictures drawn at once.
      compilers: programs compiled at the same time; what they draw comes before the next ones.
      stop_after: seconds after which no further cell begins, and nothing more is compiled.
      only: run only cells whose names contain this text; the full cache is always run.
      attention: back end.
    """

    sections: str = "abcdefg"
    seeds: tuple[int, ...] = (0, 1)
    batch: int = 500
    compilers: int = 6
    stop_after: float = float("inf")
    only: str = ""
    attention: Implementation = "auto"


Group = list[Cell]
"""Cells of one signature."""
Result = TypeVar("Result")


def run_study(
    comparison: Comparison,
    extent: Extent,
    load: Callable[[str], Pipeline],
    judge: Judge,
    directory: Path | str,
    *,
    held_out: np.ndarray | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> list[Cell]:
    """Run all cells which have no result yet, the most important first.

    Programs are compiled a few at a time, in turn for all local devices, which then draw and
    measure side by side, see ``devices``. Cells with equal plans, dtype and seed are drawn once.
    The full cache's pictures of a seed come before all others of the seed, which are compared with
    them.

    Args:
      comparison: see there.
      extent: see there.
      load: returns the model with weights of a dtype, on the default device.
      judge: measures the pictures.
      directory: of the study; created if missing.
      held_out: real pictures uint8 [N, H, W, 3] which the judge does not know, measured like a
        cell: what a perfect model would get.
      report: takes a line about every cell.

    Returns:
      The cells that were not run for lack of time.

    Raises:
      UsageError: if the directory holds a study under other conditions, a section is unknown, or
        there are fewer pictures than features.
      AmskvError: if some cells failed; all others are done then.
    """
    deadline = time.monotonic() + extent.stop_after
    study = _Study(comparison, extent, load, judge, Path(directory), report)
    if held_out is not None:
        study.measure_real(held_out)
    return study.run(deadline)


class _Study:
    def __init__(
        self,
        comparison: Comparison,
        extent: Extent,
        load: Callable[[str], Pipeline],
        judge: Judge,
        directory: Path,
        report: Callable[[str], object],
    ) -> None:
        self.comparison, self.extent = comparison, extent
        self.judge, self.directory, self.report = judge, directory, report
        self.model = load(comparison.dtype)
        self.results = open_folder(directory, comparison, self.model, judge)
        self.samples = read_arrays(directory / "samples.npz")
        self.samples["classes"] = np.array(self.model.classes, str)
        self.drawing = comparison.drawing(self.model)
        self.compiler = Compiler(self.model, load, self.drawing, extent.attention, extent.batch)
        self.classes = self.model.conditions(None)
        self.positions: dict[str, int] = {}
        self.originals: dict[int, np.ndarray] = {}
        self.lost: dict[int, Exception] = {}
        self.failures: dict[str, str] = {}
        self.writing = threading.Lock()

    def measure_real(self, pixels: np.ndarray) -> None:
        """Measure real pictures; their labels are not known here, so no class accuracy."""
        name = "real/held-out"
        if name not in self.results.records:
            figures = self.judge.figures(pixels, None)
            self.results.add({"name": name, "section": "real", "num": len(pixels), **figures})

    def run(self, deadline: float) -> list[Cell]:
        """Run cells until all are done or time is up."""
        cells = self._cells()
        groups = self._groups(cells)
        keys = list(dict.fromkeys(group[0].key for group in groups))
        for first in range(0, len(keys), self.extent.compilers):
            if time.monotonic() >= deadline or (self.lost and not self.originals):
                break
            programs = self.compiler.compile(keys[first : first + self.extent.compilers])
            own = [group for group in groups if group[0].key in programs]
            for of_full in (True, False):
                chosen = [group for group in own if group[0].is_full == of_full]
                self._run(chosen, programs, deadline)
        for group in groups:
            if not group[0].is_full and group[0].seed in self.lost:
                self._fail(group, self.lost[group[0].seed])
        if self.failures:
            lines = "".join(f"\n  {name}: {error}" for name, error in self.failures.items())
            raise AmskvError(f"{len(self.failures)} cells failed:{lines}")
        return [cell for cell in cells if cell.name not in self.results.records]

    def _cells(self) -> list[Cell]:
        """Return all cells that were asked for, and note those that cannot be."""
        extent = self.extent
        stats = self.comparison.stats(self.directory / "stats.npz", self.model, self.report)
        arms = study_arms(extent.sections, self.model.shape, self.comparison.dtype)
        plans, impossible = plan_arms(arms, self.model.shape, stats)
        for name, reason in impossible.items():
            if name not in self.results.records:
                section = arms[name].section
                self.results.add({"name": name, "section": section, "impossible": reason})
                self.report(f"{name} is impossible: {reason}")
        members: dict[str, int] = {}
        for name in plans:
            section = arms[name].section
            self.positions[name] = members[section] = members.get(section, -1) + 1
        cells = order_cells(arms, plans, extent.seeds)
        cells = [cell for cell in cells if extent.only in cell.name or cell.is_full]
        add_cells(self.directory, (cell.name for cell in cells))
        return cells

    def _groups(self, cells: Sequence[Cell]) -> list[Group]:
        """Return the cells to run, those with equal pictures together, the most important first.

        These are the cells without a result, and the full cache's whose pictures are lost.
        """
        records = self.results.records
        done = {cell.signature: records[cell.name] for cell in cells if cell.name in records}
        missing = [cell for cell in cells if cell.name not in records]
        self.number, self.total = 0, len(missing)
        groups: dict[tuple[Key, int], Group] = {}
        for cell in missing:
            if twin := done.get(cell.signature):
                self._finish(cell, self._copy(cell, twin), time.monotonic())
            else:
                groups.setdefault(cell.signature, []).append(cell)
        lost, full = [], {cell.seed: cell for cell in cells if cell.is_full}
        for seed in dict.fromkeys(seed for _, seed in groups):
            pixels = read_arrays(self._originals_path(seed)).get("arr_0")
            if pixels is not None:
                self.originals[seed] = pixels
            elif full[seed].name in records:
                lost.append([full[seed]])
        return [*lost, *groups.values()]

    def _run(
        self, groups: list[Group], programs: dict[Key, Program | Exception], deadline: float
    ) -> None:
        tasks = []
        for group in groups:
            program = programs[group[0].key]
            if isinstance(program, Program):
                tasks.append((program.device, partial(self._run_one, group, program, deadline)))
            else:
                self._fail(group, program)
        run_on_devices(tasks)

    def _run_one(self, group: Group, program: Program, deadline: float) -> None:
        """Draw and measure the pictures of a group, in the thread of its device."""
        cell, start = group[0], time.monotonic()
        if start >= deadline or not (cell.is_full or cell.seed in self.originals):
            return
        pixels = self.originals.get(cell.seed) if cell.is_full else None
        if pixels is None:
            controls = self.model.controls(self.drawing)
            pixels = self._attempt(group, program.draw, cell.seed, self.comparison.num, controls)
        if pixels is None:
            return
        seconds = time.monotonic() - start
        if cell.is_full and cell.seed not in self.originals:
            write_arrays(self._originals_path(cell.seed), {"arr_0": pixels})
            self.originals[cell.seed] = pixels
        if cell.name in self.results.records:  # it was only the originals that were lost
            return
        originals = None if cell.is_full else self.originals[cell.seed]
        labels = self.classes.classes(np.arange(len(pixels)))
        figures = self._attempt(group, self.judge.figures, pixels, labels, originals)
        if figures is None:
            return
        own = {"draw_seconds": round(seconds, 2), "device_id": program.device.id}
        with self.writing:
            if cell.seed == self.extent.seeds[0]:
                self._keep_samples(cell.name, pixels)
            record = self._finish(cell, {**figures, **own}, start)
            for twin in group[1:]:
                self._finish(twin, self._copy(twin, record), time.monotonic())

    def _attempt(self, group: Group, work: Callable[..., Result], *arguments: Any) -> Result | None:
        """Return what ``work`` returns; None if it failed, which is noted."""
        try:
            return work(*arguments)
        except FAILURES as error:
            self._fail(group, error)
            return None

    def _finish(self, cell: Cell, figures: Record, start: float) -> Record:
        record = self._describe(cell) | figures
        self.results.add(record)
        self.number += 1
        seconds = time.monotonic() - start
        self.report(
            f"[{self.number}/{self.total}] {cell.name}: {_summary(record)}, {seconds:.1f} s"
        )
        return record

    def _fail(self, group: Group, error: Exception) -> None:
        """Note that cells of equal pictures failed."""
        message = str(error).partition("\n")[0]
        with self.writing:
            if group[0].is_full and group[0].seed not in self.originals:
                self.lost[group[0].seed] = error
            for cell in group:
                self.failures[cell.name] = message
                self.report(f"{cell.name} failed: {message}")

    def _copy(self, cell: Cell, twin: Record) -> Record:
        """Return the figures of a cell with the same pictures."""
        own = self._describe(cell).keys()
        figures = {key: value for key, value in twin.items() if key not in own}
        return {"same_as": twin["name"]} | figures

    def _describe(self, cell: Cell) -> Record:
        arm = cell.arm
        return {
            "name": cell.name,
            "section": arm.section,
            "position": self.positions[arm.name],
            "label": arm.label,
            "policy": arm.policy,
            "facts": arm.facts,
            "seed": cell.seed,
            **self.comparison.describe(cell.plan, self.model, arm.dtype),
        }

    def _originals_path(self, seed: int) -> Path:
        return self.directory / f"originals-seed{seed}.npz"

    def _keep_samples(self, name: str, pixels: np.ndarray) -> None:
        shown = pixels[: len(self.classes)].copy()  # not a view of them all
        self.samples[name.replace("/", "|")] = shown
        write_arrays(self.directory / "samples.npz", self.samples)


def _summary(record: Record) -> str:
    parts = [f"saves {record['saving']:.1%}", f"Frechet {record['frechet_distance']:.3f}"]
    if "class_accuracy" in record:
        parts.append(f"accuracy {record['class_accuracy']:.2%}")
    return ", ".join(parts)
