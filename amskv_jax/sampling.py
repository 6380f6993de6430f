"""Turning logits into tokens: top-k, top-p, greedy, smoothing."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from amskv_jax.errors import UsageError


@dataclass(frozen=True)
class TokenSampling:
    """How tokens are drawn; static under ``jit``.

    Attributes:
      top_k: keep the k largest logits, and all that equal the k-th; 0 keeps all, 1 is greedy.
      top_p: after top-k, drop the least likely tokens as long as the probability dropped stays at
        or below 1 - top_p; 0 keeps all.
      more_smooth: feed back a Gumbel-softmax mixture of codebook entries instead of the sampled one
        (the reference's option for smoother pictures; not for evaluation).

    Raises:
      UsageError: if a number is out of range.
    """

    top_k: int = 0
    top_p: float = 0.0
    more_smooth: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise UsageError(f"top-k must be 0 (off) or more, not {self.top_k}")
        if not 0.0 <= self.top_p <= 1.0:
            raise UsageError(f"top-p must lie between 0 (off) and 1, not {self.top_p}")


def filter_logits(logits: jax.Array, top_k: int = 0, top_p: float = 0.0) -> jax.Array:
    """Set the logits which top-k and top-p exclude to minus infinity.

    Ties follow the reference: all logits equal to the k-th largest stay; of equal logits at the
    edge of top-p the first ones go. The largest logit always stays.

    Args:
      logits: [..., V] float32.
      top_k: see ``TokenSampling``; more than V keeps all.
      top_p: see ``TokenSampling``.
    """
    size = logits.shape[-1]
    if not (0 < top_k < size or top_p > 0):
        return logits
    ascending = _sort(logits)
    if 0 < top_k < size:
        smallest = ascending[..., size - top_k, None]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
        ascending = jnp.where(ascending < smallest, -jnp.inf, ascending)
    if top_p > 0:
        cumulated = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        dropped = (cumulated[..., :-1] <= 1 - top_p).sum(-1, keepdims=True)
        edge = jnp.take_along_axis(ascending, dropped, axis=-1)
        tied = logits == edge
        dropped_ties = dropped - (logits < edge).sum(-1, keepdims=True)
        kept = (logits > edge) | (tied & (jnp.cumsum(tied, axis=-1) > dropped_ties))
        logits = jnp.where(kept, logits, -jnp.inf)
    return logits


def _sort(x: jax.Array) -> jax.Array:
    """Return float32 numbers in ascending order along the last axis; none may be NaN.

    Two are compared. More are sorted as integers of the same order, which CPUs do six times as
    fast.
    """
    if x.shape[-1] == 2:
        return jnp.stack([x.min(-1), x.max(-1)], axis=-1)

    def exchange(bits: jax.Array) -> jax.Array:
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers are ordered the other way

    keys = exchange(lax.bitcast_convert_type(x, jnp.int32))
    ascending = lax.sort(keys, is_stable=False)  # equal integers need no second operand to order
    return lax.bitcast_convert_type(exchange(ascending), jnp.float32)


def draw(keys: jax.Array, logits: jax.Array, sampling: TokenSampling) -> jax.Array:
    """Draw one code per position and code axis.

    Args:
      keys: [B] PRNG keys, one per picture, so that a picture does not depend on its batch.
      logits: [B, T, *K, V] float32, filtered; ``*K`` are the code axes of a token.
      sampling: ``top_k`` 1 takes the largest logit (the first of equal ones).

    Returns:
      [B, T, *K] int32.
    """
    if sampling.top_k == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def smooth_mixture(keys: jax.Array, logits: jax.Array, progress: float) -> jax.Array:
    """Return Gumbel-softmax weights over the choices, cooling as the scales progress.

    Args:
      keys: [B] PRNG keys.
      logits: [B, T, *K, V] float32, filtered.
      progress: 0 at the first scale, 1 at the last.

    Returns:
      [B, T, *K, V] float32, summing to one.
    """
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jax.nn.softmax((logits * (1 + progress) + noise) / temperature, axis=-1)
