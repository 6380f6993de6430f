"""Measuring speed and memory of a sampler with random weights, one arm per fresh process."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from amskv_jax.attention import choose_implementation
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.drawing import Drawer
from amskv_jax.errors import OutOfMemoryError
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.mesh import put_on

ARM_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # or the peak is what was set aside
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # or it is not compiling that is timed
}
"""What the process of an arm needs besides the environment of its parent."""

ARM_DEFAULTS = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # JAX's own is 0.75
"""What it gets unless the parent has it: an arm is alone on its device."""


@dataclass(frozen=True)
class Measurement:
    """What one arm of a benchmark found.

    Attributes:
      device: the device's name.
      attention: the attention back end that ran.
      pictures_per_second: batch over the median time of a call.
      seconds: time of every timed call.
      compile_seconds: tracing, lowering and compiling.
      predicted_bytes: peak memory by the compiler's own analysis: arguments, outputs, temporaries.
      peak_bytes: peak memory which the device reports for the whole process; None where it reports
        none (CPU).
    """

    device: str
    attention: str
    pictures_per_second: float
    seconds: tuple[float, ...]
    compile_seconds: float
    predicted_bytes: int
    peak_bytes: int | None


def measure(
    sampler: Sampler,
    batch: int,
    repeats: int = 3,
    decode: bool = True,
    trace: str | os.PathLike[str] | None = None,
) -> Measurement:
    """Time ``sampler`` with random weights and the model's own example.

    Peak memory is that of the whole process so far: see ``measure_in_new_process``.

    Args:
      sampler: what to run.
      batch: pictures per call.
      repeats: timed calls, after one that is not counted.
      decode: turn tokens into pictures, or run the transformer alone.
      trace: folder into which one more call is traced, see ``reports.kernels``; None for none.

    Raises:
      OutOfMemoryError: if the device has too little memory.
    """
    try:
        return _measure(sampler, batch, repeats, decode, trace)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(f"not enough memory for {batch} pictures at once") from error


def measure_in_new_process(
    sampler: Sampler,
    batch: int,
    repeats: int = 3,
    decode: bool = True,
    trace: str | os.PathLike[str] | None = None,
) -> Measurement:
    """Call ``measure`` in a process of its own, so that memory and compilation are the arm's alone.

    As the process imports the main module again, a script that calls this needs the usual
    ``if __name__ == "__main__"``.

    Raises:
      OutOfMemoryError: if the device, or the machine, has too little memory.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with _environment(), ProcessPoolExecutor(1, context) as executor:
            return executor.submit(measure, sampler, batch, repeats, decode, trace).result()
    except BrokenProcessPool as error:
        raise OutOfMemoryError(
            "the process of the benchmark was killed, most likely for want of memory"
        ) from error


@contextmanager
def _environment() -> Iterator[None]:
    changed = ARM_DEFAULTS | {name: os.environ[name] for name in ARM_DEFAULTS.keys() & os.environ}
    changed |= ARM_ENVIRONMENT
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measure(
    sampler: Sampler,
    batch: int,
    repeats: int,
    decode: bool,
    trace: str | os.PathLike[str] | None,
) -> Measurement:
    model = sampler.model
    put = put_on(sampler.mesh)
    params = random_params(model, dtype=sampler.dtype, parts=("transformer", "tokenizer"), put=put)
    conditions = model.conditions(None)
    controls = model.controls(sampler.plan.schedule, model.drawing)
    drawer = Drawer(sampler, params, conditions, controls, batch, decode=decode)
    batch = drawer.batch
    condition, keys = conditions.batch(np.arange(batch)), picture_keys(jax.random.key(0), batch)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(drawer.call(params, condition, keys, controls))
        seconds.append(time.perf_counter() - start)
    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    if trace is not None:
        with jax.profiler.trace(trace):
            jax.block_until_ready(drawer.call(params, condition, keys, controls))
    return Measurement(
        device=device.device_kind,
        attention=choose_implementation(
            sampler.attention, sampler.activation_dtype, sampler.shape.head_dim
        ),
        pictures_per_second=batch / sorted(seconds[1:])[repeats // 2],
        seconds=tuple(seconds[1:]),
        compile_seconds=drawer.compile_seconds,
        predicted_bytes=max(map(_predicted_bytes, drawer.programs)),
        peak_bytes=statistics.get("peak_bytes_in_use"),
    )


def _predicted_bytes(program: jax.stages.Compiled) -> int:
    """Return the compiler's own analysis of the memory that a program needs."""
    analysis: Any = program.memory_analysis()
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
