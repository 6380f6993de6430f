"""The study: every policy's pictures measured, cell by cell, resumable after any interruption.

A study lives in one directory: ``settings.json``, ``stats.npz`` (the calibration), ``cells.json``
(the names of all cells it was asked for), ``results.jsonl`` (a line per finished cell),
``samples.npz`` (a few pictures of the first seed's cells) and ``originals-*.npz`` (the full cache's
pictures, drawn again if they are missing).
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.checkpoints.info import GUIDANCE
from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.calibration import load_or_calibrate
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.results import (
    Record,
    Results,
    add_cells,
    read_arrays,
    write_arrays,
)
from amskv_jax.files import check_settings
from amskv_jax.generate import Sampler
from amskv_jax.models.guidance import Drawing
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.budgets import memory_report
from amskv_jax.study.cells import Arm, Cell, full_arm, order_cells, study_arms
from amskv_jax.study.devices import (
    FAILURES,
    Compiler,
    Key,
    Program,
    program_key,
    run_on_devices,
)


@dataclass(frozen=True)
class Conditions:
    """What all cells of a study have in common; a directory holds a study under one set of these.

    Attributes:
      num: pictures per cell.
      cfg: guidance strength at the last scale.
      top_k: see ``TokenSampling``.
      top_p: see ``TokenSampling``.
      dtype: of all cells but those which are about the dtype.
      calibration_pictures: pictures that calibration looks at.
    """

    num: int = 10_000
    cfg: float = GUIDANCE
    top_k: int = Drawing.top_k
    top_p: float = Drawing.top_p
    dtype: str = "bfloat16"
    calibration_pictures: int = 128


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


@dataclass(frozen=True)
class _Identity:
    """What is written into a study's ``settings.json``."""

    conditions: Conditions
    model: str
    features: str
    real_pictures: int


Signature = tuple[Key, int]
"""Program and seed: cells of equal signatures have equal pictures."""
Group = list[Cell]
"""Cells of one signature."""


