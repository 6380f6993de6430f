"""From a policy's name and options to the policy. A new policy needs a line of help here, and an
entry for every option that no other policy has.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amskv_jax.cli.options import parse_numbers
from amskv_jax.errors import UsageError

if TYPE_CHECKING:
    from amskv_jax.policies import Policy

HELP = {
    "full": "everything, but the last scale, which no step reads (VAR, arXiv 2404.02905).",
    "ams": "the coarsest (condensed) and the latest (local) scales, more of them in layers whose "
    "keys change much from scale to scale (AMS-KV, arXiv 2511.16047).",
    "window": "the latest tokens (sliding window, arXiv 2004.05150).",
    "sink": "the first and the latest tokens (StreamingLLM, arXiv 2309.17453).",
    "explicit": "what a plan file says.",
}
"""What every policy of the registry keeps, and its paper."""


def _option(flag: str, value: Any, text: str, **settings: Any) -> tuple[str, Any]:
    option = typer.Option(flag, help=text, rich_help_panel="Policy options", **settings)
    return flag, Annotated[value | None, option]


OPTIONS: dict[str, tuple[str, Any]] = {
    "c_min": _option("--c-min", int, "ams: tokens that a cache-efficient layer holds."),
    "c_max": _option("--c-max", int, "ams: tokens that a cache-demanding layer holds."),
    "condensed": _option("--condensed", int, "ams: number of coarsest scales always kept."),
    "demanding_layers": _option(
        "--demanding-layers", str, "ams: the cache-demanding layers.", metavar="0-9,12"
    ),
    "theta": _option(
        "--theta", float, "ams: similarity below which a layer is cache-demanding; needs --stats."
    ),
    "sink": _option("--sink", int, "sink: tokens kept at the start of the sequence."),
    "window": _option("--window", int, "window, sink: latest tokens that are kept."),
    "path": _option("--plan", Path, "explicit: plan file, as `amskv plan --save` writes it."),
}
"""Field of one or more policies -> its flag and its type on the command line."""

PARSERS: dict[str, Callable[[str, str], Any]] = {"demanding_layers": parse_numbers}
"""Readers of the values which typer cannot read, called with the text and the flag."""


def make_policy(name: str | None, options: dict[str, Any]) -> "Policy":
    """Return the policy of that name.

    Args:
      name: a key of the registry; None is "explicit" if there is a plan file, else "full".
      options: values of ``OPTIONS``, None where not given.

    Raises:
      UsageError: if there is no such policy, an option is not one of its own, one is missing or
        wrong.
    """
    from amskv_jax.policies import policy_class  # noqa: PLC0415

    given = {field: value for field, value in options.items() if value is not None}
    name = name or ("explicit" if "path" in given else "full")
    policy: Any = policy_class(name)
    fields = {field.name: field for field in dataclasses.fields(policy)}
    foreign = given.keys() - fields
    if foreign:
        raise UsageError(
            f"the policy {name} does not take {_flags(foreign)}; its options: {_flags(fields)}"
        )
    required = [f.name for f in fields.values() if f.default is dataclasses.MISSING]
    missing = [field for field in required if field not in given]
    if missing:
        raise UsageError(f"the policy {name} needs {_flags(missing)}")
    for field in PARSERS.keys() & given.keys():
        given[field] = PARSERS[field](given[field], OPTIONS[field][0])
    made: Policy = policy(**given)
    return made


def takes_policy(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--policy`` and all its options in place of the parameter ``policy``."""
    lines = [f"{name}: {text}" for name, text in HELP.items()]
    text = "\n\n".join(["What the cache keeps; full by default.", *lines])
    annotations = {"policy": Annotated[str | None, typer.Option("--policy", help=text)]}
    annotations |= {field: annotation for field, (_, annotation) in OPTIONS.items()}

    @wraps(command)
    def run(**arguments: Any) -> None:
        options = {field: arguments.pop(field) for field in OPTIONS}
        command(**arguments | {"policy": make_policy(arguments["policy"], options)})

    signature = inspect.signature(command)
    kept = [parameter for name, parameter in signature.parameters.items() if name != "policy"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in annotations.items()
    ]
    run.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    run.__annotations__ = command.__annotations__ | annotations
    return run


def _flags(fields: Iterable[str]) -> str:
    return ", ".join(OPTIONS[field][0] for field in fields if field in OPTIONS) or "none"
