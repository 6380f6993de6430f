"""The study's first table: what caches cost by a proper score, from what ``amskv score`` wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amskv_jax.errors import AmskvError
from amskv_jax.study.tables import markdown_table

PATTERN = "score*.json"
"""Files in a study's folder, each written by ``amskv score --out``."""


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
        "table decides, where the Frechet distances below say otherwise. Rows by what they save of "
        f"a bfloat16 cache of all scales; products in {files[0]['dtype']} on {files[0]['device']}."
    )
    header = ["policy", "numbers", "saved", "nats above full", "divergence"]
    ordered = sorted(rows.items(), key=lambda item: (round(item[1]["saving"], 3), item[0]))
    yield markdown_table(
        header,
        "---",
        [
            [
                f"`{policy}`",
                numbers,
                f"{record['saving']:.1%}",
                _figure(record["above_full"]),
                _figure(record["divergence"]),
            ]
            for (policy, numbers), record in ordered
        ],
    )
    yield "## What drawing shows"


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
