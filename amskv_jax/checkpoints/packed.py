"""Checkpoints in one small file.

A packed checkpoint is a .safetensors file: compressed weights (see ``compression``) and, among its
metadata, what ``config.json`` says in a checkpoint folder. It is read wherever a folder is.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from amskv_jax.checkpoints.compression import compress, decompress, write_compressed
from amskv_jax.checkpoints.folder import check_shapes, fingerprint, read_info, read_params
from amskv_jax.checkpoints.info import (
    GUIDANCE,
    CheckpointInfo,
    PartConfig,
    check_classes,
    check_configs,
    info_to_json,
    kind_of,
)
from amskv_jax.errors import AmskvError


def pack_model(
    path: str | os.PathLike[str],
    configs: Mapping[str, PartConfig],
    params: Mapping[str, Any],
    classes: Sequence[str] = (),
    guidance: float = GUIDANCE,
) -> CheckpointInfo:
    """Write a packed checkpoint; arguments are those of ``checkpoint.save_checkpoint``.

    ``guidance`` is the strength of guidance that suits the model.

    Returns:
      What the file says about itself. Its weights are float32 and not quite those that were given,
      so they have another fingerprint.

    Raises:
      AmskvError: if parameters and shapes disagree, weights cannot be compressed, or the file
        exists or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or path.exists():
        problem = "exists" if path.exists() else "does not end in .safetensors"
        raise AmskvError(f"{path} {problem}: choose another name")
    kind = kind_of(configs)
    check_configs(configs)
    check_classes(configs, classes)
    shapes = {name: np.shape(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    check_shapes(configs, shapes, "the parameter tree")
    arrays = compress(params)
    found = fingerprint(decompress(arrays))
    info = CheckpointInfo(kind, dict(configs), "float32", found, tuple(classes), guidance)
    write_compressed(path, arrays, info_to_json(info))
    return info


def pack_checkpoint(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    guidance: float | None = None,
) -> CheckpointInfo:
    """Write a checkpoint folder as a packed checkpoint; see ``pack_model``.

    Without ``guidance``, it stays what the folder says.
    """
    info = read_info(source)
    strength = info.guidance if guidance is None else guidance
    return pack_model(path, info.configs, read_params(source, info), info.classes, strength)
