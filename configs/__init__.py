"""Known models, one file each, found by name: ``get("var-d30")``.

A file ``var_d30.py`` holds one constant, ``CONFIG``.
"""

import pkgutil
from dataclasses import dataclass
from importlib import import_module

from amskv_jax.errors import UsageError
from amskv_jax.models.protocol import Model


@dataclass(frozen=True)
class ModelConfig:
    """A model which is known by name.

    Attributes:
      name: as in ``get(name)``.
      description: one sentence.
      model: its kind and shape.
    """

    name: str
    description: str
    model: Model


def names() -> list[str]:
    """Return the names of all known models, sorted."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModelConfig:
    """Return the model of that name.

    Raises:
      UsageError: if there is none.
    """
    if name not in names():
        raise UsageError(f"unknown model {name!r}: expected one of {', '.join(names())}")
    config: ModelConfig = import_module(f"{__name__}.{name.replace('-', '_')}").CONFIG
    return config
