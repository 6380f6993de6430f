"""Checkpoints in one small file.

A packed checkpoint is a .safetensors file: compressed weights (see ``compression``) and, among its
metadata, what ``config.json`` says in a checkpoint folder. It is read wherever a folder is.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from amskv_jax.checkpoints.compression import FILE, compress, decompress, write_compressed
from amskv_jax.checkpoints.folder import read_file, read_info, read_leaves
from amskv_jax.checkpoints.info import CheckpointInfo, check_classes, info_to_json
from amskv_jax.checkpoints.weights import Fingerprint, check_shapes, model_shapes
from amskv_jax.errors import AmskvError
from amskv_jax.models.guidance import Drawing, PerScale
from amskv_jax.models.protocol import Model


def pack_model(
    path: str | os.PathLike[str],
    model: Model,
    params: Mapping[str, Any],
    classes: Sequence[str] = (),
    drawing: Drawing | None = None,
) -> CheckpointInfo:
    """Write a packed checkpoint; arguments are those of ``folder.save_checkpoint``.

    Returns:
      What the file says about itself. Its weights are float32 and not quite those that were given,
      so they have other fingerprints.

    Raises:
      AmskvError: if parameters and shapes disagree, weights cannot be compressed, or the file
        exists or cannot be written.
    """
    check_classes(model, classes)
    flat = flatten_dict(params, sep="/")
    shapes = {name: np.shape(leaf) for name, leaf in flat.items()}
    check_shapes(model_shapes(model), shapes, "the parameter tree")
    info = CheckpointInfo(
        model, "float32", "", classes=tuple(classes), drawing=drawing or model.drawing
    )
    return _pack(Path(path), info, flat.items(), {})


def pack_checkpoint(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    cfg: PerScale | None = None,
) -> CheckpointInfo:
    """Write a checkpoint folder as a packed checkpoint; see ``pack_model``.

    Without ``cfg``, the strength of guidance that suits the model stays what the folder says.
    """
    info = read_info(source)
    if cfg is not None:
        info = replace(info, drawing=replace(info.drawing, cfg=cfg))
    files = {name: read_file(source, name) for name in info.files}
    return _pack(Path(path), info, read_leaves(source, info), files)


def _pack(
    path: Path,
    info: CheckpointInfo,
    leaves: Iterable[tuple[str, Any]],
    files: Mapping[str, bytes],
) -> CheckpointInfo:
    if path.suffix != ".safetensors" or path.exists():
        problem = "exists" if path.exists() else "does not end in .safetensors"
        raise AmskvError(f"{path} {problem}: choose another name")
    digest = Fingerprint()
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in leaves:
        compressed = compress({name: leaf})
        (weights,) = flatten_dict(decompress(compressed)).values()
        digest.add(name, weights)
        arrays |= compressed
    info = replace(
        info,
        dtype="float32",
        fingerprint=digest.of_model(info.model),
        fingerprints={part: digest.of_part(part) for part in info.configs},
    )
    arrays |= {FILE + name: np.frombuffer(text, np.uint8) for name, text in files.items()}
    write_compressed(path, arrays, info_to_json(info))
    return info
