"""Feature networks: what the metrics see of a picture."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from amskv_jax.errors import AmskvError

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The converted weights of the Inception network which FID is defined by, see torch-fidelity."""
INCEPTION_AT_ONCE = 100
"""Pictures per call of Inception."""


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Maps pictures to features and logits.

    Attributes:
      name: by which its figures are called; only Inception's Frechet distance is an FID.
      fingerprint: of its weights.
      dimension: number of features D.
      num_classes: classes, if the logits are those of a model's own classes; None if not.
      look: maps pictures uint8 [N, H, W, 3] to features [N, D] and logits [N, C], float32.
    """

    name: str
    fingerprint: str
    dimension: int
    num_classes: int | None
    look: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

    def __str__(self) -> str:
        return f"{self.name} {self.fingerprint}"

    def check_classes(self, num_classes: int) -> None:
        """Raise AmskvError if its classes are not as many as a model's."""
        if self.num_classes not in (None, num_classes):
            raise AmskvError(
                f"the {self.name} knows {self.num_classes} classes, the model {num_classes}: "
                "train one on the model's data"
            )


def in_blocks(apply: Callable[..., Any], size: int, *arrays: np.ndarray) -> Any:
    """Return the arrays, or trees of them, which ``apply`` makes of ``size`` rows at a time."""
    parts = [
        apply(*(array[start : start + size] for array in arrays))
        for start in range(0, len(arrays[0]), size)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def file_fingerprint(path: Path) -> str:
    """Return what tells a file of weights from others."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def inception(weights: Path | str | None = None) -> FeatureNetwork:
    """Return the Inception network of FID and IS, as torch-fidelity runs it.

    It needs the extra "fidelity"; nothing is downloaded. Its 1008 logits are without bias.

    Args:
      weights: the file; default: where torch-fidelity keeps it.

    Raises:
      AmskvError: if torch-fidelity is not installed, or the weights are not there.
    """
    try:
        import torch  # noqa: PLC0415
        from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: PLC0415
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise AmskvError(
            "Inception features need torch-fidelity: pip install 'amskv-jax[fidelity]'"
        ) from error
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
    if not path.is_file():
        raise AmskvError(
            f"the weights of Inception, {path}, are not there: fetch {INCEPTION_FILE} of "
            "torch-fidelity's release v0.2.0, or take the features of a classifier"
        )
    layers = ["2048", "logits_unbiased"]
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", layers, feature_extractor_weights_path=str(path)
        )
    except Exception as error:  # torch raises many types for damaged files
        reason = str(error).partition("\n")[0]
        raise AmskvError(f"{path} holds no weights of Inception: {reason}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)

    def apply(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        with torch.no_grad():
            outputs = network(torch.from_numpy(batch).to(device))
        return tuple(output.cpu().numpy() for output in outputs)

    return FeatureNetwork(
        "inception",
        file_fingerprint(path),
        2048,
        None,
        lambda pixels: in_blocks(apply, INCEPTION_AT_ONCE, pixels),
    )
