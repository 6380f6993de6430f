"""Cells on their way: drawn, then measured, in other threads, a few per device at once."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np

from amskv_jax.evaluation.cells import Cell
from amskv_jax.evaluation.devices import Program
from amskv_jax.evaluation.drawing import balanced_labels
from amskv_jax.evaluation.measures import Judge

CELLS_PER_DEVICE = 2
"""Cells of one device on their way at once: one is drawn while the other is measured."""


@dataclass(frozen=True, eq=False)
class Task:
    """A cell on its way, and what is known of it by now.

    Attributes:
      cell: which.
      device: where its pictures are drawn, and looked at.
      start: when it began, see ``time.monotonic``.
      pixels: its pictures, uint8 [N, H, W, 3].
      draw_seconds: what drawing took.
      figures: see ``Judge.figures``.
      error: why it failed, of its plan or of the device.
    """

    cell: Cell
    device: jax.Device
    start: float
    pixels: np.ndarray | None = None
    draw_seconds: float = 0.0
    figures: dict[str, float | None] | None = None
    error: Exception | None = None


class Workers:
    """Threads which draw and measure.

    Attributes:
      running: what they are at; tasks as they were when their stage began.
    """

    def __init__(self, judge: Judge, num: int, num_classes: int, cfg: float) -> None:
        """Start with nothing to do.

        Args:
          judge: measures the pictures.
          num: pictures per cell.
          num_classes: of the model.
          cfg: guidance strength.
        """
        self._judge, self._num, self._cfg = judge, num, cfg
        self._labels = balanced_labels(0, num, num_classes)
        self._pool = ThreadPoolExecutor(CELLS_PER_DEVICE * jax.local_device_count(), "draw")
        self.running: dict[Future[Task], Task] = {}

    def is_free(self, device: jax.Device) -> bool:
        """Return whether a device may draw another cell."""
        tasks = [task for task in self.running.values() if task.device == device]
        return len(tasks) < CELLS_PER_DEVICE and all(task.pixels is not None for task in tasks)

    def draw(self, task: Task, program: Program) -> None:
        """Begin to draw a cell with its program, as soon as that is compiled."""

        def stage() -> Task:
            compiled, start = program.compiled.result(), time.monotonic()
            pixels = compiled.draw(task.cell.seed, self._num, self._cfg)
            return replace(task, pixels=pixels, draw_seconds=time.monotonic() - start)

        self._begin(task, stage)

    def measure(self, task: Task, pixels: np.ndarray, originals: np.ndarray | None) -> None:
        """Begin to measure the pictures of a cell, see ``Judge.figures``."""
        task = replace(task, pixels=pixels)

        def stage() -> Task:
            with jax.default_device(task.device):
                return replace(task, figures=self._judge.figures(pixels, self._labels, originals))

        self._begin(task, stage)

    def collect(self) -> list[Task]:
        """Return the tasks whose stage has ended since the last call."""
        ended = [future for future in self.running if future.done()]
        return [_outcome(future, self.running.pop(future)) for future in ended]

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, task: Task, stage: Callable[[], Task]) -> None:
        self.running[self._pool.submit(stage)] = task


def _outcome(ended: Future[Task], task: Task) -> Task:
    try:
        return ended.result()
    except (ValueError, RuntimeError) as error:  # of a plan, or of the device
        return replace(task, error=error)
