"""Checkpoints: a folder with the weights (orbax) and ``config.json``, which says what they are.

A folder is written under a temporary name beside its place and then renamed, so it is there whole
or not at all. The weights of every part lie in ``params/<part>``, see ``storage``.

Where a checkpoint is read, it may also be a single file with compressed weights, see ``packed``.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from amskv_jax.checkpoints.compression import CompressedFile, pack_weight
from amskv_jax.checkpoints.info import CheckpointInfo, info_from_json, parse_info
from amskv_jax.checkpoints.storage import GroupedFolders, SingleTree, Storage
from amskv_jax.checkpoints.weights import (
    Fingerprint,
    check_shapes,
    model_shapes,
    packed_stacks,
    put_weight,
    required_parts,
    storage_dtype,
)
from amskv_jax.checkpoints.writer import CheckpointWriter
from amskv_jax.errors import AmskvError
from amskv_jax.files import check_new_directory
from amskv_jax.mesh import MeshShape, put_on
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.kinds import find_kind, part_types
from amskv_jax.models.protocol import Model
from amskv_jax.packed_weight import PackedWeight, widened


@dataclass(frozen=True)
class Checkpoint:
    """Weights and what they are.

    Attributes:
      info: as stored; ``info.dtype`` is that of the file even if the weights were cast.
      params: one parameter tree per part that was asked for, of arrays on the devices.
    """

    info: CheckpointInfo
    params: dict[str, Any]


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: Model,
    params: Mapping[str, Any],
    classes: Sequence[str] = (),
    drawing: Drawing | None = None,
) -> CheckpointInfo:
    """Write a checkpoint of weights that are all at hand; see ``writer`` for others.

    Args:
      directory: the folder to make; it must not exist or be empty.
      model: kind and shape of the model.
      params: the parameter tree of every part. Leaves are NumPy or JAX arrays, stored as they are:
        of one type, float32 or bfloat16, but for those that ``storage_dtype`` keeps in float32.
      classes: names of the classes, where they are known.
      drawing: what suits the model; by default what suits models of its kind.

    Raises:
      AmskvError: if the folder exists, parameters and shapes disagree, or writing fails; nothing is
        left behind.
    """
    check_new_directory(Path(directory))
    flat = flatten_dict(params, sep="/")
    found = {path: leaf.shape for path, leaf in flat.items()}
    check_shapes(model_shapes(model), found, "the parameter tree")
    dtypes = [str(leaf.dtype) for leaf in flat.values()]
    dtype = next((dtype for dtype in dtypes if dtype != "float32"), "float32")
    with CheckpointWriter(directory, model, dtype, classes=classes, drawing=drawing) as writer:
        for part in model.parts:
            writer.add(part, params[part])
    return writer.info


def read_info(directory: str | os.PathLike[str]) -> CheckpointInfo:
    """Read what a checkpoint says about itself, without its weights.

    Raises:
      AmskvError: if the folder is no checkpoint, one of a newer version, or damaged.
    """
    return _opened(directory)[0]


def check_checkpoint(
    directory: str | os.PathLike[str], parts: Iterable[str] | None = None
) -> CheckpointInfo:
    """Read what a checkpoint says about itself, and compare it with the shapes that are stored.

    Args:
      directory: the folder, or the packed file.
      parts: which are looked at; by default all.

    Raises:
      AmskvError: as ``read_info`` does, or if shapes disagree, or a part is not there.
    """
    info, storage = _opened(directory)
    _check_parts(storage, info, list(info.configs if parts is None else parts), str(directory))
    return info


def read_leaves(
    directory: str | os.PathLike[str],
    info: CheckpointInfo,
    parts: Iterable[str] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the weights one by one, as they are stored: ("part/path", array).

    Args:
      directory: the folder, or the packed file.
      info: what ``read_info`` returned.
      parts: which are wanted; by default all. Of a checkpoint of version 1 all are read, as it has
        one fingerprint for all.

    Raises:
      AmskvError: if they are not what ``info`` says, or damaged, or a part is not there. That the
        values are those of the fingerprint shows at the end.
    """
    path = Path(directory)
    storage = _storage(path, _read_content(path)[0])
    for name, leaf in _read_stored(directory, info, storage, parts):
        yield name, widened(leaf)


def _read_stored(
    directory: str | os.PathLike[str],
    info: CheckpointInfo,
    storage: Storage,
    parts: Iterable[str] | None = None,
) -> Iterator[tuple[str, np.ndarray | PackedWeight]]:
    """Yield the weights one by one, those of packed checkpoints packed; see ``read_leaves``.

    Raises:
      AmskvError: if they are not what ``info`` says, or damaged, or a part is not there. That the
        values are those of the fingerprint shows at the end.
    """
    path = Path(directory)
    wanted = list(info.configs if parts is None else parts)
    _check_parts(storage, info, wanted, str(directory))
    read = wanted if info.fingerprints else list(info.configs)
    digest = Fingerprint()
    for part in read:
        for name, leaf in storage.leaves(part):
            digest.add(f"{part}/{name}", widened(leaf))
            if part in wanted:
                yield f"{part}/{name}", leaf
            del leaf
        expected = info.fingerprints.get(part)
        if expected is not None and digest.of_part(part) != expected:
            raise _changed(storage.path / part, path)
    is_whole = set(read) >= set(required_parts(info.model))
    if is_whole and digest.of_model(info.model) != info.fingerprint:
        raise _changed(storage.path, path)


