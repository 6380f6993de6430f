"""What calibration measures of a model's attention, per layer and scale."""

from dataclasses import dataclass

import numpy as np

from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Statistics of a full-cache run, averaged over pictures and both halves of guidance.

    Attributes:
      schedule: the model's scales, S of them.
      similarity: [layers, S]: minus the mean Euclidean distance between the keys of scale i and those
        of scale i - 1, enlarged bilinearly; NaN at scale 0 (AMS-KV, arXiv 2511.16047).
    """

    schedule: ScaleSchedule
    similarity: np.ndarray
