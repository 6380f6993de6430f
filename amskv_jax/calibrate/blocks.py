"""The attention of one layer at one step, and what becomes of it when one block is kept otherwise.

A *block* is what one head holds of one earlier scale. Its *choice* is to be gone (0), or to be kept
in one of several formats (1, 2, ...).
"""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from amskv_jax.attention import QKV
from amskv_jax.numbers import Numbers

_PRECISION = lax.Precision.HIGHEST


@struct.dataclass
class Versions:
    """Keys and values of tokens, as they are and as they come back from every format.

    Attributes:
      exact: keys and values, two of [B, T, heads, head_dim].
      kept: from every format, two of [formats, B, T, heads, head_dim] float32.
    """

    exact: tuple[jax.Array, jax.Array]
    kept: tuple[jax.Array, jax.Array]

    @classmethod
    def of(cls, key: jax.Array, value: jax.Array, formats: Sequence[Numbers]) -> "Versions":
        """Return all versions of keys and values [B, T, heads, head_dim]."""

        def versions(vectors: jax.Array) -> jax.Array:
            known = lax.stop_gradient(vectors)
            return jnp.stack([one.decode(one.encode(known), jnp.float32) for one in formats])

        return cls((key, value), (versions(key), versions(value)))


@struct.dataclass
class Held:
    """What one layer has cached, and how.

    Attributes:
      tokens: of all earlier scales, one after the other.
      choice: of every head and earlier scale, [heads, sources] int32.
      ends: where the tokens of every earlier scale end, static.
    """

    tokens: Versions
    choice: jax.Array
    ends: tuple[int, ...] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, history: Sequence[Versions], choice: jax.Array) -> "Held":
        """Join the versions of every earlier scale."""
        exact, kept = (
            tuple(jnp.concatenate(parts, axis=-3) for parts in zip(*pairs, strict=True))
            for pairs in (
                [versions.exact for versions in history],
                [versions.kept for versions in history],
            )
        )
        sizes = [versions.exact[0].shape[1] for versions in history]
        return cls(Versions(exact, kept), choice, tuple(np.cumsum(sizes).tolist()))  # type: ignore[arg-type]

    @property
    def token_choice(self) -> jax.Array:
        """The choice of every head and token, [heads, T] int32."""
        lengths = np.diff(self.ends, prepend=0)
        return jnp.repeat(self.choice, lengths, axis=1, total_repeat_length=self.ends[-1])

    def in_force(self) -> tuple[jax.Array, jax.Array]:
        """Return keys and values [B, T, heads, head_dim] float32 in the formats that were chosen.

        Gradients pass as if nothing had been rounded. What is gone is as in the first format.
        """
        which = jnp.maximum(self.token_choice.T - 1, 0)[None, None, :, :, None]
        pairs = []
        for exact, kept in zip(self.tokens.exact, self.tokens.kept, strict=True):
            chosen = jnp.take_along_axis(kept, which, axis=0)[0]
            known = exact.astype(jnp.float32)
            pairs.append(known + lax.stop_gradient(chosen - known))
        return pairs[0], pairs[1]


def attend_blocks(qkv: QKV, held: Held, scale: float) -> jax.Array:
    """Attend to the blocks as they are kept, and to the own tokens; differentiable.

    Args:
      qkv: of the own tokens.
      held: the earlier scales.
      scale: factor of the logits.

    Returns:
      [B, T, heads, head_dim] float32.
    """
    query, key, value = (x.astype(jnp.float32) for x in qkv[:3])
    keys, values = held.in_force()
    past = _logits(query, keys, scale)
    past = jnp.where((held.token_choice == 0)[None, :, None], -jnp.inf, past)
    logits = jnp.concatenate([past, _logits(query, key, scale)], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)
    everything = jnp.concatenate([values, value], axis=1)
    return jnp.einsum("bnts,bsnd->btnd", weights, everything, precision=_PRECISION)


def choice_effects(gradient: jax.Array, qkv: QKV, held: Held, scale: float) -> jax.Array:
    """Return how a function of the attention's output changes with the choice of every block.

    The output with one block kept otherwise is exact, softmax and all; the function is taken as
    linear, by its gradient.

    Args:
      gradient: of the function, by the output of ``attend_blocks``, [B, T, heads, head_dim].
      qkv: see ``attend_blocks``.
      held: likewise.
      scale: likewise.

    Returns:
      [B, heads, sources, 1 + formats] float32: 0 for the choice that is in force.
    """
    query, key, value = (x.astype(jnp.float32) for x in qkv[:3])
    own_logits = _logits(query, key, scale)
    # Any number near the logits does in place of their maximum: all sums are divided by each other.
    largest = own_logits.max(-1, keepdims=True)

    def sums(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the softmax's numerators [sources, B, T, heads, d] and denominators [..., 1]."""
        weights = jnp.exp(_logits(query, keys, scale) - largest)
        found = [
            _sums(weights[..., start:stop], values[:, start:stop])
            for start, stop in pairwise((0, *held.ends))
        ]
        above, below = zip(*found, strict=True)
        return jnp.stack(above), jnp.stack(below)

    own = _sums(jnp.exp(own_logits - largest), value)
    there = (held.choice > 0).T[:, None, None, :, None]
    kept = [jnp.where(there, x, 0) for x in sums(*held.in_force())]
    output = (own[0] + kept[0].sum(0)) / (own[1] + kept[1].sum(0))
    apart = 1 - jnp.eye(len(held.ends), dtype=jnp.float32)
    above, below = (
        one[None] + jnp.einsum("jk,k...->j...", apart, rest, precision=_PRECISION)
        for one, rest in zip(own, kept, strict=True)
    )

    def effects(above: jax.Array, below: jax.Array) -> jax.Array:
        return jnp.einsum(
            "btnd,jbtnd->bnj", gradient, above / below - output[None], precision=_PRECISION
        )

    def of_version(version: tuple[jax.Array, jax.Array]) -> jax.Array:
        more_above, more_below = sums(*version)
        return effects(above + more_above, below + more_below)

    versions = lax.map(of_version, held.tokens.kept)
    found = jnp.moveaxis(jnp.concatenate([effects(above, below)[None], versions]), 0, -1)
    in_force = jax.nn.one_hot(held.choice, found.shape[-1], dtype=bool)
    return jnp.where(in_force[None], 0, found)


def _sums(weights: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return sum of weights x values [B, T, heads, d] and of weights [B, T, heads, 1]."""
    above = jnp.einsum("bnts,bsnd->btnd", weights, values, precision=_PRECISION)
    return above, jnp.swapaxes(weights.sum(-1), 1, 2)[..., None]


def _logits(query: jax.Array, keys: jax.Array, scale: float) -> jax.Array:
    """Return [B, heads, T, S]."""
    return scale * jnp.einsum("btnd,bsnd->bnts", query, keys, precision=_PRECISION)
