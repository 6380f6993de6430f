"""The study: every policy's pictures measured, cell by cell, resumable after any interruption.

A study lives in one directory: ``settings.json``, ``stats.npz`` (the calibration), ``cells.json``
(the names of all cells it was asked for), ``results.jsonl`` (a line per finished cell),
``samples.npz`` (a few pictures of every cell) and ``originals-*.npz`` (the full cache's pictures,
drawn again if they are missing).
"""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.checkpoint_info import GUIDANCE
from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.budgets import memory_report
from amskv_jax.evaluation.calibration import load_or_calibrate
from amskv_jax.evaluation.cells import Arm, Cell, full_arm, order_cells, study_arms
from amskv_jax.evaluation.devices import Key, Programs, program_key
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.results import (
    Record,
    Results,
    add_cells,
    read_arrays,
    write_arrays,
)
from amskv_jax.evaluation.workers import Task, Workers
from amskv_jax.generate import Sampler
from amskv_jax.pipeline import TOP_K, TOP_P, Pipeline
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
      compilers: programs compiled at the same time, while the devices draw.
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


Signature = tuple[Key, int]
"""Program and seed: cells of equal signatures have equal pictures."""


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

    Programs are compiled in other threads, each for one of the local devices; a device that is
    free draws the most important of the cells whose programs are ready there, while its cell before
    is measured. Cells with equal plans, dtype and seed are drawn once. The full cache's pictures of
    a seed come before all others of the seed, which are compared with them.

    On NVIDIA GPUs, XLA must not record CUDA graphs, which fails while other threads compile: set
    ``XLA_FLAGS=--xla_gpu_enable_command_buffer=`` before JAX looks for devices.

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
    try:
        return study.run(deadline)
    finally:
        study.close()


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
        self.programs = Programs(self.model, load, self._sampler, extent.batch, extent.compilers)
        self.workers = Workers(
            judge, conditions.num, self.model.transformer.num_classes, conditions.cfg
        )
        self.full = full_arm(self.model.transformer, conditions.dtype)
        self.positions: dict[str, int] = {}
        self.originals: dict[int, np.ndarray] = {}
        self.failures: dict[str, str] = {}

    def close(self) -> None:
        """Begin nothing more in other threads."""
        self.workers.close()
        self.programs.close()

    def measure_real(self, pixels: np.ndarray) -> None:
        """Measure real pictures; their labels are not known here, so no class accuracy."""
        name = "real/held-out"
        if name not in self.results.records:
            figures = self.judge.figures(pixels, np.full(len(pixels), -1))
            figures.pop("class_accuracy", None)
            self.results.add({"name": name, "section": "real", "num": len(pixels), **figures})

    def run(self, deadline: float) -> list[Cell]:
        """Run cells until all are done or time is up."""
        self.pending = self._pending()
        self.left = self.total = sum(cell.name not in self.results.records for cell in self.pending)
        while self.pending or self.workers.running:
            remaining = deadline - time.monotonic()
            if remaining > 0:
                compiling = self.programs.compiling()  # listed first, lest one finish unnoticed
                self._begin()
                wait([*compiling, *self.workers.running], min(60.0, remaining), FIRST_COMPLETED)
            elif self.workers.running:
                wait(self.workers.running, return_when=FIRST_COMPLETED)
            else:
                return [cell for cell in self.pending if cell.name not in self.results.records]
            self._collect()
        if self.failures:
            lines = "".join(f"\n  {name}: {error}" for name, error in self.failures.items())
            raise AmskvError(f"{len(self.failures)} cells failed:{lines}")
        return []

    def _pending(self) -> list[Cell]:
        """Return the cells to run, and start to compile their programs in order.

        These are the cells without a result, and the full cache's whose pictures are lost.
        """
        conditions, extent = self.conditions, self.extent
        self.programs.of(self.full)
        stats = self._stats()
        arms, impossible = study_arms(
            self.model.transformer, stats, extent.sections, conditions.dtype
        )
        for one in impossible:
            if one.name not in self.results.records:
                section = one.name.partition("/")[0]
                self.results.add({"name": one.name, "section": section, "impossible": one.reason})
                self.report(f"{one.name} is impossible: {one.reason}")
        for section in {arm.section for arm in arms}:
            own = [arm.name for arm in arms if arm.section == section]
            self.positions.update({name: position for position, name in enumerate(own)})
        cells = [
            cell
            for cell in order_cells(arms, extent.seeds)
            if extent.only in cell.name or cell.arm.section == "full"
        ]
        add_cells(self.directory, (cell.name for cell in cells))
        records = self.results.records
        self.done = {_signature(c): records[c.name] for c in cells if c.name in records}
        pending = [cell for cell in cells if cell.name not in records]
        drawn = [cell for cell in pending if _signature(cell) not in self.done]
        for cell in drawn:
            self.programs.of(cell.arm)
        for seed in {cell.seed for cell in drawn}:
            pixels = read_arrays(self._originals_path(seed)).get("arr_0")
            if pixels is not None:
                self.originals[seed] = pixels
        lost = {cell.seed for cell in drawn} - self.originals.keys()
        again = [Cell(self.full, seed) for seed in extent.seeds if seed in lost]
        return [cell for cell in again if cell.name in records] + pending

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

    def _begin(self) -> None:
        """Begin all cells that can be, the most important first."""
        for cell in list(self.pending):
            twin = self.done.get(_signature(cell))
            if twin and cell.arm != self.full:
                self.pending.remove(cell)
                self._finish(cell, self._copy(cell, twin), time.monotonic())
            elif self._is_ready(cell):
                self.pending.remove(cell)
                program = self.programs.of(cell.arm)
                task = Task(cell, program.device, time.monotonic())
                if cell.arm == self.full and cell.seed in self.originals:
                    self.workers.measure(task, self.originals[cell.seed], None)
                else:
                    self.workers.draw(task, program)

    def _is_ready(self, cell: Cell) -> bool:
        """Return whether all is there that a cell needs, and its device is free."""
        if cell.arm == self.full and cell.seed in self.originals:
            return True  # only to be measured
        if cell.arm != self.full and cell.seed not in self.originals:
            return False  # nothing to be compared with yet
        program = self.programs.of(cell.arm)
        if not program.compiled.done() or not self.workers.is_free(program.device):
            return False
        running = self.workers.running.values()  # perhaps a twin, which is copied soon
        return all(_signature(task.cell) != _signature(cell) for task in running)

    def _collect(self) -> None:
        """Take what has been drawn and measured."""
        for task in self.workers.collect():
            if task.error is not None:
                self._fail(task.cell, task.error)
                continue
            assert task.pixels is not None
            if task.figures is None:
                self._measure(task, task.pixels)
                continue
            self._keep_samples(task.cell.name, task.pixels)
            own = {"draw_seconds": round(task.draw_seconds, 2), "device_id": task.device.id}
            self._finish(task.cell, {**task.figures, **own}, task.start)

    def _measure(self, task: Task, pixels: np.ndarray) -> None:
        """Begin to measure what was drawn, unless it is originals that were lost."""
        cell = task.cell
        if cell.arm == self.full:
            write_arrays(self._originals_path(cell.seed), {"arr_0": pixels})
            self.originals[cell.seed] = pixels
        if cell.name not in self.results.records:
            originals = None if cell.arm == self.full else self.originals[cell.seed]
            self.workers.measure(task, pixels, originals)

    def _finish(self, cell: Cell, figures: Record, start: float) -> None:
        record = self._describe(cell) | figures
        self.results.add(record)
        self.done[_signature(cell)] = record
        self.left -= 1
        number, seconds = self.total - self.left, time.monotonic() - start
        self.report(f"[{number}/{self.total}] {cell.name}: {_summary(record)}, {seconds:.1f} s")
        wanted = {program_key(other.arm) for other in self.pending}
        self.programs.keep_only(wanted | {program_key(self.full)})

    def _fail(self, cell: Cell, error: Exception) -> None:
        """Note that a cell failed, and all that had to be compared with it."""
        failed = [cell]
        if cell.arm == self.full and cell.seed not in self.originals:
            failed += [other for other in self.pending if other.seed == cell.seed]
            self.pending = [other for other in self.pending if other.seed != cell.seed]
        for one in failed:
            self.failures[one.name] = str(error).partition("\n")[0]
            self.left -= one.name not in self.results.records
            self.report(f"{one.name} failed: {self.failures[one.name]}")

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

    def _originals_path(self, seed: int) -> Path:
        return self.directory / f"originals-seed{seed}.npz"

    def _keep_samples(self, name: str, pixels: np.ndarray) -> None:
        shown = pixels[: self.model.transformer.num_classes].copy()  # not a view of them all
        self.samples[name.replace("/", "|")] = shown
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


def _signature(cell: Cell) -> Signature:
    return program_key(cell.arm), cell.seed


def _summary(record: Record) -> str:
    parts = [f"saves {record['saving']:.1%}", f"Frechet {record['frechet_distance']:.3f}"]
    if "class_accuracy" in record:
        parts.append(f"accuracy {record['class_accuracy']:.2%}")
    return ", ".join(parts)
