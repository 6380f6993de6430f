"""The loop of all trainers: compiled calls of many steps, checkpoints, exact resumption, a log.

A run lives in one directory: ``settings.json``, ``log.jsonl`` and ``checkpoints/``. Whatever a step
does follows from its number and the state before it, so a run that was killed repeats the steps
since its newest checkpoint and goes on as if nothing had happened.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.files import check_settings
from amskv_jax.training.config import Run
from amskv_jax.training.log import Log
from amskv_jax.training.state import TrainState

Figures = dict[str, jax.Array]
"""What a step reports: numbers, or arrays with one number per scale."""


class TrainingStoppedError(AmskvError):
    """A run was interrupted, or its time was up, before its last step. Its state is saved."""


@dataclass(frozen=True)
class Task:
    """What the loop needs to know of a model.

    Attributes:
      name: shown beside the progress.
      run: length and pace.
      settings: dataclass with all that shapes the run; a directory holds runs of one only.
      create: makes the state before the first step.
      step: maps the state and one batch to the next state and the figures for the log.
      batches: maps a first step and a number of steps to their batches, a pytree of NumPy arrays
        [steps, batch, ...].
      evaluate: maps the averaged weights to further figures, logged with every checkpoint.
    """

    name: str
    run: Run
    settings: Any
    create: Callable[[], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, Figures]]
    batches: Callable[[int, int], Any]
    evaluate: Callable[[Any], Figures] | None = None


def fit(task: Task, directory: Path | str, stop_after: float | None = None) -> TrainState:
    """Run a task to its last step, from its newest checkpoint if there is one.

    SIGTERM and Ctrl-C end the run, with a checkpoint, after the call of steps under way. All local
    devices share every batch.

    Args:
      task: what to run.
      directory: of the run; created if missing.
      stop_after: seconds after which the run stops as if interrupted.

    Returns:
      The state after the last step.

    Raises:
      TrainingStoppedError: if interrupted or out of time.
      UsageError: if the devices cannot share a batch, or the directory holds another run.
      AmskvError: if the loss is not finite.
    """
    deadline = time.monotonic() + (float("inf") if stop_after is None else stop_after)
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    check_settings(directory / "settings.json", task.settings)
    run = task.run
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    if run.batch_size % mesh.size:
        raise UsageError(
            f"{mesh.size} devices cannot share a batch of {run.batch_size}: choose a multiple"
        )
    replicated = NamedSharding(mesh, PartitionSpec())
    shared = NamedSharding(mesh, PartitionSpec(None, "batch"))

    @partial(jax.jit, donate_argnums=0, out_shardings=replicated)
    def call(state: TrainState, batches: Any) -> tuple[TrainState, Figures]:
        return lax.scan(task.step, state, batches)

    create = jax.jit(task.create, out_shardings=replicated)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        ocp.CheckpointManager(directory / "checkpoints", options=options) as manager,
        _interruption() as interrupted,
    ):
        step = manager.latest_step() or 0
        state = _restore(manager, step, jax.eval_shape(create), replicated) if step else create()
        with Log(directory / "log.jsonl", task.name, run, step) as log:
            while step < run.steps:
                if interrupted.is_set() or time.monotonic() > deadline:
                    log.flush()
                    _save(manager, step, state)
                    raise TrainingStoppedError(
                        f"stopped after step {step} of {run.steps}, which is saved in "
                        f"{directory}: start it again to go on"
                    )
                count = min(run.steps_per_call, run.steps - step)
                state, figures = call(state, jax.device_put(task.batches(step, count), shared))
                step += count
                log.add(step, figures)
                if step % run.checkpoint_every < count or step == run.steps:
                    log.flush()  # first, as it refuses figures that are not finite
                    if task.evaluate:
                        log.write(step, task.evaluate(state.ema))
                    _save(manager, step, state)
        return state


def _save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    """Save the state unless this step's is saved already; the copy to disk goes on meanwhile."""
    if step and manager.latest_step() != step:
        manager.save(step, args=ocp.args.StandardSave(state))


def _restore(
    manager: ocp.CheckpointManager, step: int, shapes: TrainState, sharding: NamedSharding
) -> TrainState:
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )
    state: TrainState = manager.restore(step, args=ocp.args.StandardRestore(target))
    return state


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Turn SIGTERM and the first Ctrl-C into an event; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number: int, _: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
