"""The calibration of a study or an evaluation: read from its folder, or measured once."""

from collections.abc import Callable
from pathlib import Path

import jax

from amskv_jax.calibrate import calibrate
from amskv_jax.drawing import balanced_labels
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.stats import LayerStats

CALIBRATION_SEED = 2**31 - 1
"""Of the pictures which calibration looks at: not among those that are judged."""
CALIBRATION_BATCH = 32


def load_or_calibrate(
    path: Path,
    sampler: Sampler,
    model: Pipeline,
    count: int,
    cfg: float,
    report: Callable[[str], object],
) -> LayerStats:
    """Return the model's statistics, read from ``path``, or measured and written there.

    Args:
      path: the file.
      sampler: how tokens are drawn; its plan is not used.
      model: the model.
      count: pictures to look at.
      cfg: guidance strength.
      report: takes a line if calibration is necessary.

    Raises:
      AmskvError: if the file is damaged or of another model.
    """
    if path.exists():
        return LayerStats.load(path, model.fingerprint)
    report(f"calibrating on {count} pictures")
    stats = calibrate(
        sampler,
        model.params,
        balanced_labels(0, count, model.transformer.num_classes),
        picture_keys(jax.random.key(CALIBRATION_SEED), count),
        cfg,
        batch=min(count, CALIBRATION_BATCH),
        fingerprint=model.fingerprint,
        settings={"seed": CALIBRATION_SEED},
    )
    stats.save(path)
    return stats
