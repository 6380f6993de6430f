"""Readers of PyTorch checkpoints: .pth files, .safetensors files, folders of the Hugging Face hub.

All give the state dict as NumPy arrays which are views of the memory-mapped file: nothing is read
from the disk before it is used.
"""

import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from amskv_jax.errors import AmskvError

BFLOAT16 = np.dtype(jnp.bfloat16)
SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A state dict and what lay beside it.

    Attributes:
      path: the file or folder.
      state: the entries; arrays are read-only views of the file.
      settings: arguments of the model's constructor, as far as the file or folder tells them.
    """

    path: Path
    state: dict[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)


def read_state_dict(path: str | os.PathLike[str], keys: Sequence[str]) -> Source:
    """Find the state dict of one model in a file or folder.

    It may lie in nested dicts (``state_dict``, ``model``, ``trainer`` / ``var_wo_ddp`` ...), and
    its keys may have a common prefix (``module.``, ``_orig_mod.`` ...).

    Args:
      path: a .pth, .pt, .bin, .ckpt (these need PyTorch) or .safetensors file, or a folder with
        config.json and model.safetensors or pytorch_model.bin, in one piece or in shards.
      keys: names of entries of the model, the most telling first.

    Raises:
      AmskvError: if there is no such file, it is damaged, or holds no or several state dicts.
    """
    path = Path(path)
    content, settings = _read_folder(path) if path.is_dir() else (_read_file(path), {})
    dicts = list(_state_dicts(content))
    for key in keys:
        holders = [
            (names, entries)
            for names, entries in dicts
            if any(entry == key or entry.endswith(f".{key}") for entry in entries)
        ]
        if len(holders) > 1:
            places = ", ".join("/".join(names) for names, _ in holders)
            raise AmskvError(
                f"{path} holds several models: {places}. Save the one to convert alone"
            )
        if holders:
            names, entries = holders[0]
            entry = min((e for e in entries if e == key or e.endswith(f".{key}")), key=len)
            state = _without_prefix(entries, entry.removesuffix(key), path)
            break
    else:
        if len(dicts) != 1:
            found = ", ".join("/".join(names) for names, _ in dicts) or "nothing"
            raise AmskvError(f"{path} holds no {keys[0]}; state dicts in it: {found}")
        names, state = dicts[0]
    arrays = {key: _to_numpy(value, key, path) for key, value in state.items()}
    return Source(path, arrays, settings | _settings_beside(content, names))


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise AmskvError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise AmskvError(
        f"{path} is of an unknown type: expected {', '.join(TORCH_SUFFIXES)} or .safetensors"
    )


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a folder of the hub: its weights, and the constructor's arguments in config.json."""
    config = path / "config.json"
    settings = _read_json(config) if config.exists() else {}
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.exists():
            shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
        elif (path / name).exists():
            shards = [name]
        else:
            continue
        content: dict[str, Any] = {}
        for shard in shards:
            content |= _read_file(path / shard)
        return content, settings
    raise AmskvError(f"{path} is a folder without model.safetensors or pytorch_model.bin")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AmskvError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AmskvError(f"{path} does not hold a JSON object")
    return content


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        import torch  # noqa: PLC0415
    except ImportError as error:
        raise AmskvError(
            f"reading {path} needs PyTorch: pip install 'amskv-jax[convert]', "
            "or give a .safetensors file"
        ) from error
    try:  # only zip files can be mapped; those of PyTorch before 1.6 are none
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # the unpickler and the zip reader raise many types
        reason = str(error).strip().partition("\n")[0][:200]
        raise AmskvError(
            f"{path} cannot be read: it is truncated, damaged, or holds other Python objects than "
            f"tensors ({reason})"
        ) from error
    if not isinstance(content, Mapping):
        raise AmskvError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Map a safetensors file: 8 bytes with the header's length, the header (JSON), the data.

    The safetensors library would copy every tensor to tell its shape and type.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise AmskvError(f"{path} is truncated, or not a safetensors file")
        header_bytes = file.read(start - 8)
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        entries = {
            key: (value["dtype"], tuple(value["shape"]), *value["data_offsets"])
            for key, value in header.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise AmskvError(f"{path} is damaged, or not a safetensors file") from error
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    state = {}
    for key, (dtype_name, shape, begin, end) in entries.items():
        dtype = SAFETENSORS_DTYPES.get(dtype_name)
        if dtype is None:
            raise AmskvError(f"{path}: {key} is of type {dtype_name}, which is not supported")
        if start + end > size:
            raise AmskvError(f"{path} is truncated: {key} ends at byte {start + end} of {size}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise AmskvError(f"{path} is damaged: {key} {shape} has {end - begin} bytes")
        state[key] = np.asarray(data[start + begin : start + end]).view(dtype).reshape(shape)
    return state


def _state_dicts(
    content: Mapping[str, Any], names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield all dicts of arrays in nested dicts, with the names that lead to them."""
    arrays = {key: value for key, value in content.items() if hasattr(value, "shape")}
    if arrays:
        yield names, arrays
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _state_dicts(value, (*names, str(key)))


def _without_prefix(entries: dict[str, Any], prefix: str, path: Path) -> dict[str, Any]:
    state = {key.removeprefix(prefix): value for key, value in entries.items()}
    if len(state) < len(entries):
        raise AmskvError(f"{path} has entries both with and without the prefix {prefix}")
    return state


def _settings_beside(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the dicts called config which lie along the way to a state dict, merged."""
    settings: dict[str, Any] = {}
    for name in names:
        beside = content.get("config")
        settings |= beside if isinstance(beside, Mapping) else {}
        content = content[name]
    return settings


def _to_numpy(value: Any, key: str, path: Path) -> np.ndarray:
    """Return an array or a PyTorch tensor as a NumPy array without copying."""
    if isinstance(value, np.ndarray):
        return value
    import torch  # noqa: PLC0415

    value = value.detach()
    try:
        if value.dtype == torch.bfloat16:  # unknown to NumPy itself
            return value.view(torch.int16).numpy().view(BFLOAT16)
        return value.numpy()
    except (TypeError, RuntimeError) as error:
        raise AmskvError(
            f"{path}: {key} is a {value.layout} tensor of {value.dtype}, which is not supported"
        ) from error
