"""Random weights: what a checkpoint can be made of before trained ones are at hand."""

import math
import os
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from amskv_jax.checkpoints.folder import (
    CheckpointInfo,
    PartConfig,
    param_shapes,
    save_checkpoint,
    storage_dtype,
)
from amskv_jax.configs import ModelConfig


def random_params(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
    """Return random weights of a model, {"transformer": ..., "tokenizer": ...}, as NumPy arrays.

    Kernels keep the variance of their input. Pictures made with them are noise.

    Args:
      config: the model.
      seed: of the random numbers.
      dtype: see ``checkpoint.storage_dtype``.

    Raises:
      AmskvError: if the dtype is unknown.
    """
    generator = np.random.default_rng(seed)
    parts = {"transformer": config.transformer, "tokenizer": config.tokenizer}
    params = {
        f"{part}/{path}": _values(generator, path, shape).astype(storage_dtype(path, dtype))
        for part, part_config in parts.items()
        for path, shape in param_shapes(part_config).items()
    }
    return unflatten_dict(params, sep="/")


def init_checkpoint(
    config: ModelConfig,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: str = "float32",
) -> CheckpointInfo:
    """Write a checkpoint with random weights.

    Args:
      config: the model, such as ``configs.get("var-tiny")``.
      directory: the folder to make; it must not exist or be empty.
      seed: see ``random_params``.
      dtype: see ``checkpoint.storage_dtype``.

    Raises:
      AmskvError: if the dtype is unknown, or the folder cannot be made.
    """
    parts: dict[str, PartConfig] = {
        "transformer": config.transformer,
        "tokenizer": config.tokenizer,
    }
    return save_checkpoint(directory, parts, random_params(config, seed, dtype))


def _values(generator: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    name = path.rpartition("/")[2]
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    if name == "scale":
        return np.ones(shape, np.float32)
    if name == "log_temperature":
        return np.full(shape, math.log(4), np.float32)
    fan_in = 4  # embeddings
    if name.endswith("kernel"):
        stacked = len(shape) in (3, 5)  # linear layers, convolutions
        fan_in = math.prod(shape[stacked:-1])
    return generator.standard_normal(shape, np.float32) / np.float32(math.sqrt(fan_in))