def read_params(
    directory: str | os.PathLike[str],
    info: CheckpointInfo,
    parts: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Return the weights as a tree of NumPy arrays for every part; see ``read_leaves``."""
    return unflatten_dict(dict(read_leaves(directory, info, parts)), sep="/")


def read_file(directory: str | os.PathLike[str], name: str) -> bytes:
    """Return a small file which lies beside the weights, one of ``CheckpointInfo.files``.

    Raises:
      AmskvError: if it is not there.
    """
    path = Path(directory)
    try:
        if path.is_file():
            return CompressedFile(path).file(name)
        return (path / name).read_bytes()
    except (OSError, KeyError) as error:
        raise AmskvError(
            f"{directory} has no {name}: convert or copy the checkpoint again"
        ) from error


def load_checkpoint(
    directory: str | os.PathLike[str],
    dtype: str | None = None,
    parts: Iterable[str] | None = None,
    mesh: MeshShape | None = None,
) -> Checkpoint:
    """Load a checkpoint, or some parts of it, onto the devices.

    Args:
      directory: the folder, or the packed file.
      dtype: "float32", "bfloat16" or "float8" to cast the weights, see ``put_weight``; None leaves
        them as they are stored.
      parts: which are loaded, such as ("transformer", "tokenizer"); by default all.
      mesh: devices among which the weights are shared out, one by one as they are read; by default
        all are put on JAX's default device.

    Raises:
      AmskvError: if the folder is no checkpoint, of a newer version, damaged, or lacks a part.
    """
    info, storage = _opened(directory)
    params, put = {}, put_on(mesh)
    for path, stored in _read_stored(directory, info, storage, parts):
        params[path] = put_weight(path, widened(stored), dtype or info.dtype, put)
        del stored
    return Checkpoint(info, unflatten_dict(params, sep="/"))


def load_on_host(
    directory: str | os.PathLike[str],
    dtype: str | None = None,
    parts: Iterable[str] | None = None,
) -> Checkpoint:
    """Load parts of a checkpoint for a device with little memory: into the host's.

    Kernels that are stacked over layers, nearly all of a transformer, are in 8 bits, as in packed
    checkpoints; those of other checkpoints are rounded so.

    Args:
      directory: the folder, or the packed file.
      dtype: in which the weights are used, see ``load_checkpoint``.
      parts: which are loaded; by default all.

    Raises:
      AmskvError: as ``load_checkpoint`` does.
    """
    info, storage = _opened(directory)
    params: dict[str, Any] = {}
    for path, stored in _read_stored(directory, info, storage, parts):
        target = storage_dtype(path, dtype or info.dtype)
        if packed_stacks(path, stored.shape):
            packed = stored if isinstance(stored, PackedWeight) else pack_weight(path, stored)
            params[path] = packed.replace(dtype=target.name)  # type: ignore[attr-defined]
        else:
            params[path] = widened(stored).astype(target, copy=False)
        del stored
    return Checkpoint(info, unflatten_dict(params, sep="/"))


def _opened(directory: str | os.PathLike[str]) -> tuple[CheckpointInfo, Storage]:
    """Return what ``read_info`` does, and where the weights lie."""
    content, source = _read_content(Path(directory))
    storage = _storage(Path(directory), content)
    stated = content.get("configs")
    parts = [part for part in part_types(find_kind(content["kind"])) if part in (stated or ())]
    sides = [side for part in parts for shape in storage.shapes(part).values() for side in shape]
    return info_from_json(content, source, max(sides, default=0)), storage


def _read_content(path: Path) -> tuple[dict[str, Any], str]:
    """Return what a checkpoint says about itself, and where."""
    if path.is_file():
        return parse_info(CompressedFile(path).description(), str(path)), str(path)
    config = path / "config.json"
    try:
        return parse_info(config.read_text(encoding="utf-8"), str(config)), str(config)
    except OSError as error:
        raise AmskvError(
            f"{path} is not a checkpoint: {config.name} cannot be read ({error.strerror}). "
            "Weights of the PyTorch reference are to be converted first"
        ) from error
    except UnicodeDecodeError as error:
        raise AmskvError(f"{config} is damaged: {error}") from error


def _storage(path: Path, content: Mapping[str, Any]) -> Storage:
    if path.is_file():
        return CompressedFile(path)
    return (SingleTree if content["version"] == 1 else GroupedFolders)(path / "params")


def _check_parts(storage: Storage, info: CheckpointInfo, parts: list[str], source: str) -> None:
    """Raise an AmskvError unless parts are there and have the shapes of their configurations."""
    for part in parts:
        if part not in info.configs:
            raise AmskvError(f"{source} has no {part}: it holds {', '.join(info.configs)}")
    found = {f"{part}/{name}": s for part in parts for name, s in storage.shapes(part).items()}
    check_shapes(model_shapes(info.model, parts), found, source)


def _changed(weights: Path, checkpoint: Path) -> AmskvError:
    description = "its description" if checkpoint.is_file() else "config.json"
    return AmskvError(
        f"the weights in {weights} are not those which {description} was written for: "
        "convert or copy the checkpoint again"
    )
