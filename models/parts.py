"""The parts of a model which have weights: their modules and their configurations.

A part is known by its configuration, a frozen dataclass. Its file says which module belongs to it:

    @module_of.register
    def _(config: VARConfig) -> Built:
        return VAR(config), (jax.ShapeDtypeStruct((1,), jnp.int32), ...)
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import singledispatch
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flax import linen as nn

from amskv_jax.errors import AmskvError

Config = TypeVar("Config")
Built = tuple[nn.Module, tuple[Any, ...]]
"""A module, and inputs of ``module.init`` besides the key: trees of ``jax.ShapeDtypeStruct``."""


@singledispatch
def module_of(config: Any) -> Built:
    """Return the module of a part, and inputs with which all its parameters come to be.

    Args:
      config: the part's configuration.
    """
    raise AmskvError(f"no module is registered for a {type(config).__name__}")


def config_from_json(config_type: type[Config], content: Any) -> Config:
    """Return the dataclass of which ``content`` holds the fields, as ``dataclasses.asdict`` does.

    Lists become tuples and objects the dataclasses which the fields' types name; fields that are
    not there take their defaults.

    Raises:
      KeyError, TypeError or ValueError: if they are not those of the dataclass.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"expected the fields of {config_type.__name__}, found {content!r}")
    hints = get_type_hints(config_type)
    known = {field.name: field for field in fields(config_type)}  # type: ignore[arg-type]
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise TypeError(f"{config_type.__name__} has no field {', '.join(unknown)}")
    missing = [
        name
        for name, field in known.items()
        if name not in content and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise KeyError(", ".join(missing))
    return config_type(
        **{name: _value(hints[name], value, name) for name, value in content.items()}
    )


def _value(hint: Any, value: Any, name: str) -> Any:
    """Return a value read from JSON as one of the type ``hint``."""
    if is_dataclass(hint):
        return config_from_json(hint, value)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for choice in arguments:
            try:
                return _value(choice, value, name)
            except (KeyError, TypeError, ValueError):
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(_value(arguments[0], item, name) for item in value)
        if len(arguments) == len(value):
            return tuple(map(_value, arguments, value, [name] * len(value)))
    elif origin is Literal:
        if value in arguments:
            return value
    elif hint is NoneType:
        if value is None:
            return None
    elif hint is float and type(value) is int:
        return float(value)
    elif hint is Any or type(value) is hint:  # True is no int
        return value
    raise TypeError(f"{name} is {value!r}")
