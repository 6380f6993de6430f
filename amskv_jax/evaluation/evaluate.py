"""Evaluation of chosen policies: pictures in shards, then their figures; resumable.

The folder holds ``settings.json``, ``NAME.npz`` per policy in the layout that OpenAI's ADM
evaluator reads (``arr_0`` uint8 [N, H, W, 3], and ``arr_1``, the labels), ``results.jsonl`` with a
line of figures per policy, and while a policy is drawn its shards, ``NAME.shard-00000.npz``.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.drawing import Drawer
from amskv_jax.errors import UsageError
from amskv_jax.evaluation.calibration import load_or_calibrate
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.metrics import check_picture_count, psnr, ssim
from amskv_jax.evaluation.results import Record, Results, read_arrays, write_arrays
from amskv_jax.files import check_settings
from amskv_jax.generate import Sampler
from amskv_jax.models.guidance import Drawing
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.budgets import PolicyRequest, memory_report

Update = Callable[[str, float], object]
"""Takes what is being done and the share that is done."""


@dataclass(frozen=True)
class Evaluation:
    """How pictures are drawn; a folder holds those of one set of these.

    Attributes:
      num: pictures per policy.
      seed: of the random numbers.
      cfg: guidance strength at the last scale.
      top_k: see ``TokenSampling``.
      top_p: see ``TokenSampling``.
      shard: pictures per shard.
      calibration_pictures: pictures that calibration looks at, where a policy needs it.
    """

    num: int = 10_000
    seed: int = 0
    cfg: float = 1.5
    top_k: int = Drawing.top_k
    top_p: float = Drawing.top_p
    shard: int = 1000
    calibration_pictures: int = 128


@dataclass(frozen=True)
class _Identity:
    """What is written into an evaluation's ``settings.json``."""

    evaluation: Evaluation
    model: str
    dtype: str
    features: str


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
        other settings.
      AmskvError: if a policy cannot save what is asked for.
    """
    if not requests:
        raise UsageError("no policies to evaluate")
    if judge is not None:
        check_picture_count(evaluation.num, judge.network.dimension)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    features = f"{judge.network.name} {judge.network.fingerprint}" if judge else "none"
    identity = _Identity(evaluation, model.fingerprint, model.dtype, features)
    check_settings(directory / "settings.json", identity)
    results = Results(directory / "results.jsonl")

    drawing = replace(
        model.drawing, cfg=evaluation.cfg, top_k=evaluation.top_k, top_p=evaluation.top_p
    )
    conditions = model.conditions(None)
    shape = model.shape
    if stats is None and any(request.needs_stats for request in requests):
        stats = load_or_calibrate(
            directory / "stats.npz",
            model,
            evaluation.calibration_pictures,
            drawing,
            lambda line: update(line, 0.0),
        )
    labels = conditions.classes(np.arange(evaluation.num))
    plans = [request.policy(shape, stats).plan(shape, stats) for request in requests]
    for request, plan in zip(requests, plans, strict=True):
        name = str(request)
        if name in results.records:
            if results.records[name]["note"] != plan.note:
                raise UsageError(
                    f"{directory} holds {name} with another plan ({results.records[name]['note']}, "
                    f"now {plan.note}): choose another folder"
                )
            continue
        path = directory / f"{name}.npz"
        sampler = model.sampler(plan, drawing, attention=attention)
        drawn = _Drawing(evaluation, model, sampler, drawing, path, batch)
        start = time.monotonic()
        pixels = drawn.pictures(lambda share, name=name: update(f"drawing {name}", share))  # type: ignore[misc]
        seconds = time.monotonic() - start
        update(f"measuring {name}", 1.0)
        originals = read_arrays(directory / "full.npz").get("arr_0") if name != "full" else None
        report = memory_report(plan, shape, model.dtype)
        record: Record = {
            "name": name,
            "note": plan.note,
            "num": evaluation.num,
            "seed": evaluation.seed,
            "dtype": model.dtype,
            "device": jax.devices()[0].device_kind,
            "cache_bytes": report.plan,
            "saving": report.saving(report.full),
            "draw_seconds": round(seconds, 2),
        }
        if judge is not None:
            record |= judge.figures(pixels, labels, originals)
        elif originals is not None:
            record |= {"psnr": psnr(pixels, originals), "ssim": ssim(pixels, originals)}
        results.add(record)
    return [results.records[str(request)] for request in requests]


class _Drawing:
    """The pictures of one policy: shards until all are there, then one file."""

    def __init__(
        self,
        evaluation: Evaluation,
        model: Pipeline,
        sampler: Sampler,
        drawing: Drawing,
        path: Path,
        batch: int,
    ) -> None:
        self.evaluation, self.model, self.sampler = evaluation, model, sampler
        self.drawing, self.path, self.batch = drawing, path, batch

    def pictures(self, update: Callable[[float], object]) -> np.ndarray:
        """Return all pictures, uint8 [num, H, W, 3], from files or the model."""
        done = read_arrays(self.path).get("arr_0")
        if done is not None:
            return done
        evaluation = self.evaluation
        starts = range(0, evaluation.num, evaluation.shard)
        files = [
            self.path.with_name(f"{self.path.stem}.shard-{index:05d}.npz")
            for index in range(len(starts))
        ]
        drawer: Drawer | None = None
        conditions, controls = self.model.conditions(None), self.model.controls(self.drawing)
        shards = []
        for index, (start, file) in enumerate(zip(starts, files, strict=True)):
            pixels = read_arrays(file).get("arr_0")
            if pixels is None:
                update(index / len(starts))
                drawer = drawer or self.model.drawer(
                    self.sampler, conditions, min(self.batch, evaluation.num), self.drawing
                )
                count = min(evaluation.shard, evaluation.num - start)
                pixels = drawer.draw(self.model.params, evaluation.seed, start, count, controls)
                write_arrays(file, {"arr_0": pixels})
            shards.append(pixels)
        pictures = np.concatenate(shards)
        classes = conditions.classes(np.arange(len(pictures)))
        known = {} if classes is None else {"arr_1": classes}
        write_arrays(self.path, {"arr_0": pictures, **known})
        for file in files:
            file.unlink()
        return pictures
