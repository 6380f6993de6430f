"""The calibration of a study or an evaluation: read from its folder, or measured once."""

from collections.abc import Callable
from pathlib import Path

from amskv_jax.calibrate import calibrate
from amskv_jax.models.guidance import Drawing
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.stats import LayerStats

CALIBRATION_SEED = 2**31 - 1
"""Of the pictures which calibration looks at: not among those that are judged."""
CALIBRATION_BATCH = 32


def load_or_calibrate(
    path: Path, model: Pipeline, count: int, drawing: Drawing, report: Callable[[str], object]
) -> LayerStats:
    """Return the model's statistics, read from ``path``, or measured and written there.

    Args:
      path: the file.
      model: the model.
      count: pictures to look at.
      drawing: how tokens are drawn.
      report: takes a line if calibration is necessary.

    Raises:
      AmskvError: if the file is damaged or of another model.
    """
    if path.exists():
        return LayerStats.load(path, model.fingerprint)
    report(f"calibrating on {count} pictures")
    stats = calibrate(
        model,
        model.conditions(None),
        count=count,
        batch=min(count, CALIBRATION_BATCH),
        seed=CALIBRATION_SEED,
        drawing=drawing,
    )
    stats.save(path)
    return stats
