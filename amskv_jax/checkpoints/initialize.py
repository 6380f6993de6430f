"""Random weights: what a checkpoint can be made of before trained ones are at hand."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from amskv_jax.checkpoints.info import CheckpointInfo
from amskv_jax.checkpoints.weights import put_weight, storage_dtype
from amskv_jax.checkpoints.writer import CheckpointWriter
from amskv_jax.models.kinds import param_shapes
from amskv_jax.models.protocol import Model
from amskv_jax.precision import activation_dtype

MOST_NUMBERS = 1048573
"""Random numbers that are drawn for one parameter; larger ones repeat them.

A prime, so that the rows of no matrix are alike. It saves most of the time, and the weights of
large models are as good to try things with.
"""


def random_leaves(
    config: Any, generator: np.random.Generator, dtype: str = "float32"
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield random weights of a part, one parameter after the other: (path, array).

    Kernels keep the variance of their input.

    Args:
      config: the part's configuration.
      generator: of the random numbers.
      dtype: see ``weights.storage_dtype``.

    Raises:
      AmskvError: if the dtype is unknown.
    """
    for path, shape in param_shapes(config).items():
        yield path, _values(generator, path, shape, storage_dtype(path, dtype))


def random_params(
    model: Model,
    seed: int = 0,
    dtype: str = "float32",
    *,
    parts: Iterable[str] | None = None,
    put: Callable[[str, np.ndarray], Any] = lambda path, leaf: leaf,
) -> dict[str, Any]:
    """Return random weights of a model, a tree of arrays for every part.

    Pictures made with them are noise.

    Args:
      model: kind and shape of the model.
      seed: of the random numbers.
      dtype: see ``weights.put_weight``.
      parts: which are wanted; by default all.
      put: what becomes of every parameter, given its "part/path" and values, before the next is
        made, such as ``mesh.MeshShape.place``.

    Raises:
      AmskvError: if the dtype is unknown.
    """
    generator = np.random.default_rng(seed)
    params = {
        f"{part}/{path}": put_weight(f"{part}/{path}", leaf, dtype, put)
        for part in (model.parts if parts is None else parts)
        for path, leaf in random_leaves(model.parts[part], generator, activation_dtype(dtype))
    }
    return unflatten_dict(params, sep="/")


def init_checkpoint(
    model: Model,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: str = "float32",
) -> CheckpointInfo:
    """Write a checkpoint with random weights.

    Args:
      model: kind and shape, such as ``configs.get("var-tiny").model``.
      directory: the folder to make; it must not exist or be empty.
      seed: see ``random_params``.
      dtype: see ``weights.storage_dtype``.

    Raises:
      AmskvError: if the dtype is unknown, or the folder cannot be made.
    """
    generator = np.random.default_rng(seed)
    with CheckpointWriter(directory, model, dtype) as writer:
        for part, config in model.parts.items():
            writer.add(part, random_leaves(config, generator, dtype))
    return writer.info


def _values(
    generator: np.random.Generator, path: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    name = path.rpartition("/")[2]
    if name.endswith("bias"):
        return np.zeros(shape, dtype)
    if name == "scale":
        return np.ones(shape, dtype)
    if name == "log_temperature":
        return np.full(shape, math.log(4), dtype)
    fan_in = 4  # embeddings
    if name.endswith("kernel"):
        stacked = len(shape) in (3, 5)  # linear layers, convolutions
        fan_in = math.prod(shape[stacked:-1])
    count = min(math.prod(shape), MOST_NUMBERS)
    numbers = generator.standard_normal(count, np.float32) / np.float32(math.sqrt(fan_in))
    return np.resize(numbers.astype(dtype), shape)
