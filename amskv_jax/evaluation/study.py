"""The study: every policy's pictures measured, cell by cell, resumable after any interruption.

A study lives in one directory: ``settings.json``, ``stats.npz`` (the calibration),
``results.jsonl`` (a line per finished cell), ``samples.npz`` (a few pictures of every cell) and
``originals-*.npz`` (the full cache's pictures, drawn again if they are missing).
"""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.checkpoint_info import GUIDANCE
from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.budgets import memory_report
from amskv_jax.evaluation.calibration import load_or_calibrate
from amskv_jax.evaluation.cells import Arm, Cell, full_arm, order_cells, study_arms
from amskv_jax.evaluation.drawing import Drawer, balanced_labels
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.results import Record, Results, read_arrays, write_arrays
from amskv_jax.generate import Sampler
from amskv_jax.pipeline import TOP_K, TOP_P, Pipeline
from amskv_jax.plan import RetentionPlan
from amskv_jax.sampling import TokenSampling
from amskv_jax.stats import LayerStats
from amskv_jax.training.log import check_settings


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
    top_k: int = TOP_K
    top_p: float = TOP_P
    dtype: str = "bfloat16"
    calibration_pictures: int = 128


@dataclass(frozen=True)
class Extent:
    """Which cells to run, and how; may change from call to call.

    Attributes:
      sections: letters out of "abcdefg".
      seeds: the first is every section's.
      batch: pictures drawn at once.
      compilers: programs compiled at the same time, while the device draws.
      stop_after: seconds after which no further cell begins.
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


Program = tuple[RetentionPlan, str]
"""Plan and dtype: what has to be compiled once."""


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

    Programs are compiled in other threads while the device draws; of the cells whose programs are
    ready the most important is next. Cells with equal plans, dtype and seed are drawn once.

    Args:
      conditions: see there.
      extent: see there.
      load: returns the model with weights of a dtype.
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
    study = _Study(conditions, extent, cache(load), judge, Path(directory), report)
    if held_out is not None:
        study.measure_real(held_out)
    try:
        return study.run(deadline)
    finally:
        study.pool.shutdown(wait=False, cancel_futures=True)


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
        self.load, self.judge, self.directory, self.report = load, judge, directory, report
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
        self.pool = ThreadPoolExecutor(extent.compilers, thread_name_prefix="compile")
        self.programs: dict[Program, Future[Drawer]] = {}
        self.full = full_arm(self.model.transformer, conditions.dtype)
        self.originals: dict[int, np.ndarray] = {}
        self.labels = balanced_labels(0, conditions.num, self.model.transformer.num_classes)
        self.failures: dict[str, str] = {}

    def measure_real(self, pixels: np.ndarray) -> None:
        """Measure real pictures; their labels are not known here, so no class accuracy."""
        name = "real/held-out"
        if name not in self.results.records:
            figures = self.judge.figures(pixels, np.full(len(pixels), -1))
            figures.pop("class_accuracy", None)
            self.results.add({"name": name, "section": "real", "num": len(pixels), **figures})

    def run(self, deadline: float) -> list[Cell]:
        """Run cells until all are done or time is up."""
        pending = self._pending()
        total = len(pending)
        done = {
            _signature(cell): self.results.records[cell.name]
            for cell in self._cells
            if cell.name in self.results.records
        }
        while pending:
            if time.monotonic() >= deadline:
                return pending
            cell = self._next(pending, done, deadline)
            if cell is None:
                continue
            pending.remove(cell)
            twin = done.get(_signature(cell))
            started = time.monotonic()
            try:
                record = self._describe(cell) | (
                    self._copy(cell, twin) if twin else self._run(cell)
                )
            except (ValueError, RuntimeError) as error:  # of a plan, or of the device
                self.failures[cell.name] = str(error).partition("\n")[0]
                self.report(f"{cell.name} failed: {self.failures[cell.name]}")
                continue
            self.results.add(record)
            done[_signature(cell)] = record
            number = total - len(pending)
            seconds = time.monotonic() - started
            self.report(f"[{number}/{total}] {cell.name}: {_summary(record)}, {seconds:.1f} s")
            wanted = {_program(other.arm) for other in pending}
            wanted.add(_program(self.full))  # whose pictures may be needed again
            if _program(cell.arm) not in wanted:
                self.programs.pop(_program(cell.arm), None)
        if self.failures:
            lines = "".join(f"\n  {name}: {error}" for name, error in self.failures.items())
            raise AmskvError(f"{len(self.failures)} cells failed:{lines}")
        return []

    def _pending(self) -> list[Cell]:
        """Return the cells without a result, and start to compile their programs in order."""
        conditions, extent = self.conditions, self.extent
        self._submit(self.full)
        stats = self._stats()
        arms, impossible = study_arms(
            self.model.transformer, stats, extent.sections, conditions.dtype
        )
        for one in impossible:
            if one.name not in self.results.records:
                section = one.name.partition("/")[0]
                self.results.add({"name": one.name, "section": section, "impossible": one.reason})
                self.report(f"{one.name} is impossible: {one.reason}")
        self.positions = {arm.name: position for position, arm in enumerate(arms)}
        self._cells = order_cells(arms, extent.seeds)
        pending = [
            cell
            for cell in self._cells
            if cell.name not in self.results.records
            and (extent.only in cell.name or cell.arm.section == "full")
        ]
        finished = {_signature(cell) for cell in self._cells if cell.name in self.results.records}
        for cell in pending:
            if _signature(cell) not in finished:
                self._submit(cell.arm)
        return pending

    def _submit(self, arm: Arm) -> Future[Drawer]:
        program = _program(arm)
        if program not in self.programs:
            self.programs[program] = self.pool.submit(self._compile, arm)
        return self.programs[program]

    def _compile(self, arm: Arm) -> Drawer:
        model = self.load(arm.dtype)
        return Drawer(self._sampler(arm), model.params, self.extent.batch)

    def _sampler(self, arm: Arm) -> Sampler:
        conditions, model = self.conditions, self.model
        return Sampler(
            model.transformer,
            model.tokenizer,
            arm.plan,
            TokenSampling(conditions.top_k, conditions.top_p),
            arm.dtype,
            self.extent.attention,
        )

    def _next(
        self, pending: list[Cell], done: dict[tuple[Program, int], Record], deadline: float
    ) -> Cell | None:
        """Return the most important cell that is ready; None once something else may be."""
        for cell in pending:
            if _signature(cell) in done or self._submit(cell.arm).done():
                return cell
        running = {self._submit(cell.arm) for cell in pending}
        wait(running, min(60.0, max(0.0, deadline - time.monotonic())), FIRST_COMPLETED)
        return None

    def _run(self, cell: Cell) -> Record:
        start = time.monotonic()
        pixels = self._pictures(cell)
        seconds = time.monotonic() - start
        originals = None if cell.arm == self.full else self._originals(cell.seed)
        figures = self.judge.figures(pixels, self.labels, originals)
        shown = pixels[: self.model.transformer.num_classes]
        self._keep_samples(cell.name, shown)
        return {**figures, "draw_seconds": round(seconds, 2)}

    def _pictures(self, cell: Cell) -> np.ndarray:
        if cell.arm == self.full:
            return self._originals(cell.seed)
        return self._draw(cell.arm, cell.seed)

    def _draw(self, arm: Arm, seed: int) -> np.ndarray:
        drawer, model = self._submit(arm).result(), self.load(arm.dtype)
        return drawer.draw(model.params, seed, 0, self.conditions.num, self.conditions.cfg)

    def _originals(self, seed: int) -> np.ndarray:
        """Return the full cache's pictures, from memory, the disk or the model."""
        if seed not in self.originals:
            path = self.directory / f"originals-seed{seed}.npz"
            pixels = read_arrays(path).get("arr_0")
            if pixels is None:
                pixels = self._draw(self.full, seed)
                write_arrays(path, {"arr_0": pixels})
            self.originals[seed] = pixels
        return self.originals[seed]

    def _copy(self, cell: Cell, twin: Record) -> Record:
        """Return the figures of a cell with the same pictures."""
        own = self._describe(cell).keys()
        figures = {key: value for key, value in twin.items() if key not in own}
        return {"same_as": twin["name"]} | figures

    def _describe(self, cell: Cell) -> Record:
        arm = cell.arm
        report = memory_report(arm.plan, self.model.transformer, arm.dtype)
        everything = memory_report(arm.plan, self.model.transformer, self.conditions.dtype).full
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

    def _keep_samples(self, name: str, pixels: np.ndarray) -> None:
        self.samples[name.replace("/", "|")] = pixels
        write_arrays(self.directory / "samples.npz", self.samples)

    def _stats(self) -> LayerStats:
        return load_or_calibrate(
            self.directory / "stats.npz",
            self._sampler(self.full),
            self.model,
            self.conditions.calibration_pictures,
            self.conditions.cfg,
            self.report,
        )


def _program(arm: Arm) -> Program:
    return arm.plan, arm.dtype


def _signature(cell: Cell) -> tuple[Program, int]:
    return _program(cell.arm), cell.seed


def _summary(record: Record) -> str:
    parts = [f"saves {record['saving']:.1%}", f"Frechet {record['frechet_distance']:.3f}"]
    if "class_accuracy" in record:
        parts.append(f"accuracy {record['class_accuracy']:.2%}")
    return ", ".join(parts)
