"""Measuring speed and memory of a sampler with random weights, one arm per fresh process."""

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from amskv_jax.attention import choose_implementation
from amskv_jax.checkpoint import param_shapes
from amskv_jax.generate import Sampler, picture_keys


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


def random_params(sampler: Sampler, seed: int = 0) -> Any:
    """Return random weights for a sampler, made on the default device in the sampler's dtype."""
    shapes = {
        f"{part}/{path}": shape
        for part, config in (
            ("transformer", sampler.transformer),
            ("tokenizer", sampler.tokenizer),
        )
        for path, shape in param_shapes(config).items()
    }

    @lru_cache
    def maker(shape: tuple[int, ...]) -> Any:
        deviation = 1.0 if len(shape) < 2 else shape[-2] ** -0.5
        return jax.jit(lambda key: deviation * jax.random.normal(key, shape, sampler.dtype))

    keys = jax.random.split(jax.random.key(seed), len(shapes))
    params = {
        path: maker(shape)(key) for (path, shape), key in zip(shapes.items(), keys, strict=True)
    }
    return unflatten_dict(params, sep="/")


def measure(sampler: Sampler, batch: int, repeats: int = 3) -> Measurement:
    """Time ``sampler`` with random weights and labels.

    Start a fresh process for every arm, with ``XLA_PYTHON_CLIENT_PREALLOCATE=false``, or peak
    memory is that of the largest arm so far.

    Args:
      sampler: what to run.
      batch: pictures per call.
      repeats: timed calls, after one that is not counted.
    """
    params = random_params(sampler)
    labels = jnp.arange(batch, dtype=jnp.int32) % sampler.transformer.num_classes
    keys = picture_keys(jax.random.key(0), batch)
    start = time.perf_counter()
    compiled = type(sampler).__call__.lower(sampler, params, labels, keys, 1.5).compile()
    compile_seconds = time.perf_counter() - start
    analysis: Any = compiled.memory_analysis()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, labels, keys, 1.5))
        seconds.append(time.perf_counter() - start)
    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    return Measurement(
        device=device.device_kind,
        attention=choose_implementation(
            sampler.attention, sampler.dtype, sampler.transformer.head_dim
        ),
        pictures_per_second=batch / sorted(seconds[1:])[repeats // 2],
        seconds=tuple(seconds[1:]),
        compile_seconds=compile_seconds,
        predicted_bytes=analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes,
        peak_bytes=statistics.get("peak_bytes_in_use"),
    )
