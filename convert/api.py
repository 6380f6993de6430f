"""Conversion of whole checkpoints, from the reference's files and back.

Tensors are read one at a time and written part after part: besides a gigabyte of small ones, no
more than twice the largest parameter is held.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from amskv_jax.checkpoints.folder import check_checkpoint, read_file, read_leaves
from amskv_jax.checkpoints.info import CheckpointInfo
from amskv_jax.checkpoints.weights import storage_dtype
from amskv_jax.checkpoints.writer import CheckpointWriter
from amskv_jax.convert import bsq, infinity, t5, var, vqvae
from amskv_jax.convert.architecture import Architecture, Found
from amskv_jax.convert.download import Report, fetch_source
from amskv_jax.convert.read import Source, read_state_dict
from amskv_jax.convert.table import Shape, StateDict, entries_of
from amskv_jax.convert.write import writing_safetensors
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.files import check_new_directory, new_directory
from amskv_jax.models.kinds import find_kind, make_model, optional_parts, part_types

Progress = Callable[[str, float], None]
"""Told what is being done and how much of it is done, from 0 to 1."""

ARCHITECTURES: dict[str, dict[str, Architecture[Any]]] = {
    "var": {"transformer": var.VAR, "tokenizer": vqvae.VQVAE},
    "infinity": {
        "transformer": infinity.INFINITY,
        "tokenizer": bsq.BSQ,
        "text_encoder": t5.T5,
    },
}
"""How the parts of every kind of model are converted, those first which tell about the others."""


def refuse_others(architecture: Architecture[Any], keys: Collection[str], source: str) -> None:
    """Raise an AmskvError if the keys in ``source`` are those of another known architecture."""
    if architecture.keys[0] in keys:
        return
    for other in (other for parts in ARCHITECTURES.values() for other in parts.values()):
        if other.keys[0] in keys:
            raise AmskvError(f"{source} holds {other.name}, expected {architecture.name}")


def architecture_of(config_type: type[Any]) -> Architecture[Any]:
    """Return how the part with configurations of this class is converted.

    Raises:
      AmskvError: if it is not.
    """
    for kind, parts in ARCHITECTURES.items():
        types = part_types(find_kind(kind))
        for part, architecture in parts.items():
            if types[part] is config_type:
                return architecture
    raise AmskvError(f"nothing is known about converting a {config_type.__name__}")


def to_params(state: StateDict, config: Any, dtype: str = "float32") -> dict[str, Any]:
    """Return the parameter tree (NumPy) of a state dict of the PyTorch reference.

    Args:
      state: the reference's entries, buffers allowed.
      config: the shape of the part, such as a transformer's.
      dtype: "float32" or "bfloat16", see ``weights.storage_dtype``.

    Raises:
      AmskvError: if the state dict does not fit ``config``, or a weight is not finite.
    """
    return architecture_of(type(config)).to_params(state, config, dtype)


def to_state_dict(params: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
    """Return the reference's state dict of a parameter tree, with the buffers it expects.

    Raises:
      AmskvError: if the parameters do not fit ``config``.
    """
    return architecture_of(type(config)).to_state_dict(params, config)


def convert(
    kind: str,
    sources: Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    settings: Mapping[str, Any] | None = None,
    keep_not_finite: bool = False,
    progress: Progress | None = None,
) -> CheckpointInfo:
    """Convert a model of the PyTorch reference to a checkpoint of this package.

    Args:
      kind: of the model, a key of ``ARCHITECTURES``.
      sources: file or folder of every part, see ``read.read_state_dict``, or its address on the
        Hugging Face hub, see ``fetch_sources``. One file can hold several parts. Parts which the
        kind can lack may be missing.
      out: the folder to make; it must not exist or be empty.
      dtype: "float32" or "bfloat16", see ``weights.storage_dtype``.
      settings: what neither shapes nor files tell about the model, by the reference's names.
      keep_not_finite: take weights that hold NaN or infinity.
      progress: told what is being done.

    Returns:
      What the checkpoint says about itself.

    Raises:
      AmskvError: if a file cannot be read, is of another architecture, has missing, unexpected or
        misshaped entries or such as are not finite, or the output cannot be written; nothing is
        left behind then.
    """
    check_new_directory(Path(out))
    storage_dtype("", dtype)  # complains about an unknown type before anything is read
    architectures = _architectures(kind, sources)
    opened, found = _open(architectures, fetch_sources(kind, sources), settings or {})
    configs = {part: known.config for part, known in found.items()}
    for part, source in opened.items():
        architecture = architectures[part]
        architecture.check(architecture.weights(source.state), configs[part], str(source.path))
    del source
    model = make_model(kind, configs)
    files = {
        name: _beside(opened[part].path, name)
        for part, architecture in architectures.items()
        for name in architecture.files
    }
    with CheckpointWriter(out, model, dtype) as writer:
        for part, config in configs.items():
            source = opened.pop(part)
            weights = architectures[part].weights(source.state)
            leaves = architectures[part].leaves(
                source.state,
                config,
                dtype,
                str(source.path),
                keep_not_finite=keep_not_finite,
                progress=_share(weights, f"converting {part}", progress),
            )
            writer.add(part, leaves)
            del source, weights, leaves  # so that the file is closed
        for name, content in files.items():
            writer.add_file(name, content)
    return writer.info


def fetch_sources(
    kind: str,
    sources: Mapping[str, str | os.PathLike[str]],
    report: Report | None = None,
) -> dict[str, Path]:
    """Download what is to be converted, as far as it lies on the Hugging Face hub.

    Args:
      kind: of the model, a key of ``ARCHITECTURES``.
      sources: file or folder of every part, or an address, see ``checkpoints.address.Address``.
      report: told which files have no checksum in their address, and which one they have.

    Returns:
      Files and folders of this machine.

    Raises:
      AmskvError: if a file cannot be had, or has another checksum than its address says.
    """
    return {
        part: fetch_source(sources[part], architecture.files, report)
        for part, architecture in _architectures(kind, sources).items()
    }


def convert_var(
    transformer: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    patch_nums: Sequence[int] | None = None,
    keep_not_finite: bool = False,
    progress: Progress | None = None,
) -> CheckpointInfo:
    """Convert a VAR transformer and its tokenizer; see ``convert``.

    Args:
      transformer: file or folder with the transformer, see ``read.read_state_dict``.
      tokenizer: the same for the tokenizer; one training checkpoint can hold both.
      out: the folder to make; it must not exist or be empty.
      dtype: "float32" or "bfloat16", see ``weights.storage_dtype``.
      patch_nums: sides of the token maps, where neither shapes nor the file tell them.
      keep_not_finite: take weights that hold NaN or infinity.
      progress: told what is being done.
    """
    return convert(
        "var",
        {"transformer": transformer, "tokenizer": tokenizer},
        out,
        dtype=dtype,
        settings={"patch_nums": patch_nums} if patch_nums else None,
        keep_not_finite=keep_not_finite,
        progress=progress,
    )


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> list[str]:
    """Write a checkpoint as the PyTorch reference's state dicts.

    The folder gets a file for every part, such as transformer.safetensors. They hold every buffer
    too, so that the reference loads them strictly; ``ema_vocab_hit_SV``, a training statistic that
    conversion drops, is zero. A VAR tokenizer with one phi convolution per scale is written as the
    equivalent ``share_quant_resi`` = number of scales.

    Args:
      checkpoint: a folder or file made by this package.
      out: the folder to make; it must not exist or be empty.
      progress: told what is being done.

    Returns:
      The names of the files.

    Raises:
      AmskvError: if the checkpoint cannot be read or the output not be written; nothing is left
        behind then.
    """
    check_new_directory(Path(out))
    info = check_checkpoint(checkpoint)
    tensors = {part: _tensors(config, info.dtype) for part, config in info.configs.items()}
    total = {part: sum(_bytes(*tensor) for tensor in t.values()) for part, t in tensors.items()}
    with new_directory(Path(out), sum(total.values())) as temporary:
        for part, config in info.configs.items():
            with _reported(f"writing {part}", progress):
                leaves = (
                    (path.removeprefix(f"{part}/"), leaf)
                    for path, leaf in read_leaves(checkpoint, info, [part])
                )
                file = temporary / f"{part}.safetensors"
                with writing_safetensors(file, tensors[part]) as writer:
                    for key, value in _entries(config, leaves):
                        writer.write(key, value)
        for name in info.files:
            (temporary / name).write_bytes(read_file(checkpoint, name))
        return sorted(path.name for path in temporary.iterdir())


def _architectures(kind: str, parts: Mapping[str, Any]) -> dict[str, Architecture[Any]]:
    """Return how the parts are converted for which there are sources, in the table's order."""
    if kind not in ARCHITECTURES:
        raise UsageError(f"cannot convert {kind!r}: expected {' or '.join(ARCHITECTURES)}")
    known = ARCHITECTURES[kind]
    missing = known.keys() - parts.keys() - optional_parts(find_kind(kind))
    unknown = parts.keys() - known.keys()
    for part in sorted(missing | unknown):
        problem = "there is no file of its" if part in missing else "it has no"
        raise UsageError(
            f"a model of the kind {kind} has the parts {', '.join(known)}: {problem} {part}"
        )
    return {part: architecture for part, architecture in known.items() if part in parts}


