"""Conversion of whole checkpoints, from the reference's files and back."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from amskv_jax.checkpoints.folder import (
    CheckpointInfo,
    PartConfig,
    check_configs,
    read_info,
    read_params,
    save_checkpoint,
    storage_dtype,
)
from amskv_jax.convert import var, vqvae
from amskv_jax.convert.architecture import Architecture
from amskv_jax.convert.read import Source, read_state_dict
from amskv_jax.convert.table import StateDict
from amskv_jax.files import check_new_directory, new_directory
from amskv_jax.models.var.config import VARConfig, VQVAEConfig

Progress = Callable[[str, float], None]
"""Told what is being done and how much of it is done, from 0 to 1."""

ARCHITECTURES: dict[type[PartConfig], Architecture[Any]] = {
    VARConfig: var.VAR,
    VQVAEConfig: vqvae.VQVAE,
}


def to_params(state: StateDict, config: PartConfig, dtype: str = "float32") -> dict[str, Any]:
    """Return the parameter tree (NumPy) of a state dict of the PyTorch reference.

    Args:
      state: the reference's entries, buffers allowed.
      config: the shape of the transformer or of the tokenizer.
      dtype: "float32" or "bfloat16", see ``checkpoint.storage_dtype``.

    Raises:
      AmskvError: if the state dict does not fit ``config``.
    """
    return ARCHITECTURES[type(config)].to_params(state, config, dtype)


def to_state_dict(params: Mapping[str, Any], config: PartConfig) -> dict[str, np.ndarray]:
    """Return the reference's state dict of a parameter tree, with the buffers it expects.

    Raises:
      AmskvError: if the parameters do not fit ``config``.
    """
    return ARCHITECTURES[type(config)].to_state_dict(params, config)


def convert_var(
    transformer: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    patch_nums: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> CheckpointInfo:
    """Convert a VAR transformer and its tokenizer to a checkpoint of this package.

    Args:
      transformer: file or folder with the transformer, see ``read.read_state_dict``.
      tokenizer: the same for the tokenizer; one training checkpoint can hold both.
      out: the folder to make; it must not exist or be empty.
      dtype: "float32" or "bfloat16", see ``checkpoint.storage_dtype``.
      patch_nums: sides of the token maps, where neither shapes nor the file tell them.
      progress: told what is being done.

    Returns:
      What the checkpoint says about itself.

    Raises:
      AmskvError: if a file cannot be read, is of another architecture, has missing, unexpected or
        misshaped entries, or the output cannot be written; nothing is left behind then.
    """
    check_new_directory(Path(out))
    storage_dtype("", dtype)  # complains about an unknown type before anything is read
    sources = {
        "transformer": read_state_dict(transformer, var.VAR.keys),
        "tokenizer": read_state_dict(tokenizer, vqvae.VQVAE.keys),
    }
    settings = sources["transformer"].settings
    transformer_config = var.infer_config(
        sources["transformer"].state, patch_nums, settings, str(transformer)
    )
    tokenizer_config = vqvae.infer_config(
        sources["tokenizer"].state,
        transformer_config.schedule,
        settings.get("vae_kwargs"),
        str(tokenizer),
    )
    configs: dict[str, PartConfig] = {
        "transformer": transformer_config,
        "tokenizer": tokenizer_config,
    }
    for part, source in sources.items():
        architecture = ARCHITECTURES[type(configs[part])]
        architecture.check(architecture.weights(source.state), configs[part], str(source.path))
    check_configs(configs)
    del source
    params = {
        # Taken out of the dict, so that the file is unmapped as soon as it is converted.
        part: _convert(sources.pop(part), config, dtype, f"converting {part}", progress)
        for part, config in configs.items()
    }
    with _reported("writing", progress):
        return save_checkpoint(out, configs, params)


def export_var(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint as the PyTorch reference's state dicts.

    The folder gets transformer.safetensors and tokenizer.safetensors. They hold every buffer too,
    so that the reference loads them strictly; ``ema_vocab_hit_SV``, a training statistic that
    conversion drops, is zero. A tokenizer with one phi convolution per scale is written as the
    equivalent ``share_quant_resi`` = number of scales.

    Args:
      checkpoint: a folder made by this package.
      out: the folder to make; it must not exist or be empty.
      progress: told what is being done.

    Raises:
      AmskvError: if the checkpoint cannot be read or the output not be written; nothing is left
        behind then.
    """
    check_new_directory(Path(out))
    info = read_info(checkpoint)
    with _reported("reading", progress):
        params = read_params(checkpoint, info)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with new_directory(Path(out), num_bytes) as temporary:
        for part, config in info.configs.items():
            with _reported(f"writing {part}", progress):
                state = to_state_dict(params.pop(part), config)
                # The library writes an array's memory, whatever its strides.
                arrays = {key: np.ascontiguousarray(value) for key, value in state.items()}
                file = temporary / f"{part}.safetensors"
                save_file(arrays, file, {"format": "pt"})
                file.chmod(temporary.stat().st_mode & 0o666)  # the library lets only its owner read


def _convert(
    source: Source, config: PartConfig, dtype: str, what: str, progress: Progress | None
) -> dict[str, Any]:
    total, done = sum(array.nbytes for array in source.state.values()), 0

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress:
            progress(what, done / total)

    architecture = ARCHITECTURES[type(config)]
    return architecture.to_params(source.state, config, dtype, str(source.path), report)


@contextmanager
def _reported(what: str, progress: Progress | None) -> Iterator[None]:
    if progress:
        progress(what, 0.0)
    yield
    if progress:
        progress(what, 1.0)
