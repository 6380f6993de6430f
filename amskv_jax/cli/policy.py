"""From a policy's name and options to the policy.

A new policy needs a line of help here, and an entry for every option that no other policy has.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amskv_jax.cli.options import parse_numbers
from amskv_jax.errors import UsageError

if TYPE_CHECKING:
    from amskv_jax.plan.retention import RetentionPlan
    from amskv_jax.plan.shape import CacheShape
    from amskv_jax.plan.stats import LayerStats
    from amskv_jax.policies import AMSKV, Policy

BYTES_OPTION = "max_cache_bytes"

HELP = {
    "full": "everything, but the last scale, which no step reads (VAR, arXiv 2404.02905).",
    "ams": "the coarsest (condensed) and the latest (local) scales, more of them in layers whose "
    "keys change much from scale to scale (AMS-KV, arXiv 2511.16047).",
    "window": "the latest tokens (sliding window, arXiv 2004.05150).",
    "sink": "the first and the latest tokens (StreamingLLM, arXiv 2309.17453).",
    "h2o": "per head, the tokens which received most attention so far, and the latest ones "
    "(heavy-hitter oracle, arXiv 2306.14048).",
    "scalekv": "per head, the tokens to which a window of the current map attends most: many in "
    "drafter layers, few in refiners (ScaleKV, arXiv 2505.19602).",
    "heads": "per head, the scales which got most of its attention in a calibration run; needs "
    "--stats (after HeatKV, arXiv 2605.14877).",
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
    "target_saving": _option(
        "--target-saving",
        float,
        "ams: find capacities that save this share of a cache of all scales.",
        metavar="0.80",
    ),
    BYTES_OPTION: _option(
        "--max-cache-bytes",
        str,
        "ams: find capacities whose cache takes at most this for one batch.",
        metavar="2GiB",
    ),
    "allocation": _option(
        "--allocation",
        str,
        "ams: more for demanding layers, or the same total spread evenly over all layers.",
        metavar="similarity|uniform",
    ),
    "online": _option(
        "--online", bool, "ams: classify layers while drawing, from their keys; saves no memory."
    ),
    "sink": _option("--sink", int, "sink: tokens kept at the start of the sequence."),
    "window": _option(
        "--window",
        int,
        "window, sink: latest tokens that are kept; scalekv: observing tokens, a square number.",
    ),
    "budget": _option(
        "--budget", int, "h2o, scalekv, heads: tokens per head, on average over all layers."
    ),
    "recent": _option("--recent", float, "h2o: share of the budget for the latest tokens."),
    "mode": _option(
        "--mode",
        str,
        "scalekv: scores by attention as in the paper, or by products as in its code.",
        metavar="paper|reference",
    ),
    "kernel": _option("--kernel", int, "scalekv: width of the scores' max-pooling, odd."),
    "drafters": _option(
        "--drafters", float, "scalekv: share of layer-scale pairs that are drafters."
    ),
    "refiners_first": _option(
        "--refiners-first", float, "scalekv: refiners' share of the budget at the first cut."
    ),
    "refiners_last": _option(
        "--refiners-last", float, "scalekv: refiners' share of the budget at the last scale."
    ),
    "top": _option(
        "--top", int, "scalekv: earlier tokens in the selectivity index; one that was measured."
    ),
    "budget_file": _option(
        "--budget-file", str, "scalekv: budgets in the format of the paper's code (.json)."
    ),
    "protected": _option("--protected", int, "heads: number of coarsest scales always kept."),
    "patterns": _option("--patterns", int, "heads: most different sets of scales."),
    "path": _option("--plan", Path, "explicit: plan file, as `amskv plan --save` writes it."),
}
"""Field of one or more policies -> its flag and its type on the command line.

``BYTES_OPTION`` is the only one that is no field: see ``WithinBytes``."""

PARSERS: dict[str, Callable[[str, str], Any]] = {"demanding_layers": parse_numbers}
"""Readers of the values which typer cannot read, called with the text and the flag."""


@dataclasses.dataclass(frozen=True)
class WithinBytes:
    """AMS-KV whose cache fits in a number of bytes.

    How many tokens these are depends on the model, the batch and the dtype: see ``plan_for``.

    Attributes:
      policy: its other options.
      max_bytes: most bytes of the cache of a whole batch.
    """

    policy: "AMSKV"
    max_bytes: int


def make_policy(name: str | None, options: dict[str, Any]) -> "Policy":
    """Return the policy of that name.

    Args:
      name: a key of the registry; None is "explicit" if there is a plan file, else "full".
      options: values of its fields, None where not given.

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


def choose_policy(name: str | None, options: dict[str, Any]) -> "Policy | WithinBytes":
    """Return what a command line asks for; arguments and errors are those of ``make_policy``.

    The options may hold "max_cache_bytes", which is no field, as text.
    """
    fields = {field: value for field, value in options.items() if field != BYTES_OPTION}
    policy, text = make_policy(name, fields), options[BYTES_OPTION]
    if text is None:
        return policy

    from amskv_jax.policies import AMSKV  # noqa: PLC0415

    flag = OPTIONS[BYTES_OPTION][0]
    if not isinstance(policy, AMSKV):
        raise UsageError(f"only the policy ams takes {flag}")
    if policy.target_saving is not None:
        raise UsageError(f"give either {OPTIONS['target_saving'][0]} or {flag}, not both")
    return WithinBytes(policy, parse_bytes(text, flag))


def plan_for(
    policy: "Policy | WithinBytes",
    shape: "CacheShape",
    batch: int,
    dtype: str,
    stats: "LayerStats | None" = None,
    rows_per_picture: int = 2,
) -> "RetentionPlan":
    """Return the plan of a policy for a model.

    Args:
      policy: what ``choose_policy`` returned.
      shape: of the model's cache.
      batch: pictures drawn at once.
      dtype: "float32" or "bfloat16", of the cache.
      stats: see ``Policy.plan``.
      rows_per_picture: see ``CacheGeometry.of``.

    Raises:
      AmskvError: if the policy's options do not fit the model.
    """
    from amskv_jax.plan.memory import CacheGeometry  # noqa: PLC0415

    if isinstance(policy, WithinBytes):
        geometry = CacheGeometry.of(shape, batch, dtype, rows_per_picture)
        max_tokens = geometry.tokens(policy.max_bytes)
        policy = dataclasses.replace(policy.policy, max_tokens=max_tokens)
    return policy.plan(shape, stats)


def parse_bytes(text: str, option: str) -> int:
    """Read a number of bytes such as "2GiB", "1.5 GB" or "800000".

    Args:
      text: what was given.
      option: to which option, for the message.

    Raises:
      UsageError: if it is anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?\s*", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"{option} {text!r}: expected bytes such as 2GiB, 500MB or 800000")
    number, prefix, binary = match.groups()
    power = " KMGT".index((prefix or " ").upper())
    return int(float(number) * (1024 if binary else 1000) ** power)


def takes_policy(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--policy`` and all its options in place of the parameter ``policy``."""
    lines = [f"{name}: {text}" for name, text in HELP.items()]
    text = "\n\n".join(["What the cache keeps; full by default.", *lines])
    annotations = {"policy": Annotated[str | None, typer.Option("--policy", help=text)]}
    annotations |= {field: annotation for field, (_, annotation) in OPTIONS.items()}

    @wraps(command)
    def run(**arguments: Any) -> None:
        options = {field: arguments.pop(field) for field in OPTIONS}
        command(**arguments | {"policy": choose_policy(arguments["policy"], options)})

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
