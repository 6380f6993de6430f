"""Text features of the prompts to draw, numbered, checked and padded into batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from flax import struct

from amskv_jax.errors import UsageError
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.text import TextCondition

BUCKETS = (64, 128, 256, 512)
"""Lengths to which texts are padded, so that all texts within one share a compiled program."""


@struct.dataclass
class TextFeatures:
    """What a text encoder made of prompts, laid end to end.

    Attributes:
      features: [sum of lengths, C] float32.
      lengths: tokens of every prompt, [B] integers.
      negative_features: of negative prompts, [sum of their lengths, C] float32, or None.
      negative_lengths: one per prompt, or a single one for all of them; None likewise.
      texts: the prompts themselves, where they are known.
      encoder: fingerprint of the text encoder; empty if unknown.
    """

    features: np.ndarray
    lengths: np.ndarray
    negative_features: np.ndarray | None = None
    negative_lengths: np.ndarray | None = None
    texts: tuple[str, ...] = struct.field(pytree_node=False, default=())
    encoder: str = struct.field(pytree_node=False, default="")


@dataclass(frozen=True, eq=False)
class Prompts:
    """Numbered texts; beyond the last they begin again. See ``protocol.Conditions``.

    Attributes:
      config: of the transformer that draws them.
      wanted: the features.

    Raises:
      UsageError: if the features do not fit the transformer, or together.
    """

    config: InfinityConfig
    wanted: TextFeatures
    _parts: tuple[np.ndarray, ...] = field(init=False, repr=False)
    _negative_parts: tuple[np.ndarray, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        wanted = self.wanted
        parts = self._split(wanted.features, wanted.lengths, "prompt")
        negative: tuple[np.ndarray, ...] = ()
        if (wanted.negative_features is None) != (wanted.negative_lengths is None):
            raise UsageError("negative prompts need both features and lengths")
        if wanted.negative_features is not None and wanted.negative_lengths is not None:
            negative = self._split(
                wanted.negative_features, wanted.negative_lengths, "negative prompt"
            )
            if len(negative) not in (1, len(parts)):
                raise UsageError(
                    f"there are {len(negative)} negative prompts for {len(parts)} prompts: "
                    "expected one, or one for each"
                )
        if wanted.texts and len(wanted.texts) != len(parts):
            raise UsageError(f"there are {len(wanted.texts)} texts for {len(parts)} features")
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_negative_parts", negative)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._parts)

    @cached_property
    def bucket(self) -> int:
        """Tokens to which all texts are padded."""
        return bucket_of(max(map(len, (*self._parts, *self._negative_parts))), self.config)

    def batch(self, numbers: np.ndarray) -> TextCondition:
        """Return the condition of the pictures with these numbers [B], as host arrays."""
        numbers = numbers % len(self)
        features, lengths = self._padded([self._parts[number] for number in numbers])
        if not self._negative_parts:
            return TextCondition(features, lengths)
        count = len(self._negative_parts)  # a single one serves all
        negative = [self._negative_parts[number % count] for number in numbers]
        return TextCondition(features, lengths, *self._padded(negative))

    def classes(self, numbers: np.ndarray) -> None:
        """Return None: texts have no classes."""

    def captions(self, classes: Sequence[str] = ()) -> Sequence[str]:
        """Return the prompts, or their numbers where the texts are unknown."""
        return self.wanted.texts or tuple(f"prompt {number}" for number in range(len(self)))

    def _split(
        self, features: np.ndarray, lengths: np.ndarray, what: str
    ) -> tuple[np.ndarray, ...]:
        """Return the features of every text, [its length, C] float32."""
        features, lengths = np.asarray(features), np.asarray(lengths)
        channels, longest = self.config.text_channels, self.config.text_maxlen
        if features.ndim != 2 or features.shape[1] != channels:
            raise UsageError(
                f"the {what}s' features have shape {features.shape}, expected (tokens, {channels}) "
                "for this transformer: were they made by another text encoder?"
            )
        if lengths.ndim != 1 or not len(lengths) or not np.issubdtype(lengths.dtype, np.integer):
            raise UsageError(
                f"the {what}s' lengths are {lengths.dtype} of shape {lengths.shape}, expected one "
                "integer per prompt"
            )
        for number, length in enumerate(lengths.tolist()):
            if not 1 <= length <= longest:
                raise UsageError(
                    f"{what} {number} has {length} tokens, expected 1 to {longest}: "
                    + ("it is empty" if length < 1 else "cut it")
                )
        if lengths.sum() != len(features):
            raise UsageError(
                f"the {what}s' lengths add up to {lengths.sum()} tokens, but there are features of "
                f"{len(features)}"
            )
        features = features.astype(np.float32)
        if not np.isfinite(features).all():
            raise UsageError(f"the {what}s' features are not all finite")
        return tuple(np.split(features, np.cumsum(lengths)[:-1]))

    def _padded(self, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        features = np.zeros((len(parts), self.bucket, self.config.text_channels), np.float32)
        for row, part in zip(features, parts, strict=True):
            row[: len(part)] = part
        return features, np.array([len(part) for part in parts], np.int32)


def bucket_of(length: int, config: InfinityConfig) -> int:
    """Return the bucket of a text of so many tokens: the longest text a transformer takes, or less.

    Raises:
      UsageError: if the text is too long.
    """
    buckets = (*(size for size in BUCKETS if size < config.text_maxlen), config.text_maxlen)
    for size in buckets:
        if length <= size:
            return size
    raise UsageError(f"a text has {length} tokens, expected at most {config.text_maxlen}: cut it")
