"""Files of classifiers, whose features and classes the metrics look at."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.features import FeatureNetwork, file_fingerprint
from amskv_jax.files import replacing
from amskv_jax.training.classifier import Classifier, ClassifierConfig, apply_classifier

FORMAT = "amskv_jax.classifier"
VERSION = "1"


def save_classifier(path: Path | str, config: ClassifierConfig, params: Any) -> None:
    """Write a classifier as a safetensors file with its shape; weights are rounded to float16.

    Args:
      path: the file.
      config: the classifier's shape.
      params: its variables; the moments stay float32.

    Raises:
      AmskvError: if it cannot be written; an existing file is replaced whole or not at all.
    """
    path = Path(path)
    tensors = {
        name: np.asarray(value, np.float16 if name.startswith("params/") else np.float32)
        for name, value in flatten_dict(params, sep="/").items()
    }
    metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(asdict(config))}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def load_classifier(path: Path | str) -> FeatureNetwork:
    """Return the feature network which ``save_classifier`` wrote.

    Raises:
      AmskvError: if the file is missing, damaged, of another kind or version.
    """
    path = Path(path)
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fingerprint = file_fingerprint(path)
    except (OSError, SafetensorError) as error:
        raise AmskvError(f"cannot read the classifier {path}: {error}") from error
    found = metadata.get("format"), metadata.get("version")
    if found != (FORMAT, VERSION):
        raise AmskvError(
            f"{path} is {found[0] or 'no classifier'}, version {found[1]}: expected {FORMAT}, "
            f"version {VERSION}, as `amskv train classifier` writes it"
        )
    try:
        config = ClassifierConfig(**json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise AmskvError(f"the classifier {path} is damaged: {error!r}") from error
    expected = jax.eval_shape(Classifier(config).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    shapes = {k: v.shape for k, v in flatten_dict(expected, sep="/").items()}
    if {name: value.shape for name, value in tensors.items()} != shapes:
        raise AmskvError(f"the weights in the classifier {path} do not fit its shape, {config}")
    params = unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in tensors.items()}, sep="/")
    look = partial(apply_classifier, config, params)
    return FeatureNetwork("classifier", fingerprint, config.dimension, config.num_classes, look)
