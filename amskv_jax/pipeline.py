"""Loading a checkpoint and sampling from it: the short way to pictures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.checkpoints.embedded import find_checkpoint
from amskv_jax.checkpoints.folder import load_checkpoint
from amskv_jax.checkpoints.info import GUIDANCE, CheckpointInfo
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.generate import Sampler, Samples, picture_keys
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import Full, Policy
from amskv_jax.sampling import TokenSampling

TOP_K, TOP_P = 900, 0.96
"""Top-k and top-p unless given: those with which VAR's authors show pictures."""


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A model with its weights on the default device.

    Attributes:
      transformer: shape of the transformer.
      tokenizer: shape of the VQVAE.
      params: the weights, {"transformer": ..., "tokenizer": ...}.
      dtype: "float32" or "bfloat16", of weights, matrix products and cache.
      fingerprint: of the weights, see ``checkpoint.fingerprint``.
      classes: names of the classes; none if they are not known.
      guidance: strength of classifier-free guidance that suits the model.
    """

    transformer: VARConfig
    tokenizer: VQVAEConfig
    params: Any
    dtype: str
    fingerprint: str = ""
    classes: tuple[str, ...] = ()
    guidance: float = GUIDANCE

    def sampler(
        self,
        policy: Policy = Full(),  # noqa: B008 (frozen)
        *,
        top_k: int = TOP_K,
        top_p: float = TOP_P,
        more_smooth: bool = False,
        stats: LayerStats | None = None,
        attention: Implementation = "auto",
    ) -> Sampler:
        """Return the compiled part of ``sample``, for use with ``params``; arguments as there."""
        if stats is not None:
            stats.check(self.transformer.cache_shape, self.fingerprint or None)
        return Sampler(
            transformer=self.transformer,
            tokenizer=self.tokenizer,
            plan=policy.plan(self.transformer.cache_shape, stats),
            sampling=TokenSampling(top_k, top_p, more_smooth),
            dtype=self.dtype,
            attention=attention,
        )

    def sample(
        self,
        labels: Sequence[int] | np.ndarray | jax.Array,
        *,
        key: jax.Array,
        policy: Policy = Full(),  # noqa: B008 (frozen)
        cfg: float | None = None,
        top_k: int = TOP_K,
        top_p: float = TOP_P,
        more_smooth: bool = False,
        stats: LayerStats | None = None,
        attention: Implementation = "auto",
    ) -> Samples:
        """Generate one picture per label, all in one batch.

        The first call for a policy, a way of drawing and a number of labels compiles. A picture
        depends on its label, the key and its place among the labels, and not on its neighbours.

        Args:
          labels: class indices, [B].
          key: PRNG key, ``jax.random.key(seed)``.
          policy: what the cache keeps.
          cfg: strength of classifier-free guidance at the last scale; what suits the model if not
            given.
          top_k: keep the k largest logits; 0 keeps all, 1 is greedy.
          top_p: after top-k, drop the least likely tokens up to 1 - top_p in total; 0 keeps all.
          more_smooth: feed back mixtures of codebook entries (smoother; not for evaluation).
          stats: what calibration measured, for policies that use it.
          attention: back end, see ``attention.attend``.

        Returns:
          Tokens [B, total] int32 and pictures [B, height, width, 3] float32 in [0, 1].

        Raises:
          UsageError: if there are no labels, one is no class of the model, or an option is out of
            range.
          AmskvError: if policy or statistics do not fit the model.
        """
        classes = check_labels(labels, self.transformer.num_classes)
        sampler = self.sampler(
            policy,
            top_k=top_k,
            top_p=top_p,
            more_smooth=more_smooth,
            stats=stats,
            attention=attention,
        )
        strength = self.guidance if cfg is None else cfg
        return sampler(self.params, classes, picture_keys(key, len(classes)), strength)


def load(source: str | os.PathLike[str] | None = None, dtype: str | None = None) -> Pipeline:
    """Load a checkpoint onto the default device.

    Args:
      source: a folder made by ``convert_var`` or ``init_checkpoint``, a packed checkpoint, or the
        name of an embedded model; by default "var-cifar10".
      dtype: "float32" or "bfloat16"; None takes the one in which the weights are stored.

    Raises:
      AmskvError: if this is no checkpoint of a class-conditional model, or damaged.
    """
    checkpoint = load_checkpoint(find_checkpoint(source), dtype)
    transformer, tokenizer = model_configs(checkpoint.info)
    return Pipeline(
        transformer=transformer,
        tokenizer=tokenizer,
        params=checkpoint.params,
        dtype=dtype or checkpoint.info.dtype,
        fingerprint=checkpoint.info.fingerprint,
        classes=checkpoint.info.classes,
        guidance=checkpoint.info.guidance,
    )


def model_configs(info: CheckpointInfo) -> tuple[VARConfig, VQVAEConfig]:
    """Return the shapes of transformer and tokenizer of a class-conditional checkpoint.

    Raises:
      AmskvError: if it is of another kind.
    """
    transformer, tokenizer = info.configs.get("transformer"), info.configs.get("tokenizer")
    if not (isinstance(transformer, VARConfig) and isinstance(tokenizer, VQVAEConfig)):
        raise AmskvError(f"this is a checkpoint of the kind {info.kind}, expected var")
    return transformer, tokenizer


def check_labels(labels: Sequence[int] | np.ndarray | jax.Array, num_classes: int) -> np.ndarray:
    """Return labels as an int32 array [B].

    Raises:
      UsageError: if there are none, or one is not a class of the model.
    """
    array = np.asarray(labels)
    if array.size == 0:
        raise UsageError(f"no labels given: expected at least one of 0-{num_classes - 1}")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UsageError(
            f"labels have shape {array.shape} and type {array.dtype}: expected a list of integers"
        )
    wrong = array[(array < 0) | (array >= num_classes)]
    if wrong.size:
        listed = ", ".join(map(str, wrong[:5])) + (", ..." if wrong.size > 5 else "")
        raise UsageError(f"unknown label {listed}: the model has classes 0-{num_classes - 1}")
    return array.astype(np.int32)
