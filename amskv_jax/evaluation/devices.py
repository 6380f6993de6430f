"""Programs on all local devices: each is compiled for one of them, where the weights are put."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import jax
import numpy as np

from amskv_jax.evaluation.cells import Arm
from amskv_jax.evaluation.drawing import Drawer
from amskv_jax.generate import Sampler
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan import RetentionPlan

Key = tuple[RetentionPlan, str]
"""Plan and dtype: what has to be compiled once."""


def program_key(arm: Arm) -> Key:
    """Return what the programs of two arms have in common if they are the same program."""
    return arm.plan, arm.dtype


@dataclass(frozen=True, eq=False)
class Compiled:
    """What a program needs to draw on its device."""

    device: jax.Device
    drawer: Drawer
    params: Any

    def draw(self, seed: int, count: int, cfg: float) -> np.ndarray:
        """Return the first pictures of a seed, see ``Drawer.draw``; in any thread."""
        with jax.default_device(self.device):
            return self.drawer.draw(self.params, seed, 0, count, cfg)


@dataclass(frozen=True, eq=False)
class Program:
    """A program that is compiled, or will be.

    Attributes:
      device: for which.
      compiled: available once the compiler is done.
    """

    device: jax.Device
    compiled: Future[Compiled]


class Programs:
    """Compiles programs in other threads, for all local devices in turn.

    Attributes:
      devices: all local devices.
    """

    def __init__(
        self,
        model: Pipeline,
        load: Callable[[str], Pipeline],
        sampler: Callable[[Arm], Sampler],
        batch: int,
        compilers: int,
    ) -> None:
        """Start with no program.

        Args:
          model: the model with weights of the usual dtype, on the default device.
          load: returns it with weights of another dtype, on the default device.
          sampler: returns what draws an arm's pictures.
          batch: pictures drawn at once.
          compilers: programs compiled at the same time.
        """
        self.devices = jax.local_devices()
        self._turns = cycle(self.devices)
        self._model, self._load, self._sampler, self._batch = model, load, sampler, batch
        self._pool = ThreadPoolExecutor(compilers, thread_name_prefix="compile")
        self._programs: dict[Key, Program] = {}
        self._weights: dict[tuple[str, jax.Device], Any] = {}
        self._loading = threading.Lock()

    def of(self, arm: Arm) -> Program:
        """Return the program of an arm; the first call starts to compile it."""
        key = program_key(arm)
        if key not in self._programs:
            device = next(self._turns)
            self._programs[key] = Program(device, self._pool.submit(self._compile, arm, device))
        return self._programs[key]

    def compiling(self) -> list[Future[Any]]:
        """Return the programs which are not compiled yet."""
        compiled = [program.compiled for program in self._programs.values()]
        return [future for future in compiled if not future.done()]

    def keep_only(self, keys: set[Key]) -> None:
        """Forget all other programs, so that the devices are rid of them."""
        for key in self._programs.keys() - keys:
            del self._programs[key]

    def close(self) -> None:
        """Compile nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, arm: Arm, device: jax.Device) -> Compiled:
        params = self._params(arm.dtype, device)
        with jax.default_device(device):
            return Compiled(device, Drawer(self._sampler(arm), params, self._batch), params)

    def _params(self, dtype: str, device: jax.Device) -> Any:
        """Return the weights on a device; they are put there once, and only if they are needed."""
        with self._loading, jax.default_device(device):
            if (dtype, device) not in self._weights:
                model = self._model if dtype == self._model.dtype else self._load(dtype)
                self._weights[dtype, device] = jax.device_put(model.params, device)
            return self._weights[dtype, device]
