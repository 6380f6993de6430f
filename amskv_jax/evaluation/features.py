"""Feature networks: what the metrics see of a picture."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from amskv_jax.errors import AmskvError

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The converted weights of the Inception network which FID is defined by, see torch-fidelity."""
INCEPTION_AT_ONCE = 100
"""Pictures per call of Inception."""


class FeatureNetwork(Protocol):
    """Maps pictures to features and logits.

    Attributes:
      name: by which its figures are called; only Inception's Frechet distance is an FID.
      dimension: number of features D.
      classifies: whether the logits are those of the model's own classes.
      fingerprint: of its weights.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def dimension(self) -> int:
        """See the class."""
        ...

    @property
    def classifies(self) -> bool:
        """See the class."""
        ...

    @property
    def fingerprint(self) -> str:
        """See the class."""
        ...

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features [N, D] and logits [N, C], float32, of pictures uint8 [N, H, W, 3]."""
        ...


class InceptionFeatures:
    """The Inception network of FID and IS, as torch-fidelity runs it (the extra "fidelity").

    Attributes:
      fingerprint: of the file of weights.
    """

    name = "inception"
    dimension = 2048
    classifies = False

    def __init__(self, weights: Path | str | None = None) -> None:
        """Load the weights; nothing is downloaded.

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
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        self._torch: Any = torch
        try:
            self._network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(path),
            )
        except Exception as error:  # torch raises many types for damaged files
            reason = str(error).partition("\n")[0]
            raise AmskvError(f"{path} holds no weights of Inception: {reason}") from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network.to(self._device)

    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features [N, 2048] and logits without bias [N, 1008] of pictures."""
        parts = []
        with self._torch.no_grad():
            for start in range(0, len(pixels), INCEPTION_AT_ONCE):
                batch = pixels[start : start + INCEPTION_AT_ONCE].transpose(0, 3, 1, 2)
                tensor = self._torch.from_numpy(np.ascontiguousarray(batch)).to(self._device)
                parts.append([output.cpu().numpy() for output in self._network(tensor)])
        features, logits = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(logits)
