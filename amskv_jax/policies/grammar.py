"""The spelling of policies on command lines, parsed from the fields of the policies themselves.

A policy is its name, and options after a colon: ``ams``, ``ams:c_min=174,c_max=338``,
``ams:demanding_layers=0-9+12``. Several are separated by commas, where what has an equals sign
before any colon is one more option of the policy before it: ``full,h2o:budget=300,recent=0.4`` are
two. So no value has a comma in it: numbers and ranges are joined by ``+``.

Two options are no fields, and every policy with a budget takes them: ``saving=0.85`` is the share
to save of a bfloat16 cache of all scales, ``bytes=2GiB`` the most that the cache of a batch takes.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from amskv_jax.errors import UsageError
from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import policy_class
from amskv_jax.policies.base import Policy
from amskv_jax.policies.budgets import has_budget, with_saving, within_bytes
from amskv_jax.words import read_bytes, read_ranges

LARGEST = 2**31 - 1
"""The largest whole number that an option takes."""


@dataclass(frozen=True)
class PolicyRequest:
    """A policy as it was asked for.

    Attributes:
      text: as it was spelled.
      policy: the policy with the options that are fields of it.
      saving: share to save of a bfloat16 cache of all scales; None for what the policy's own
        options say.
      max_bytes: most bytes of the cache of a batch; None likewise.
    """

    text: str
    policy: Policy
    saving: float | None = None
    max_bytes: int | None = None

    @property
    def name(self) -> str:
        """A name for files: ``window:saving=0.75`` becomes "window-75%"."""
        name, _, options = self.text.partition(":")
        words = [name.strip()]
        for option in filter(None, options.split(",")):
            key, _, value = (part.strip() for part in option.partition("="))
            words.append(f"{100 * float(value):g}%" if key == "saving" else f"{key}={value}")
        return re.sub(r"[^A-Za-z0-9.%_=+-]+", "-", "-".join(words))

    def __str__(self) -> str:
        return self.text

    def solved(
        self, shape: CacheShape, geometry: CacheGeometry, stats: LayerStats | None = None
    ) -> Policy:
        """Return the policy with the budget that saving or bytes ask for.

        Args:
          shape: of the model's cache.
          geometry: of the batch that is to be drawn.
          stats: calibration, for policies that use it.

        Raises:
          AmskvError: if no budget saves so much.
        """
        if self.saving is not None:
            return with_saving(self.policy, self.saving, shape, stats)
        if self.max_bytes is not None:
            return within_bytes(self.policy, self.max_bytes, geometry, shape, stats)
        return self.policy

    def plan(
        self, shape: CacheShape, geometry: CacheGeometry, stats: LayerStats | None = None
    ) -> RetentionPlan:
        """Return the plan; arguments and errors are those of ``solved``."""
        return self.solved(shape, geometry, stats).plan(shape, stats)


def parse_policy(text: str) -> PolicyRequest:
    """Read one policy; see the module.

    Raises:
      UsageError: if there is no such policy, it has no such option, an option is missing, given
        twice, or no value of its type.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if not name:
        raise UsageError(f"{text!r} has an empty name: expected one such as full, or ams:c_min=174")
    if name.endswith(".json"):
        raise UsageError(f"a plan file is spelled explicit:path={name}")
    policy = policy_class(name)
    readers = option_readers(policy)
    values: dict[str, Any] = {}
    for option in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals:
            raise UsageError(
                f"{text!r}: expected option=value after the colon, not {option.strip()!r}; "
                f"{_options(name, readers)}"
            )
        if key in PSEUDO_OPTIONS and key not in readers:
            raise UsageError(f"the policy {name} has no budget, so that it takes no {key}")
        if key not in readers:
            raise UsageError(f"the policy {name} has no option {key!r}; {_options(name, readers)}")
        if key in values:
            raise UsageError(f"{text!r} gives {key} twice")
        try:
            values[key] = readers[key](value)
        except ValueError as error:
            raise UsageError(f"{name}: {key} {value!r}: {error}") from error
    missing = [field.name for field in _fields(policy) if _required(field, values)]
    if missing:
        raise UsageError(f"the policy {name} needs {', '.join(missing)}: {name}:{missing[0]}=...")
    if values.keys() >= PSEUDO_OPTIONS.keys():
        raise UsageError(f"{text!r}: give either {' or '.join(PSEUDO_OPTIONS)}, not both")
    limits = {key: values.pop(key, None) for key in _pseudo(policy)}
    made = policy(**values)
    return PolicyRequest(text.strip(), made, limits.get("saving"), limits.get("bytes"))


