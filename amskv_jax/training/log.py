"""The log of a run: JSON lines in a file, progress on the terminal, a plot."""

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from amskv_jax.errors import AmskvError
from amskv_jax.files import read_json_lines, replacing
from amskv_jax.training.config import Run

SPEED_CALLS = 10
"""Calls of steps, among the latest, over which the speed is measured."""


class Log:
    """Writes what a run reports; a context manager.

    Lines of steps after the one a run starts from are dropped, as they are about to be repeated.
    """

    def __init__(self, path: Path, name: str, run: Run, step: int) -> None:
        """Open the log of a run that starts after ``step``."""
        kept = [entry for entry in read_json_lines(path) if entry["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = path.open("a")
        self._batch_size = run.batch_size
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._flushed = deque([(step, time.perf_counter())], SPEED_CALLS)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        self._bar = self._progress.add_task(
            name,
            total=run.steps,
            completed=step,
            status="compiling" if step < run.steps else "",
        )

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()

    def add(self, step: int, figures: dict[str, jax.Array]) -> None:
        """Take the figures of a call of steps that may still be running, stacked over its steps.

        Only those of the call before are waited for and written, so that the device has work while
        the host prepares the next batches.
        """
        self.flush()
        self._pending = step, figures

    def flush(self) -> None:
        """Wait for the newest figures and write their means over the steps.

        Raises:
          AmskvError: if the loss is not finite.
        """
        if self._pending is None:
            return
        step, figures = self._pending
        self._pending = None
        means = {name: np.asarray(values).mean(0) for name, values in figures.items()}
        # Over several calls, as reading the figures of one may wait for those which run already.
        self._flushed.append((step, time.perf_counter()))
        (first, start), (_, end) = self._flushed[0], self._flushed[-1]
        speed = (step - first) * self._batch_size / (end - start)
        if not np.isfinite(means["loss"]):
            raise AmskvError(
                f"the loss is not finite in the steps up to {step}: lower the learning rate; "
                "checkpoints hold the last good state"
            )
        self.write(step, {**means, "images_per_second": np.float64(speed)})
        status = f"loss {means['loss']:.4f}  {speed:,.0f} images/s"
        self._progress.update(self._bar, completed=step, status=status)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Write one line."""
        entry = {"step": step, **{name: _rounded(value) for name, value in figures.items()}}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def plot_log(path: Path, picture: Path) -> None:
    """Draw every figure of a log over the steps, figures per scale as one line per scale.

    Raises:
      AmskvError: if the log is empty or matplotlib is not installed.
    """
    entries = read_json_lines(path)
    if not entries:
        raise AmskvError(f"{path} is missing or empty: nothing to plot")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise AmskvError("plots need matplotlib: pip install 'amskv-jax[plot]'") from error
    names = sorted({name for entry in entries for name in entry} - {"step"})
    columns = 3
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
    for panel, name in zip(panels, names, strict=False):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        steps, values = zip(*points, strict=True)
        panel.set(title=name.replace("_", " "), xlabel="step")
        lines = panel.plot(steps, values, linewidth=1)
        if len(lines) > 1:
            panel.legend(lines, [f"scale {i}" for i in range(len(lines))], fontsize=6, ncols=2)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.savefig(picture)


def _rounded(value: Any) -> Any:
    """Return plain numbers of 7 digits, which tell float32 apart."""
    array = np.asarray(value, np.float64)
    return np.vectorize(lambda number: float(f"{number:.9g}"))(array).tolist()
