"""Checkpoints: a folder with the weights (orbax) and ``config.json``, which says what they are.

A folder is written under a temporary name beside its place and then renamed, so it is there whole
or not at all. The weights lie in ``params`` as one tree, {"transformer": ..., "tokenizer": ...}.

Where a checkpoint is read, it may also be a single file with compressed weights, see ``packed``.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from amskv_jax.checkpoints.compression import read_compressed, read_description
from amskv_jax.checkpoints.info import (
    CheckpointInfo,
    PartConfig,
    check_classes,
    check_configs,
    info_from_json,
    info_to_json,
    kind_of,
)
from amskv_jax.errors import AmskvError
from amskv_jax.files import check_new_directory, new_directory, write_text
from amskv_jax.models.var.config import VARConfig
from amskv_jax.models.var.transformer import VAR
from amskv_jax.models.var.vqvae import VQVAE

DTYPES = ("float32", "bfloat16")
ALWAYS_FLOAT32 = {"quantizer", "log_temperature"}
"""Parameters which stay float32 in bfloat16 checkpoints: small, and rounding them moves tokens."""

FINGERPRINT_SAMPLES = 4096
MAX_REPORTED = 20


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what they are.

    Attributes:
      info: as stored; ``info.dtype`` is that of the file even if the weights were cast.
      params: one parameter tree per part, of arrays on JAX's default device.
    """

    info: CheckpointInfo
    params: dict[str, Any]


def save_checkpoint(
    directory: str | os.PathLike[str],
    configs: Mapping[str, PartConfig],
    params: Mapping[str, Any],
    classes: Sequence[str] = (),
) -> CheckpointInfo:
    """Write a checkpoint.

    Args:
      directory: the folder to make; it must not exist or be empty.
      configs: the shape of every part, {"transformer": VARConfig(...), "tokenizer": ...}.
      params: the parameter tree of every part. Leaves are NumPy or JAX arrays, stored as they are:
        of one type, float32 or bfloat16, but for those that ``storage_dtype`` keeps in float32.
      classes: names of the classes, where they are known.

    Raises:
      AmskvError: if the folder exists, parameters and shapes disagree, or writing fails; nothing is
        left behind.
    """
    directory = Path(directory)
    check_new_directory(directory)
    configs = dict(configs)
    kind = kind_of(configs)
    check_configs(configs)
    check_classes(configs, classes)
    flat = flatten_dict(params, sep="/")
    check_shapes(configs, {path: leaf.shape for path, leaf in flat.items()}, "the parameter tree")
    dtypes = {path: str(leaf.dtype) for path, leaf in flat.items()}
    dtype = next((dtype for dtype in dtypes.values() if dtype != "float32"), "float32")
    expected = {path: str(storage_dtype(path, dtype)) for path in flat}
    if dtypes != expected:
        wrong = [path for path in flat if dtypes[path] != expected[path]]
        raise AmskvError(
            f"cannot store {wrong[0]} as {dtypes[wrong[0]]}: expected {expected[wrong[0]]} "
            f"({len(wrong)} such parameters)"
        )
    info = CheckpointInfo(kind, configs, dtype, fingerprint(params), tuple(classes))
    num_bytes = sum(leaf.nbytes for leaf in flat.values())
    with new_directory(directory, num_bytes) as temporary:
        # Weights hardly compress, and compressing them holds them in memory twice more.
        with _quiet(), ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
            checkpointer.save(temporary.absolute() / "params", dict(params))
        write_text(temporary / "config.json", info_to_json(info))
    return info


def read_info(directory: str | os.PathLike[str]) -> CheckpointInfo:
    """Read what a checkpoint says about itself, without its weights.

    Raises:
      AmskvError: if the folder is no checkpoint, or one of a newer version.
    """
    path = Path(directory)
    if path.is_file():
        return info_from_json(read_description(path), str(path))
    path /= "config.json"
    try:
        return info_from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise AmskvError(
            f"{directory} is not a checkpoint: {path.name} cannot be read ({error.strerror}). "
            "Weights of the PyTorch reference are to be converted first"
        ) from error


def read_params(directory: str | os.PathLike[str], info: CheckpointInfo) -> dict[str, Any]:
    """Read the weights as NumPy arrays, as they are stored.

    Raises:
      AmskvError: if they are not what ``info`` says, or damaged.
    """
    path, description = Path(directory).absolute(), "config.json"
    if path.is_file():
        params, description = read_compressed(path), "its description"
        found = {name: leaf.shape for name, leaf in flatten_dict(params, sep="/").items()}
        check_shapes(info.configs, found, str(directory))
    else:
        path /= "params"
        params = _read_folder(path, info, str(directory))
    if fingerprint(params) != info.fingerprint:
        raise AmskvError(
            f"the weights in {path} are not those which {description} was written for: "
            "convert or copy the checkpoint again"
        )
    return params