def parse_policies(text: str) -> list[PolicyRequest]:
    """Read several policies; see the module.

    Raises:
      UsageError: see ``parse_policy``; or if one is given twice.
    """
    spelled: list[str] = []
    for part in text.split(","):
        goes_on = "=" in part.partition(":")[0]
        if goes_on and spelled and ":" in spelled[-1]:
            spelled[-1] += f",{part}"
        elif goes_on:
            policy = f"{spelled[-1].strip()}:" if spelled else "NAME:"
            raise UsageError(
                f"{text!r}: {part.strip()!r} is no policy; a policy's options follow a colon, as "
                f"in {policy}{part.strip()}"
            )
        else:
            spelled.append(part)
    requests = [parse_policy(part) for part in spelled]
    names = [request.name for request in requests]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"{text!r} has {twice} twice")
    return requests


def option_readers(policy: type[Policy]) -> dict[str, Callable[[str], Any]]:
    """Return what a policy takes on a command line: option -> reader of its text.

    Readers raise a ValueError whose message goes on after the text.
    """
    types = get_type_hints(policy)
    own = {field.name: _reader(types[field.name]) for field in _fields(policy)}
    return own | _pseudo(policy)


def _pseudo(policy: type[Policy]) -> dict[str, Callable[[str], Any]]:
    """Return the readers of the options which are no fields: an own field takes precedence."""
    if not has_budget(policy):
        return {}
    own = {field.name for field in _fields(policy)}
    return {name: reader for name, reader in PSEUDO_OPTIONS.items() if name not in own}


def _fields(policy: type[Policy]) -> tuple[Field[Any], ...]:
    return fields(policy)  # type: ignore[arg-type]  # policies are dataclasses


def _required(field: Field[Any], given: Mapping[str, Any]) -> bool:
    no_default = field.default is MISSING and field.default_factory is MISSING
    return no_default and field.name not in given


def _options(name: str, options: Mapping[str, Any]) -> str:
    return f"{name} has the options {', '.join(options)}" if options else f"{name} has no options"


def _reader(annotation: Any) -> Callable[[str], Any]:
    """Return the reader of values of a field's type, of which None is not spelled."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = set(get_args(annotation)) - {NoneType}
    if get_origin(annotation) is Literal:
        return partial(_read_choice, choices=get_args(annotation))
    return READERS[annotation]


def _read_integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError("expected a whole number")
    if len(text) > 11 or abs(int(text)) > LARGEST:
        raise ValueError(f"expected a whole number up to {LARGEST}")
    return int(text)


def _read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number") from None


def _read_share(text: str) -> float:
    share = _read_number(text)
    if not 0 <= share < 1:
        raise ValueError("expected a share of at least 0 and below 1, such as 0.85")
    return share


def _read_truth(text: str) -> bool:
    return _read_choice(text, ("true", "false")) == "true"


def _read_choice(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ValueError(f"expected {' or '.join(choices)}")
    return text


def _read_layers(text: str) -> tuple[int, ...]:
    return read_ranges(text, "+")


def _read_text(text: str) -> str:
    if not text:
        raise ValueError("expected a text")
    return text


def _read_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split("+"))
    if not all(names):
        raise ValueError("expected names joined by +")
    return names


READERS: dict[Any, Callable[[str], Any]] = {
    int: _read_integer,
    float: _read_number,
    bool: _read_truth,
    str: _read_text,
    Path: lambda text: Path(_read_text(text)),
    tuple[int, ...]: _read_layers,
    tuple[str, ...]: _read_names,
}
"""Type of a field -> reader of its text. A field of another type needs an entry."""

PSEUDO_OPTIONS: dict[str, Callable[[str], Any]] = {"saving": _read_share, "bytes": read_bytes}
"""What policies with a budget take besides their fields -> reader of its text."""
