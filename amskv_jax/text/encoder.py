"""Prompts become text features, in a program of their own."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.models.infinity.prompts import BUCKETS, TextFeatures
from amskv_jax.models.t5 import T5Config, T5Encoder
from amskv_jax.text.prompts import PromptTokenizer


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A T5 encoder with its tokenizer. It holds the weights: drop it before drawing.

    Attributes:
      config: its shape.
      params: its parameters; on a device, or they are copied there in every call.
      tokenizer: the one it was trained with.
      fingerprint: of its weights, see ``checkpoints.weights.Fingerprint``.
      dtype: of its products, "float32" or "bfloat16".
      batch: most prompts that are encoded at once.

    Raises:
      AmskvError: if the tokenizer knows more tokens than the encoder.
      UsageError: if ``batch`` is no positive number.
    """

    config: T5Config
    params: Mapping[str, Any]
    tokenizer: PromptTokenizer
    fingerprint: str = ""
    dtype: str = "float32"
    batch: int = 8

    def __post_init__(self) -> None:
        if self.tokenizer.size > self.config.vocab_size:
            raise AmskvError(
                f"the tokenizer knows {self.tokenizer.size} tokens, the text encoder "
                f"{self.config.vocab_size}: they do not belong together"
            )
        if self.batch < 1:
            raise UsageError(f"a batch of {self.batch} prompts: expected at least 1")

    def __call__(
        self, prompts: str | Sequence[str], negative: str | Sequence[str] | None = None
    ) -> TextFeatures:
        """Return the features of prompts.

        Args:
          prompts: one text or several.
          negative: what is to be kept away from: one text for all, or one for each prompt.

        Raises:
          UsageError: if a text is empty, or there are neither one nor as many negative ones as
            prompts.

        Warns:
          PromptCutWarning: if a text is too long, see ``PromptTokenizer``.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negative = [negative] if isinstance(negative, str) else negative
        if negative is not None and len(negative) not in (1, len(prompts)):
            raise UsageError(
                f"there are {len(negative)} negative prompts for {len(prompts)} prompts: "
                "expected one, or one for each"
            )
        features, lengths = self._encode(prompts, "prompt")
        others = (None, None) if negative is None else self._encode(negative, "negative prompt")
        return TextFeatures(
            features=features,
            lengths=lengths,
            negative_features=others[0],
            negative_lengths=others[1],
            texts=tuple(prompts),
            encoder=self.fingerprint,
        )

    def _encode(self, prompts: Sequence[str], what: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of all prompts, laid end to end, and their lengths.

        Equal prompts are computed once.
        """
        tokens = [tuple(ids) for ids in self.tokenizer(prompts, what)]
        by_bucket: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for ids in dict.fromkeys(tokens):
            by_bucket[next(bucket for bucket in BUCKETS if len(ids) <= bucket)].append(ids)
        found: dict[tuple[int, ...], np.ndarray] = {}
        for bucket, members in by_bucket.items():
            for start in range(0, len(members), self.batch):
                part = members[start : start + self.batch]
                features = self._padded(part, bucket)
                # Copies, or the padding would be held as well.
                found |= {ids: features[row, : len(ids)].copy() for row, ids in enumerate(part)}
        lengths = np.array([len(ids) for ids in tokens], np.int32)
        return np.concatenate([found[ids] for ids in tokens]), lengths

    def _padded(self, part: Sequence[tuple[int, ...]], bucket: int) -> np.ndarray:
        """Return the features [rows, bucket, C] of prompts that fit into the bucket.

        The number of rows is a power of two, or ``batch``, so that few programs serve all.
        """
        rows = min(self.batch, 1 << (len(part) - 1).bit_length())
        tokens, lengths = np.zeros((rows, bucket), np.int32), np.zeros(rows, np.int32)
        for row, ids in enumerate(part):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        return np.asarray(encode(self.params, tokens, lengths, self.config, self.dtype))


@partial(jax.jit, static_argnames=("config", "dtype"))
def encode(
    params: Mapping[str, Any],
    tokens: jax.Array | np.ndarray,
    lengths: jax.Array | np.ndarray,
    config: T5Config,
    dtype: str = "float32",
) -> jax.Array:
    """Return the features of tokens, [B, T, C] float32.

    Args:
      params: the encoder's parameters.
      tokens: [B, T] int32.
      lengths: tokens of every text, [B] int32; features behind them mean nothing.
      config: the encoder's shape.
      dtype: of the products.
    """
    mask = jnp.arange(tokens.shape[1])[None] < jnp.asarray(lengths)[:, None]
    features: Any = T5Encoder(config, jnp.dtype(dtype)).apply({"params": params}, tokens, mask)
    return features
