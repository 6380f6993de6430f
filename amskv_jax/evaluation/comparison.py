"""How pictures are drawn that are to be compared, and the folder of their results."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from amskv_jax.calibrate.attention import measure_attention
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.metrics import check_picture_count
from amskv_jax.evaluation.results import Record, Results
from amskv_jax.files import check_settings
from amskv_jax.models.guidance import Drawing, PerScale
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.budgets import memory_report
from amskv_jax.precision import activation_dtype

CALIBRATION_SEED = 2**31 - 1
"""Of the pictures which calibration looks at: not among those that are judged."""
CALIBRATION_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What pictures have in common which are compared.

    Attributes:
      num: pictures per policy and seed.
      cfg: strength of guidance, see ``guidance.Drawing``.
      top_k: see ``TokenSampling``.
      top_p: see ``TokenSampling``.
      dtype: of weights, products and cache.
      calibration_pictures: pictures that calibration looks at.
    """

    num: int = 10_000
    cfg: PerScale = Drawing.cfg
    top_k: int = Drawing.top_k
    top_p: float = Drawing.top_p
    dtype: str = "bfloat16"
    calibration_pictures: int = 128

    def drawing(self, model: Pipeline) -> Drawing:
        """Return how a model draws."""
        return replace(model.drawing, cfg=self.cfg, top_k=self.top_k, top_p=self.top_p)

    def stats(self, path: Path, model: Pipeline, report: Callable[[str], object]) -> LayerStats:
        """Return the model's statistics, read from ``path``, or measured and written there.

        Args:
          path: the file.
          model: with its weights.
          report: takes a line if calibration is necessary.

        Raises:
          AmskvError: if the file is damaged or of another model.
        """
        if path.exists():
            return LayerStats.load(path, model.fingerprint)
        count = self.calibration_pictures
        report(f"calibrating on {count} pictures")
        stats = measure_attention(
            model,
            model.conditions(None),
            count=count,
            batch=min(count, CALIBRATION_BATCH),
            seed=CALIBRATION_SEED,
            drawing=self.drawing(model),
        )
        stats.save(path)
        return stats

    def describe(self, plan: RetentionPlan, model: Pipeline, dtype: str) -> Record:
        """Return what a record says of a plan's cache in a dtype, of one picture.

        Savings count against a cache of all scales in the comparison's dtype.
        """
        rows = model.model.guidance(self.drawing(model)).rows_per_picture
        report = memory_report(plan, model.shape, activation_dtype(dtype), rows)
        baseline = memory_report(plan, model.shape, activation_dtype(self.dtype), rows)
        return {
            "note": plan.note,
            "dtype": dtype,
            "num": self.num,
            "device": jax.devices()[0].device_kind,
            "cache_bytes": report.plan,
            "saving": report.saving(baseline.full),
        }


@dataclass(frozen=True)
class _Settings:
    """What all results of a folder have in common."""

    conditions: Comparison
    model: str
    features: str
    real_pictures: int


def open_folder(
    directory: Path, comparison: Comparison, model: Pipeline, judge: Judge | None
) -> Results:
    """Make the folder of a study or an evaluation, or go on with the one that is there.

    Raises:
      UsageError: if it holds results under other settings, or the pictures are fewer than features.
    """
    seen, real = ("none", 0) if judge is None else (str(judge.network), len(judge.real.features))
    if judge is not None:
        check_picture_count(comparison.num, judge.network.dimension)
    directory.mkdir(parents=True, exist_ok=True)
    settings = _Settings(comparison, model.fingerprint, seen, real)
    check_settings(directory / "settings.json", settings)
    return Results(directory / "results.jsonl")
