"""All figures of a set of generated pictures, as seen by one feature network."""

from dataclasses import dataclass

import numpy as np

from amskv_jax.evaluation.features import FeatureNetwork
from amskv_jax.evaluation.metrics import (
    FeatureSet,
    check_picture_count,
    class_accuracy,
    frechet_distance,
    inception_score,
    precision_recall,
    psnr,
    ssim,
)

FIGURES = {
    "score": ("score", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "class_accuracy": ("accuracy", "{:.2%}"),
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
}
"""Figures that tables show beside the Frechet distance: their titles, and how they are written."""
MANIFOLD_PICTURES = 10_000
"""Most pictures whose neighbourhoods make up the manifold of the real ones."""


@dataclass(frozen=True, eq=False)
class Judge:
    """Compares generated pictures with real ones.

    Attributes:
      network: what it sees of them.
      real: features of all real pictures, for the Frechet distance.
      manifold: features of at most ``MANIFOLD_PICTURES`` of them, for precision and recall.
    """

    network: FeatureNetwork
    real: FeatureSet
    manifold: FeatureSet

    @classmethod
    def of(cls, network: FeatureNetwork, pixels: np.ndarray) -> "Judge":
        """Return a judge who knows the real pictures uint8 [N, H, W, 3].

        Raises:
          UsageError: if they are too few for the number of features.
        """
        check_picture_count(len(pixels), network.dimension)
        features, _ = network.look(pixels)
        chosen = np.random.default_rng(0).permutation(len(features))[:MANIFOLD_PICTURES]
        return cls(network, FeatureSet(features), FeatureSet(features[np.sort(chosen)]))

    def figures(
        self,
        pixels: np.ndarray,
        labels: np.ndarray | None,
        originals: np.ndarray | None = None,
    ) -> dict[str, float | None]:
        """Return all figures of generated pictures.

        Args:
          pixels: uint8 [N, H, W, 3].
          labels: the class each was drawn for, [N]; None if they are not known.
          originals: the full cache's pictures for the same labels and keys.

        Returns:
          "frechet_distance", "score" and "score_deviation" (inception-style), "precision",
          "recall"; "class_accuracy" if the network knows the classes and there are labels; "psnr"
          (None if all pictures are equal) and "ssim" if there are originals.

        Raises:
          UsageError: if the pictures are too few for the number of features.
        """
        check_picture_count(len(pixels), self.network.dimension)
        features, logits = self.network.look(pixels)
        drawn = FeatureSet(features)
        score, deviation = inception_score(logits)
        precision, recall = precision_recall(self.manifold, drawn)
        figures: dict[str, float | None] = {
            "frechet_distance": frechet_distance(self.real, drawn),
            "score": score,
            "score_deviation": deviation,
            "precision": precision,
            "recall": recall,
        }
        if self.network.num_classes is not None and labels is not None:
            figures["class_accuracy"] = class_accuracy(logits, labels)
        if originals is not None:
            figures |= {"psnr": psnr(pixels, originals), "ssim": ssim(pixels, originals)}
        return figures