def _read_folder(path: Path, info: CheckpointInfo, source: str) -> dict[str, Any]:
    """Read the folder of weights in a checkpoint which messages call ``source``."""
    try:
        with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            found = flatten_dict(checkpointer.metadata(path).item_metadata.tree, sep="/")
            shapes = {name: tuple(leaf.shape) for name, leaf in found.items()}
            check_shapes(info.configs, shapes, source)
            arguments = unflatten_dict(
                {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in found}, sep="/"
            )
            restored = ocp.args.PyTreeRestore(restore_args=arguments)
            params: dict[str, Any] = checkpointer.restore(path, args=restored)
            return params
    except AmskvError:
        raise
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        reason = str(error).partition("\n")[0]
        raise AmskvError(f"the weights in {path} cannot be read: {reason}") from error


def load_checkpoint(directory: str | os.PathLike[str], dtype: str | None = None) -> Checkpoint:
    """Load a checkpoint onto JAX's default device.

    Args:
      directory: the folder, or the packed file.
      dtype: "float32" or "bfloat16" to cast the weights, see ``storage_dtype``; None leaves them as
        they are stored.

    Raises:
      AmskvError: if the folder is no checkpoint, of a newer version, or damaged.
    """
    info = read_info(directory)
    params = flatten_dict(read_params(directory, info), sep="/")
    for path in params:  # one by one, so that the host never holds everything twice
        target = storage_dtype(path, dtype or info.dtype)
        params[path] = jax.device_put(params[path].astype(target, copy=False))
    return Checkpoint(info, unflatten_dict(params, sep="/"))


def storage_dtype(path: str, dtype: str) -> np.dtype:
    """Return the type in which a checkpoint of ``dtype`` stores the parameter at ``path``.

    It is ``dtype`` itself, except for the few parameters where rounding would change tokens at
    once: the quantiser (codebook and phi) and the attention temperatures.

    Raises:
      AmskvError: if ``dtype`` is neither "float32" nor "bfloat16".
    """
    if dtype not in DTYPES:
        raise AmskvError(f"weights cannot be stored as {dtype}: choose {' or '.join(DTYPES)}")
    return np.dtype(jnp.float32 if ALWAYS_FLOAT32 & set(path.split("/")) else dtype)


def fingerprint(params: Mapping[str, Any]) -> str:
    """Return a short text by which to tell whether something was computed with these weights.

    It is the SHA-256 of all paths, shapes and some thousand values of every parameter, rounded to
    bfloat16: the float32 and the bfloat16 checkpoint of one model have the same.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        values = np.asarray(leaf).reshape(-1)
        # An odd step, so that sizes that are powers of two do not confine the samples to a column.
        samples = values[:: values.size // FINGERPRINT_SAMPLES | 1]
        digest.update(f"{path} {leaf.shape}\n".encode())
        digest.update(samples.astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()[:32]


def describe_differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return lines about all names that are missing, unexpected or of another shape.

    Of each kind the first 20 are listed.
    """
    missing = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    unexpected = [f"unexpected: {name} {found[name]}" for name in found if name not in expected]
    misshaped = [
        f"wrong shape: {name}, expected {shape}, found {found[name]}"
        + (" (transposed)" if found[name] == shape[::-1] else "")
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    lines = []
    for group in (missing, unexpected, misshaped):
        lines += group[:MAX_REPORTED]
        if len(group) > MAX_REPORTED:
            lines.append(f"... and {len(group) - MAX_REPORTED} more {group[0].partition(':')[0]}")
    return lines


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax's threads from printing hundreds of lines beside the error that it raises."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    disabled, logger.disabled = logger.disabled, True
    sys.unraisablehook = without_closed_loops
    try:
        yield
        sys.unraisablehook = hook  # after an error it stays: stragglers complain later
    finally:
        logger.disabled = disabled


@cache
def param_shapes(config: PartConfig) -> dict[str, tuple[int, ...]]:
    """Return what parameters the model of ``config`` has, as {path: shape}."""
    schedule = config.schedule
    module: VAR | VQVAE
    if isinstance(config, VARConfig):
        module = VAR(config)
        later = schedule.total - schedule.tokens[0]
        inputs = [((1,), jnp.int32), ((1, later, config.latent_channels), jnp.float32)]
    else:
        module = VQVAE(config)
        inputs = [((1, *config.picture_size, 3), jnp.float32)]
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    variables = jax.eval_shape(module.init, jax.random.key(0), *structs)
    return {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}


def check_shapes(
    configs: Mapping[str, PartConfig], found: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise an AmskvError unless parameters have the shapes which belong to ``configs``.

    Args:
      configs: the shape of every part.
      found: shapes by path, "transformer/blocks/...".
      source: of the parameters, for the message.
    """
    expected = {
        f"{part}/{path}": shape
        for part, config in configs.items()
        for path, shape in param_shapes(config).items()
    }
    problems = describe_differences(expected, found)
    if problems:
        raise AmskvError(f"{source} does not fit its configuration:\n  " + "\n  ".join(problems))
