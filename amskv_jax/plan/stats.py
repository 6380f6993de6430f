"""What calibration measures of a model's attention, per layer and scale, and its file."""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.files import replacing
from amskv_jax.plan.damage import BlockDamage
from amskv_jax.plan.shape import CacheShape
from amskv_jax.schedule import ScaleSchedule

FORMAT = "amskv_jax.layer_stats"
VERSION = 1
TOP_COUNTS = (1, 4, 16, 64, 256)
"""Numbers of keys K' whose share of the attention to the history calibration measures."""

_UNREADABLE = (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
_ARRAYS = ("similarity", "cosine", "head_density", "history_top")


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Statistics of full-cache runs, averaged over pictures and both halves of guidance.

    Attributes:
      schedule: the model's scales, S of them.
      similarity: [layers, S]: minus the mean Euclidean distance between the cached keys of scale i
        and those of scale i - 1, enlarged bilinearly; NaN at scale 0 (AMS-KV, arXiv 2511.16047).
      cosine: [layers, S]: the mean cosine of the same pairs; NaN at scale 0.
      head_density: [layers, heads, S, S]: entry (i, j) is the attention probability which a query
        of scale i gives to all keys of scale j together, averaged over the queries; rows sum to 1.
      history_top: [layers, S, K]: the probability which a query of scale i gives to the
        ``top_counts[k]`` earlier tokens it attends to most, averaged over queries and heads.
      top_counts: the K numbers of tokens, ascending.
      pictures: how many pictures were measured.
      fingerprint: of the weights, see ``checkpoint.fingerprint``; empty if unknown.
      settings: how the pictures were drawn, for people: guidance, seed and the like.
      damage: what the loss of every block does to the prediction of real pictures, where that was
        measured too.

    Raises:
      AmskvError: if shapes disagree, or a number is missing (NaN) besides those of scale 0.
    """

    schedule: ScaleSchedule
    similarity: np.ndarray
    cosine: np.ndarray
    head_density: np.ndarray
    history_top: np.ndarray
    top_counts: tuple[int, ...] = TOP_COUNTS
    pictures: int = 1
    fingerprint: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    damage: BlockDamage | None = None

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = np.asarray(getattr(self, name), np.float64)
            object.__setattr__(self, name, array)
        scales = self.schedule.num_scales
        layers, heads = (*self.head_density.shape, 0, 0)[:2]
        expected = {
            "similarity": (layers, scales),
            "cosine": (layers, scales),
            "head_density": (layers, heads, scales, scales),
            "history_top": (layers, scales, len(self.top_counts)),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            if array.shape != shape or 0 in shape[:2]:
                raise AmskvError(f"layer statistics: {name} has shape {array.shape}, not {shape}")
            undefined = 1 if name in ("similarity", "cosine") else 0
            missing = np.argwhere(~np.isfinite(array[:, undefined:]))
            if len(missing):
                raise AmskvError(
                    f"layer statistics: {name} of layer {missing[0][0]} holds no number "
                    "(NaN or infinity): calibrate again, in float32 if it was bfloat16"
                )
        if self.damage is not None:
            self.damage.check(layers, heads, scales)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.similarity)

    @property
    def shape(self) -> CacheShape:
        """The model's cache as plans see it; its channels per head are not known, and given as 1.

        Tokens can be planned with it, but bytes can not.
        """
        return CacheShape(self.schedule, self.num_layers, self.head_density.shape[1], 1)

    @property
    def density(self) -> np.ndarray:
        """``head_density`` averaged over the heads, [layers, S, S]."""
        return self.head_density.mean(1)

    def selectivity(self, top: int) -> np.ndarray:
        """Return the Attention Selectivity Index (ScaleKV, arXiv 2505.19602, equation 2).

        ASI(l, i) = E[attention to the own map] * E[sum of the ``top`` largest attentions to earlier
        tokens], both over the queries of scale i, and here over heads and pictures. Refiners have
        large values, drafters small ones. The paper leaves ``top`` (its K') open.

        Args:
          top: one of ``top_counts``.

        Returns:
          [layers, S]; 0 at scale 0, which has no history.

        Raises:
          UsageError: if ``top`` was not measured.
        """
        if top not in self.top_counts:
            known = ", ".join(map(str, self.top_counts))
            raise UsageError(
                f"attention to the {top} top tokens was not measured: expected {known}"
            )
        own = np.diagonal(self.density, axis1=1, axis2=2)
        return own * self.history_top[:, :, self.top_counts.index(top)]

    def check(self, shape: CacheShape, fingerprint: str | None = None) -> None:
        """Raise AmskvError unless the statistics are of this model.

        Args:
          shape: of the model's cache; its channels per head do not matter.
          fingerprint: of its weights; None if they do not matter.
        """
        if self.schedule != shape.schedule:
            raise AmskvError(
                f"the layer statistics are of a model with the scales {self.schedule}, "
                f"this one has {shape.schedule}: calibrate this model"
            )
        for what, own, other in (
            ("layers", self.num_layers, shape.num_layers),
            ("heads a layer", self.shape.num_heads, shape.num_heads),
        ):
            if own != other:
                raise AmskvError(
                    f"the layer statistics are of a model with {own} {what}, "
                    f"this one has {other}: calibrate this model"
                )
        if fingerprint is not None and self.fingerprint != fingerprint:
            raise AmskvError(
                f"the layer statistics are of another model (fingerprint "
                f"{self.fingerprint or 'unknown'}, this model's is {fingerprint}): "
                "calibrate this model"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics as a .npz file, whole or not at all.

        Raises:
          AmskvError: if it cannot be written.
        """
        meta = {
            "schedule": self.schedule.grids,
            "top_counts": self.top_counts,
            "pictures": self.pictures,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if self.damage is not None:
            arrays |= self.damage.arrays()
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file, format=FORMAT, version=VERSION, meta=json.dumps(meta), **arrays
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str | None = None) -> "LayerStats":
        """Read the statistics from a file.

        Args:
          path: what ``save`` wrote.
          fingerprint: of the weights they are wanted for; None takes those of any model.

        Raises:
          AmskvError: if the file is damaged, of another version, or of another model.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
                stored = {name: content[name] for name in content.files}
        except OSError as error:
            raise AmskvError(f"cannot read the layer statistics {path}: {error}") from error
        except _UNREADABLE as error:  # NumPy's message advises to load the file unsafely
            raise AmskvError(
                f"cannot read the layer statistics {path}: this is no .npz file, or a damaged one; "
                "write it again with `amskv calibrate`"
            ) from error
        if str(stored.get("format")) != FORMAT:
            raise AmskvError(f"{path} holds no layer statistics: write them with `amskv calibrate`")
        if str(stored.get("version")) != str(VERSION):
            raise AmskvError(
                f"{path} holds layer statistics of version {stored.get('version')}, "
                f"expected {VERSION}: calibrate again"
            )
        try:
            meta = json.loads(str(stored["meta"]))
            stats = cls(
                schedule=ScaleSchedule(tuple(map(tuple, meta["schedule"]))),
                **{name: stored[name] for name in _ARRAYS},
                top_counts=tuple(meta["top_counts"]),
                pictures=int(meta["pictures"]),
                fingerprint=str(meta["fingerprint"]),
                settings=meta["settings"],
                damage=BlockDamage.of_arrays(stored),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise AmskvError(f"the layer statistics {path} are damaged: {error}") from error
        try:
            stats.check(stats.shape, fingerprint)
        except AmskvError as error:
            raise AmskvError(f"{path}: {error}") from error
        return stats
