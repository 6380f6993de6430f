"""Programs on all local devices: compiled side by side, then run by one thread per device.

A device is never used by two threads, and nothing is compiled while a device draws. On NVIDIA GPUs
anything else draws wrong pictures: when a program first runs, cuDNN loads its kernels under a
capture of the stream on which XLA runs everything on that device, and whatever another thread
launches there meanwhile is recorded instead of run, often without an error.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import jax
import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.drawing import Drawer
from amskv_jax.models.guidance import Controls, Drawing
from amskv_jax.pipeline import Pipeline
from amskv_jax.study.cells import Key

FAILURES = (ValueError, RuntimeError)
"""What compiling and running raise: of a plan, or of the device."""


@dataclass(frozen=True, eq=False)
class Program:
    """What draws the pictures of a plan, on one device.

    Attributes:
      device: where; to be used by one thread at a time.
      drawer: compiled for it.
      params: the weights, on it.
    """

    device: jax.Device
    drawer: Drawer
    params: Any

    def draw(self, seed: int, count: int, controls: Controls) -> np.ndarray:
        """Return the first pictures of a seed, see ``Drawer.draw``."""
        return self.drawer.draw(self.params, seed, 0, count, controls)


class Compiler:
    """Compiles programs, for all local devices in turn."""

    def __init__(
        self,
        model: Pipeline,
        load: Callable[[str], Pipeline],
        drawing: Drawing,
        attention: Implementation,
        batch: int,
    ) -> None:
        """Compile nothing yet.

        Args:
          model: the model with weights of the usual dtype, on the default device.
          load: returns it with weights of another dtype, on the default device.
          drawing: how pictures are drawn.
          attention: back end.
          batch: pictures drawn at once.
        """
        self._turns = cycle(jax.local_devices())
        self._model, self._load, self._batch = model, load, batch
        self._drawing, self._attention = drawing, attention
        self._weights: dict[tuple[str, jax.Device], Any] = {}
        self._loading = threading.Lock()

    def compile(self, keys: Sequence[Key]) -> dict[Key, Program | Exception]:
        """Compile several programs at the same time; return them, or why they failed."""
        with ThreadPoolExecutor(len(keys), "compile") as pool:
            programs = pool.map(self._try, keys, [next(self._turns) for _ in keys])
            return dict(zip(keys, programs, strict=True))

    def _try(self, key: Key, device: jax.Device) -> Program | Exception:
        plan, dtype = key
        try:
            params = self._params(dtype, device)
            with jax.default_device(device):
                model = replace(self._model, params=params, dtype=dtype)
                sampler = model.sampler(plan, self._drawing, attention=self._attention)
                conditions = model.conditions(None)
                drawer = model.drawer(sampler, conditions, self._batch, self._drawing)
                return Program(device, drawer, params)
        except FAILURES as error:
            return error

    def _params(self, dtype: str, device: jax.Device) -> Any:
        """Return the weights on a device; they are put there once, and only if they are needed."""
        with self._loading, jax.default_device(device):
            if (dtype, device) not in self._weights:
                model = self._model if dtype == self._model.dtype else self._load(dtype)
                self._weights[dtype, device] = jax.device_put(model.params, device)
            return self._weights[dtype, device]


def run_on_devices(tasks: Iterable[tuple[jax.Device, Callable[[], object]]]) -> None:
    """Run tasks: those of one device one after the other, those of different ones side by side.

    If one raises, or the user interrupts, no further one begins, and the error is raised here.
    """
    queues: dict[jax.Device, list[Callable[[], object]]] = {}
    for device, task in tasks:
        queues.setdefault(device, []).append(task)
    stopped = threading.Event()

    def work(device: jax.Device, queue: list[Callable[[], object]]) -> None:
        with jax.default_device(device):
            for task in queue:
                if stopped.is_set():
                    return
                try:
                    task()
                except BaseException:
                    stopped.set()
                    raise

    with ThreadPoolExecutor(max(1, len(queues)), "device") as pool:
        try:
            for ended in [pool.submit(work, *item) for item in queues.items()]:
                ended.result()
        finally:
            stopped.set()
