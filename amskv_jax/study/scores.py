"""The study's first table: what caches cost by a proper score, from what ``amskv score`` wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amskv_jax.errors import AmskvError
from amskv_jax.study.tables import markdown_table

PATTERN = "score*.json"
"""Files in a study's folder, each written by ``amskv score --out``."""

BUDGETS = (0.75, 0.85, 0.9, 0.95, 0.975)
"""Savings at which policies are compared."""

SLACK = 0.007
"""So much less may be saved."""

WIDE = ("float32", "bfloat16")
"""Formats that round no more than the products do."""


def score_report(directory: Path, fingerprint: str) -> Iterator[str]:
    """Yield the paragraphs on the scores in a study's folder; none if there are none.

    Args:
      directory: of the study.
      fingerprint: of the study's model.

    Raises:
      AmskvError: if a file is no score, or of another model.
    """
    files = [_read(path, fingerprint) for path in sorted(directory.glob(PATTERN))]
    if not files:
        return
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for found in files:
        for name, record in found["policies"].items():
            policy = name.partition(", ")[0] if name.endswith(record["cache_dtype"]) else name
            numbers = "its own" if record["states_formats"] else record["cache_dtype"]
            rows.setdefault((policy, numbers), record | {"pictures": found["pictures"]})
    pictures = sorted({str(record["pictures"]) for record in rows.values()}, key=int)
    yield "## What a cache costs: held-out cross-entropy"
    yield (
        f"{' or '.join(pictures)} held-out pictures, forced through the sampler's own cached path "
        "without guidance (`amskv score`): nats a token above the full cache on the same pictures, "
        "and the divergence KL(full || policy), each ± one standard error over pictures. There is "
        "no drawing, no guidance and no feature network in it, and it cannot be flattered: this "
        "table decides, where the Frechet distances below say otherwise. Savings are of a bfloat16 "
        f"cache of all scales; products in {files[0]['dtype']} on {files[0]['device']}."
    )
    yield (
        "What every policy costs at five budgets: in 16 bits, of the cells that save this much; at "
        "best, of those in any format that save this much or more. Up to "
        f"{100 * SLACK:.1g} % may be missing, as policies keep whole tokens or scales."
    )
    yield _budget_table(rows)
    header = ["policy", "numbers", "saved", "nats above full", "divergence"]
    ordered = sorted(rows.items(), key=lambda item: (round(item[1]["saving"], 3), item[0]))
    body = [
        [
            f"`{policy}`",
            numbers,
            f"{record['saving']:.1%}",
            _figure(record["above_full"]),
            _figure(record["divergence"]),
        ]
        for (policy, numbers), record in ordered
    ]
    yield "<details><summary>All cells</summary>"
    yield markdown_table(header, "---", body)
    yield "</details>"
    yield "## What drawing shows"


def _budget_table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return the costs at ``BUDGETS``: of every policy as it is and in its best precision."""
    policies: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (text, numbers), record in rows.items():
        policy = _without_saving(text)
        kind = numbers if numbers == "its own" else "16 bits" if numbers in WIDE else "best"
        policies.setdefault(policy, {}).setdefault(kind, []).append(record | {"numbers": numbers})
    body = []
    for policy, kinds in policies.items():
        everything = [record for kind in kinds.values() for record in kind]
        for kind in ("16 bits", "best", "its own"):
            if kind not in kinds:
                continue
            best = kind == "best"
            chosen = everything if best else kinds[kind]
            cells = [_least(chosen, budget, best) for budget in BUDGETS]
            if any(cells):
                body.append([f"`{policy}`", kind, *cells])
    header = ["policy", "numbers", *(f"{budget:.1%}" for budget in BUDGETS)]
    return markdown_table(header, "---", body)


def _least(records: list[dict[str, Any]], budget: float, any_precision: bool) -> str:
    """Return the least cost at a budget: in any precision, of all that save as much or more."""
    following = next((other - SLACK for other in BUDGETS if other > budget), 1)
    most = 1 if any_precision else following
    fit = [record for record in records if budget - SLACK <= record["saving"] < most]
    if not fit:
        return ""
    least = min(fit, key=lambda record: float(record["above_full"]["mean"]))
    words = _figure(least["above_full"])
    return f"{words} `{least['numbers']}`" if any_precision else words


def _without_saving(text: str) -> str:
    """Return a policy as it was spelled, but for its saving."""
    name, _, options = text.partition(":")
    others = [option for option in options.split(",") if not option.startswith("saving=")]
    return ":".join(filter(None, (name, ",".join(others))))


def _figure(record: dict[str, float]) -> str:
    mean = round(record["mean"], 4) + 0.0  # which is never minus zero
    return f"{mean:.4f} ± {record['error']:.4f}"


def _read(path: Path, fingerprint: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        own = found["fingerprint"]
        for record in found["policies"].values():
            _figure(record["above_full"]), _figure(record["divergence"]), record["states_formats"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AmskvError(
            f"{path} holds no score: write it with `amskv score --out` ({error})"
        ) from error
    if own != fingerprint:
        raise AmskvError(f"{path} is the score of another model ({own}): the study's {fingerprint}")
    return found
