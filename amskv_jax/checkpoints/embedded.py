"""What comes with the package: models, their layer statistics, classifiers to judge them by."""

import os
from collections.abc import Sequence
from pathlib import Path

from amskv_jax.checkpoints.address import Address, is_address
from amskv_jax.checkpoints.hub import fetch_checkpoint, fetch_stats
from amskv_jax.errors import AmskvError

DEFAULT_MODEL = "var-cifar10"
"""The embedded model which is taken where no checkpoint is named."""
WEIGHTS = Path(__file__).parents[1] / "weights"
"""Packed checkpoints of embedded models; below it, their statistics, and classifiers."""
CLASSIFIERS: dict[tuple[str, ...], str] = {
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"): (
        "cifar10.safetensors"
    )
}
"""Names of a model's classes -> the file of a classifier that tells them apart."""


def embedded_models() -> list[str]:
    """Return the names of the models that come with the package, sorted."""
    return sorted(path.stem.replace("_", "-") for path in WEIGHTS.glob("*.safetensors"))


def find_checkpoint(name: str | os.PathLike[str] | None) -> Path:
    """Return where a checkpoint is.

    Args:
      name: its folder or file, an address of the Hugging Face hub (see ``address.Address``), or the
        name of an embedded model; None for the default model.

    Raises:
      AmskvError: if the default model is asked for, but is not in this installation; or if the hub
        does not have the checkpoint, or cannot be reached.
    """
    if name is not None and is_address(name):
        return fetch_checkpoint(Address.parse(name))
    if name is None:
        name = DEFAULT_MODEL
        if name not in embedded_models():
            raise AmskvError(f"the model {name} is not in {WEIGHTS}: install the package again")
    return _find(name, WEIGHTS, ".safetensors")


def find_stats(name: str | os.PathLike[str]) -> Path:
    """Return where layer statistics are.

    Args:
      name: their file, an address of the Hugging Face hub, or the name of an embedded model.

    Raises:
      AmskvError: if the hub does not have them, or cannot be reached.
    """
    if is_address(name):
        return fetch_stats(Address.parse(name))
    return _find(name, WEIGHTS / "stats", ".npz")


def find_classifier(classes: Sequence[str]) -> Path:
    """Return the embedded classifier of these classes.

    Args:
      classes: their names, as a checkpoint has them.

    Raises:
      AmskvError: if there is none.
    """
    file = CLASSIFIERS.get(tuple(classes))
    if file is None:
        raise AmskvError(
            "no classifier of the model's classes comes with the package: train one with `amskv "
            "train classifier`, and give its file with --classifier"
        )
    return WEIGHTS / "classifiers" / file


def _find(name: str | os.PathLike[str], folder: Path, suffix: str) -> Path:
    """Return an embedded model's file in ``folder``; a path stays what it is, and comes first."""
    if str(name) in embedded_models() and not Path(name).exists():
        return folder / f"{str(name).replace('-', '_')}{suffix}"
    return Path(name)
