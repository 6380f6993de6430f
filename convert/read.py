"""Readers of PyTorch checkpoints: .pth files, .safetensors files, folders of the Hugging Face hub.

All give the state dict as ``Tensor``s: no values are read from the disk before they are used.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amskv_jax.convert.tensors import Tensor, read_safetensors, read_torch
from amskv_jax.errors import AmskvError

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the hub for weights in one piece; those of an index have ".index.json" behind."""


@dataclass(frozen=True)
class Source:
    """A state dict and what lay beside it.

    Attributes:
      path: the file or folder.
      state: the entries.
      settings: arguments of the model's constructor, as far as the file or folder tells them.
    """

    path: Path
    state: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


def read_state_dict(path: str | os.PathLike[str], keys: Sequence[str]) -> Source:
    """Find the state dict of one model in a file or folder.

    It may lie in nested dicts (``state_dict``, ``model``, ``trainer`` / ``var_wo_ddp`` ...), and
    its keys may have a common prefix (``module.``, ``_orig_mod.`` ...).

    Args:
      path: a .pth, .pt, .bin, .ckpt (these need PyTorch) or .safetensors file, or a folder with one
        of these, or with shards of one and their index (*.index.json), and perhaps config.json.
      keys: names of entries of the model, the most telling first.

    Raises:
      AmskvError: if there is no such file, it is damaged, a shard is missing, or it holds no or
        several state dicts.
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
    for key, value in state.items():
        if value.dtype == object:
            raise AmskvError(f"{path}: {key} is a {value.description}, which is not supported")
    return Source(path, state, settings | _settings_beside(content, names))


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise AmskvError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return read_torch(path)
    raise AmskvError(
        f"{path} is of an unknown type: expected {', '.join(TORCH_SUFFIXES)} or .safetensors"
    )


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a folder of the hub: its weights, and the constructor's arguments in config.json."""
    config = path / "config.json"
    settings = _read_json(config) if config.exists() else {}
    content: dict[str, Any] = {}
    for file in _weight_files(path):
        content |= _read_file(file)
    return content, settings


def _weight_files(path: Path) -> list[Path]:
    """Return the files with the weights in a folder."""
    for name in WEIGHTS:
        if (path / f"{name}.index.json").exists():
            return _shards(path / f"{name}.index.json")
        if (path / name).exists():
            return [path / name]
    indices = sorted(path.glob("*.index.json"))
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    for kind in (indices, files):
        if len(kind) == 1:
            return _shards(kind[0]) if kind is indices else kind
        if kind:
            names = ", ".join(file.name for file in kind[:5])
            raise AmskvError(f"{path} holds several files of weights: {names}. Give one of them")
    raise AmskvError(f"{path} is a folder without {' or '.join(WEIGHTS)}")


def shard_names(index: Path) -> list[str]:
    """Return the names of the files in which the weights are, according to an index beside them.

    Raises:
      AmskvError: if it is damaged.
    """
    places = _read_json(index).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) else []
    if not names or any(Path(str(name)).name != name for name in names):
        raise AmskvError(f"{index} is damaged: it does not say in which files the weights are")
    return names


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names."""
    names = shard_names(index)
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise AmskvError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files with the weights: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Download it again"
        )
    return [index.parent / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AmskvError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AmskvError(f"{path} does not hold a JSON object")
    return content


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