def run_study(
    conditions: Conditions,
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
      conditions: see there.
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
    study = _Study(conditions, extent, load, judge, Path(directory), report)
    if held_out is not None:
        study.measure_real(held_out)
    return study.run(deadline)


class _Study:
    def __init__(
        self,
        conditions: Conditions,
        extent: Extent,
        load: Callable[[str], Pipeline],
        judge: Judge,
        directory: Path,
        report: Callable[[str], object],
    ) -> None:
        self.conditions, self.extent = conditions, extent
        self.judge, self.directory, self.report = judge, directory, report
        self.model = load(conditions.dtype)
        identity = _Identity(
            conditions,
            self.model.fingerprint,
            f"{judge.network.name} {judge.network.fingerprint}",
            len(judge.real.features),
        )
        directory.mkdir(parents=True, exist_ok=True)
        check_settings(directory / "settings.json", identity)
        self.results = Results(directory / "results.jsonl")
        self.samples = read_arrays(directory / "samples.npz")
        self.samples["classes"] = np.array(self.model.classes, str)
        self.compiler = Compiler(self.model, load, self._sampler, extent.batch)
        self.full = full_arm(self.model.shape, conditions.dtype)
        self.drawing = replace(
            self.model.drawing, cfg=conditions.cfg, top_k=conditions.top_k, top_p=conditions.top_p
        )
        self.labels = self.model.conditions(None).classes(np.arange(conditions.num))
        self.positions: dict[str, int] = {}
        self.originals: dict[int, np.ndarray] = {}
        self.lost: dict[int, Exception] = {}
        self.failures: dict[str, str] = {}
        self.writing = threading.Lock()

    def measure_real(self, pixels: np.ndarray) -> None:
        """Measure real pictures; their labels are not known here, so no class accuracy."""
        name = "real/held-out"
        if name not in self.results.records:
            figures = self.judge.figures(pixels, np.full(len(pixels), -1))
            figures.pop("class_accuracy", None)
            self.results.add({"name": name, "section": "real", "num": len(pixels), **figures})

    def run(self, deadline: float) -> list[Cell]:
        """Run cells until all are done or time is up."""
        groups = self._groups()
        arms = list({program_key(group[0].arm): group[0].arm for group in groups}.values())
        for first in range(0, len(arms), self.extent.compilers):
            if time.monotonic() >= deadline or (self.lost and not self.originals):
                break
            programs = self.compiler.compile(arms[first : first + self.extent.compilers])
            own = [group for group in groups if program_key(group[0].arm) in programs]
            for of_full in (True, False):
                self._run(
                    [group for group in own if (group[0].arm == self.full) == of_full],
                    programs,
                    deadline,
                )
        for group in groups:
            if group[0].arm != self.full and group[0].seed in self.lost:
                self._fail(group, self.lost[group[0].seed])
        if self.failures:
            lines = "".join(f"\n  {name}: {error}" for name, error in self.failures.items())
            raise AmskvError(f"{len(self.failures)} cells failed:{lines}")
        cells = (cell for group in groups for cell in group)
        return [cell for cell in cells if cell.name not in self.results.records]

    def _groups(self) -> list[Group]:
        """Return the cells to run, those with equal pictures together, the most important first.

        These are the cells without a result, and the full cache's whose pictures are lost.
        """
        records = self.results.records
        cells = self._cells()
        add_cells(self.directory, (cell.name for cell in cells))
        done = {_signature(cell): records[cell.name] for cell in cells if cell.name in records}
        missing = [cell for cell in cells if cell.name not in records]
        self.number, self.total = 0, len(missing)
        groups: dict[Signature, Group] = {}
        for cell in missing:
            if twin := done.get(_signature(cell)):
                self._finish(cell, self._copy(cell, twin), time.monotonic())
            else:
                groups.setdefault(_signature(cell), []).append(cell)
        lost = []
        for seed in dict.fromkeys(seed for _, seed in groups):
            pixels = read_arrays(self._originals_path(seed)).get("arr_0")
            full = Cell(self.full, seed)
            if pixels is not None:
                self.originals[seed] = pixels
            elif full.name in records:
                lost.append([full])
        return [*lost, *groups.values()]

    def _cells(self) -> list[Cell]:
        """Return all cells that were asked for."""
        extent, stats = self.extent, self._stats()
        arms, impossible = study_arms(
            self.model.shape, stats, extent.sections, self.conditions.dtype
        )
        for one in impossible:
            if one.name not in self.results.records:
                section = one.name.partition("/")[0]
                self.results.add({"name": one.name, "section": section, "impossible": one.reason})
                self.report(f"{one.name} is impossible: {one.reason}")
        for section in {arm.section for arm in arms}:
            own = [arm.name for arm in arms if arm.section == section]
            self.positions.update({name: position for position, name in enumerate(own)})
        return [
            cell
            for cell in order_cells(arms, extent.seeds)
            if extent.only in cell.name or cell.arm.section == "full"
        ]

    def _sampler(self, arm: Arm) -> Sampler:
        model = replace(self.model, dtype=arm.dtype)
        return model.sampler(arm.plan, self.drawing, attention=self.extent.attention)

    def _run(
        self, groups: list[Group], programs: dict[Key, Program | Exception], deadline: float
    ) -> None:
        tasks = []
        for group in groups:
            program = programs[program_key(group[0].arm)]
            if isinstance(program, Program):
                tasks.append((program.device, partial(self._run_one, group, program, deadline)))
            else:
                self._fail(group, program)
        run_on_devices(tasks)

    def _run_one(self, group: Group, program: Program, deadline: float) -> None:
        """Draw and measure the pictures of a group, in the thread of its device."""
        cell, start = group[0], time.monotonic()
        is_full = cell.arm == self.full
        if start >= deadline or not (is_full or cell.seed in self.originals):
            return
        pixels = self.originals.get(cell.seed) if is_full else None
        try:
            if pixels is None:
                controls = self.model.controls(self.drawing)
                pixels = program.draw(cell.seed, self.conditions.num, controls)
        except FAILURES as error:
            self._fail(group, error)
            return
        seconds = time.monotonic() - start
        if is_full and cell.seed not in self.originals:
            write_arrays(self._originals_path(cell.seed), {"arr_0": pixels})
            self.originals[cell.seed] = pixels
        if cell.name not in self.results.records:  # else it was only the originals that were lost
            own = {"draw_seconds": round(seconds, 2), "device_id": program.device.id}
            self._measure(group, pixels, own, start)

    def _measure(self, group: Group, pixels: np.ndarray, own: Record, start: float) -> None:
        cell = group[0]
        originals = None if cell.arm == self.full else self.originals[cell.seed]
        try:
            figures = self.judge.figures(pixels, self.labels, originals)
        except FAILURES as error:
            self._fail(group, error)
            return
        with self.writing:
            if cell.seed == self.extent.seeds[0]:
                self._keep_samples(cell.name, pixels)
            record = self._finish(cell, {**figures, **own}, start)
            for twin in group[1:]:
                self._finish(twin, self._copy(twin, record), time.monotonic())

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
            if group[0].arm == self.full and group[0].seed not in self.originals:
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
        report = memory_report(arm.plan, self.model.shape, arm.dtype)
        everything = memory_report(arm.plan, self.model.shape, self.conditions.dtype).full
        return {
            "name": cell.name,
            "section": arm.section,
            "position": self.positions[arm.name],
            "label": arm.label,
            "policy": arm.policy,
            "note": arm.plan.note,
            "seed": cell.seed,
            "dtype": arm.dtype,
            "num": self.conditions.num,
            "cache_bytes": report.plan,
            "saving": report.saving(everything),
            "device": jax.devices()[0].device_kind,
        }

    def _originals_path(self, seed: int) -> Path:
        return self.directory / f"originals-seed{seed}.npz"

    def _keep_samples(self, name: str, pixels: np.ndarray) -> None:
        shown = pixels[: len(self.model.conditions(None))].copy()  # not a view of them all
        self.samples[name.replace("/", "|")] = shown
        write_arrays(self.directory / "samples.npz", self.samples)

    def _stats(self) -> LayerStats:
        return load_or_calibrate(
            self.directory / "stats.npz",
            self.model,
            self.conditions.calibration_pictures,
            self.drawing,
            self.report,
        )


def _signature(cell: Cell) -> Signature:
    return program_key(cell.arm), cell.seed


def _summary(record: Record) -> str:
    parts = [f"saves {record['saving']:.1%}", f"Frechet {record['frechet_distance']:.3f}"]
    if "class_accuracy" in record:
        parts.append(f"accuracy {record['class_accuracy']:.2%}")
    return ", ".join(parts)