def _open(
    architectures: Mapping[str, Architecture[Any]],
    sources: Mapping[str, str | os.PathLike[str]],
    settings: Mapping[str, Any],
) -> tuple[dict[str, Source], dict[str, Found]]:
    """Return the state dict of every part, and what it says about the part."""
    opened: dict[str, Source] = {}
    found: dict[str, Found] = {}
    for part, architecture in architectures.items():
        source = read_state_dict(sources[part], architecture.keys)
        source = replace(source, settings={**source.settings, **settings})
        keys = source.state.keys() | architecture.weights(source.state).keys()
        refuse_others(architecture, keys, str(source.path))
        assert architecture.infer is not None
        found[part] = Found(architecture.infer(source, found), source.settings)
        opened[part] = source
    return opened, found


def _beside(path: Path, name: str) -> bytes:
    """Return a small file in the folder of a part's weights."""
    file = (path if path.is_dir() else path.parent) / name
    try:
        return file.read_bytes()
    except OSError as error:
        raise AmskvError(
            f"{file} cannot be read ({error.strerror}): it belongs to the weights in {path}"
        ) from error


def _tensors(config: Any, dtype: str) -> dict[str, tuple[Shape, np.dtype]]:
    """Return shape and type of all that the reference has of a part."""
    architecture = architecture_of(type(config))
    shapes = architecture.shapes(config)
    result = {
        key: (shapes[key], storage_dtype(path, dtype))
        for path, places in architecture.table.places(shapes).items()
        for key in places
    }
    result |= {key: (b.shape, b.dtype) for key, b in architecture.buffers(config).items()}
    return result | {alias: result[name] for alias, name in architecture.aliases.items()}


def _entries(
    config: Any, leaves: Iterator[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the reference's entries of a part's parameters, and its buffers."""
    architecture = architecture_of(type(config))
    places = architecture.table.places(architecture.shapes(config))
    for path, leaf in leaves:
        for key, value in entries_of(leaf, places[path]):
            yield key, value
            for alias, name in architecture.aliases.items():
                if name == key:
                    yield alias, value
        del leaf
    yield from architecture.buffers(config).items()


def _bytes(shape: Shape, dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _share(weights: StateDict, what: str, progress: Progress | None) -> Callable[[int], None]:
    """Return what is told the bytes that were read, and reports their share."""
    total, done = sum(tensor.nbytes for tensor in weights.values()), 0

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress:
            progress(what, done / total)

    return report


@contextmanager
def _reported(what: str, progress: Progress | None) -> Iterator[None]:
    if progress:
        progress(what, 0.0)
    yield
    if progress:
        progress(what, 1.0)
