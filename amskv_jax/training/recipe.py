"""From a name or a file to the settings of a training, and from a finished tokenizer on."""

import json
import runpy
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from amskv_jax import configs
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.files import replacing
from amskv_jax.models.kinds import param_shapes
from amskv_jax.models.parts import config_from_json
from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.training.config import TokenizerTraining, TransformerTraining

TOKENIZER_FILE = "tokenizer.safetensors"
"""Weights of a finished tokenizer in the folder of its run."""


@dataclass(frozen=True)
class Recipe:
    """How both parts of a model are trained."""

    tokenizer: TokenizerTraining
    transformer: TransformerTraining


def find_recipe(name: str) -> Recipe:
    """Return the settings that a file holds as TOKENIZER_TRAINING and TRANSFORMER_TRAINING.

    Args:
      name: of a model with a file in this folder, such as "var-cifar10", or a Python file (.py).

    Raises:
      UsageError: if there is no such model or file, or it lacks these settings.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UsageError(f"no such file: {name}")
        found = runpy.run_path(name)
    else:
        configs.get(name)  # refuses names that are not known
        module = f"{__package__}.{name.replace('-', '_')}"
        found = vars(import_module(module)) if find_spec(module) else {}
    tokenizer = found.get("TOKENIZER_TRAINING")
    transformer = found.get("TRANSFORMER_TRAINING")
    if not (
        isinstance(tokenizer, TokenizerTraining) and isinstance(transformer, TransformerTraining)
    ):
        raise UsageError(
            f"{name} says nothing about training: expected TOKENIZER_TRAINING and "
            "TRANSFORMER_TRAINING, as in var-cifar10"
        )
    return Recipe(tokenizer, transformer)


def save_tokenizer(path: Path, config: VQVAEConfig, params: Any) -> None:
    """Write a VQVAE and its shape as a .safetensors file, which is there whole or not at all."""
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(flat, {"config": json.dumps(asdict(config))}))


def load_tokenizer(directory: Path) -> tuple[VQVAEConfig, Any]:
    """Return shape and weights of the tokenizer whose run ended in ``directory``.

    Raises:
      AmskvError: if there is none, or it is damaged.
    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise AmskvError(
            f"{directory} holds no finished tokenizer: expected {TOKENIZER_FILE}, as "
            "`amskv train tokenizer` writes it at the end of a run"
        )
    try:
        with safe_open(path, "numpy") as file:
            config = config_from_json(VQVAEConfig, json.loads(file.metadata()["config"]))
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AmskvError(f"{path} is damaged: {error}") from error
    if {name: array.shape for name, array in flat.items()} != param_shapes(config):
        raise AmskvError(f"{path} is damaged: its weights do not fit its shape")
    return config, unflatten_dict(flat, sep="/")
