"""Evaluation of chosen policies: pictures in shards, then their figures; resumable.

The folder holds ``settings.json``, ``NAME.npz`` per policy in the layout that OpenAI's ADM
evaluator reads (``arr_0`` uint8 [N, H, W, 3], and ``arr_1``, the labels), ``results.jsonl`` with a
line of figures per policy, and while a policy is drawn its shards, ``NAME.shard-00000.npz``.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.bulk.files import ShardFiles
from amskv_jax.bulk.shards import draw_shards
from amskv_jax.drawing import Batch, Update
from amskv_jax.errors import UsageError
from amskv_jax.evaluation.comparison import Comparison, open_folder
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.metrics import psnr, ssim
from amskv_jax.evaluation.results import Record, read_arrays
from amskv_jax.generate import Sampler
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.grammar import PolicyRequest


@dataclass(frozen=True, kw_only=True)
class Evaluation(Comparison):
    """How pictures are drawn; a folder holds those of one set of these.

    Attributes:
      seed: of the random numbers.
      shard: pictures per shard.
    """

    seed: int = 0
    shard: int = 1000


def evaluate(
    evaluation: Evaluation,
    model: Pipeline,
    requests: Sequence[PolicyRequest],
    judge: Judge | None,
    directory: Path | str,
    *,
    batch: int = 500,
    attention: Implementation = "auto",
    stats: LayerStats | None = None,
    update: Update = lambda what, share: None,
) -> list[Record]:
    """Draw and measure the pictures of all policies that are not done yet.

    What was killed goes on with the shard it was at.

    Args:
      evaluation: see there.
      model: with its weights.
      requests: the policies; put the full cache first to have the others compared with it.
      judge: measures the pictures; None only draws, and compares with the full cache.
      directory: to write into; created if missing.
      batch: pictures drawn at once.
      attention: back end.
      stats: calibration; measured if it is needed and not given.
      update: shown the progress.

    Returns:
      A record per policy: "name", "note", "cache_bytes", "saving" and the figures of
      ``Judge.figures``.

    Raises:
      UsageError: if there are fewer pictures than features, or the folder holds an evaluation with
        other settings, or the model is in another dtype.
      AmskvError: if a policy cannot save what is asked for.
    """
    if not requests:
        raise UsageError("no policies to evaluate")
    if model.dtype != evaluation.dtype:
        raise UsageError(f"the model is in {model.dtype}, expected {evaluation.dtype}")
    directory = Path(directory)
    results = open_folder(directory, evaluation, model, judge)
    if stats is None and any(request.policy.uses_stats for request in requests):
        path = directory / "stats.npz"
        stats = evaluation.stats(path, model, lambda line: update(line, 0.0))
    geometry = model.geometry(batch, evaluation.drawing(model))
    plans = {request.name: request.plan(model.shape, geometry, stats) for request in requests}
    labels = model.conditions(None).classes(np.arange(evaluation.num))
    for name, plan in plans.items():
        if name in results.records:
            if results.records[name]["note"] != plan.note:
                raise UsageError(
                    f"{directory} holds {name} with another plan ({results.records[name]['note']}, "
                    f"now {plan.note}): choose another folder"
                )
            continue
        start = time.monotonic()
        sampler = model.sampler(plan, evaluation.drawing(model), attention=attention)
        pixels = _draw(evaluation, model, sampler, directory / f"{name}.npz", batch, update)
        seconds = time.monotonic() - start
        update(f"measuring {name}", 1.0)
        originals = read_arrays(directory / "full.npz").get("arr_0") if name != "full" else None
        record: Record = {
            "name": name,
            "seed": evaluation.seed,
            **evaluation.describe(plan, model, model.dtype),
            "draw_seconds": round(seconds, 2),
        }
        if judge is not None:
            record |= judge.figures(pixels, labels, originals)
        elif originals is not None:
            record |= {"psnr": psnr(pixels, originals), "ssim": ssim(pixels, originals)}
        results.add(record)
    return [results.records[name] for name in plans]


def _draw(
    evaluation: Evaluation,
    model: Pipeline,
    sampler: Sampler,
    path: Path,
    batch: int,
    update: Update,
) -> np.ndarray:
    """Return all pictures of a policy, uint8 [num, H, W, 3], from ``path`` or else drawn there."""
    num, drawing, conditions = evaluation.num, evaluation.drawing(model), model.conditions(None)
    batch, what = min(batch, num), f"drawing {path.stem}"
    batch = model.mesh.filled(batch) if model.mesh else batch
    labels = conditions.classes(np.arange(num)) is not None
    size = model.model.picture_size(model.schedule)
    files = ShardFiles(path, num, size, evaluation.shard, labels=labels)
    prepare = cache(partial(model.drawer, sampler, conditions, batch, drawing))

    def draw(first: int, count: int) -> Iterator[Batch]:
        controls = model.controls(drawing)
        return prepare().batches(model.params, evaluation.seed, first, count, controls)

    draw_shards(
        files,
        draw,
        batch=batch,
        classes=conditions.classes,
        update=lambda progress: update(what, progress.done / progress.total),
    )
    return read_arrays(path)["arr_0"]
