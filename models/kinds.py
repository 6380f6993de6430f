"""The table of kinds of models, and of which parts each is made.

A kind is a frozen dataclass whose fields are the configurations of its parts; a field that may be
None is a part which a checkpoint can lack.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

import jax
from flax.traverse_util import flatten_dict

from amskv_jax.errors import AmskvError
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.parts import module_of
from amskv_jax.models.protocol import Model
from amskv_jax.models.var.model import VARModel

KINDS: dict[str, type[Model]] = {kind.kind: kind for kind in (VARModel, InfinityModel)}
"""Kinds of models by the name that checkpoints give them."""


def find_kind(name: str) -> type[Model]:
    """Return the class of a kind's models.

    Raises:
      AmskvError: if there is no such kind.
    """
    if name not in KINDS:
        raise AmskvError(f"unknown kind of model {name!r}: expected {' or '.join(KINDS)}")
    return KINDS[name]


def part_types(kind: Model | type[Model]) -> dict[str, type]:
    """Return the classes of the configurations of a kind's parts, by the parts' names."""
    return {part: (_choices(hint) or [hint])[0] for part, hint in _hints(kind).items()}


def optional_parts(kind: Model | type[Model]) -> set[str]:
    """Return the parts of a kind which a checkpoint can lack."""
    return {part for part, hint in _hints(kind).items() if NoneType in get_args(hint)}


def make_model(name: str, configs: Mapping[str, Any]) -> Model:
    """Return the model of the kind ``name`` that has these parts.

    Raises:
      AmskvError: if there is no such kind, a part is missing or not the kind's, or the parts do not
        belong together.
    """
    kind = find_kind(name)
    types = part_types(kind)
    missing = [part for part in types.keys() - optional_parts(kind) if part not in configs]
    wrong = [part for part, config in configs.items() if type(config) is not types.get(part)]
    if missing or wrong:
        problem = f"lacks its {min(missing)}" if missing else f"has another {wrong[0]}"
        raise AmskvError(
            f"this model of the kind {name} {problem}: expected the parts {', '.join(types)}"
        )
    return kind(**configs)


@cache
def param_shapes(config: Any) -> Mapping[str, tuple[int, ...]]:
    """Return what parameters the part of ``config`` has, as {path: shape}; nothing is computed.

    Raises:
      AmskvError: if there can be no such part.
    """
    module, inputs = module_of(config)
    try:
        variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise AmskvError(f"no model can have the shape {config}: {reason}") from error
    return {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}


def _hints(kind: Model | type[Model]) -> dict[str, Any]:
    """Return the types of a kind's fields."""
    hints = get_type_hints(kind if isinstance(kind, type) else type(kind))
    return {field.name: hints[field.name] for field in fields(kind)}  # type: ignore[arg-type]


def _choices(hint: Any) -> list[type]:
    return [choice for choice in get_args(hint) if choice is not NoneType]
