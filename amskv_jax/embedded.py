"""Models that come with the package, as packed checkpoints; the default one among them."""

import os
from pathlib import Path

from amskv_jax.errors import AmskvError

DEFAULT_MODEL = "var-cifar10"
"""The embedded model which is taken where no checkpoint is named."""
WEIGHTS = Path(__file__).parent / "weights"
"""Packed checkpoints of embedded models."""


def embedded_models() -> list[str]:
    """Return the names of the models that come with the package, sorted."""
    return sorted(path.stem.replace("_", "-") for path in WEIGHTS.glob("*.safetensors"))


def find_checkpoint(name: str | os.PathLike[str] | None) -> Path:
    """Return where a checkpoint is.

    Args:
      name: its folder or file, or the name of an embedded model; None for the default model.

    Raises:
      AmskvError: if the default model is asked for, but is not in this installation.
    """
    if name is None:
        name = DEFAULT_MODEL
        if name not in embedded_models():
            raise AmskvError(f"the model {name} is not in {WEIGHTS}: install the package again")
    if str(name) in embedded_models() and not Path(name).exists():
        return WEIGHTS / f"{str(name).replace('-', '_')}.safetensors"
    return Path(name)
