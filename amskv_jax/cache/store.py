"""Buffers of keys and values, and updating them in place inside a loop."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from amskv_jax.attention import QKV, Implementation


def after(output: jax.Array, layer: jax.Array, layers: int) -> jax.Array:
    """Return ``layer``, but so that it is known no earlier than ``output``.

    A loop that reads a buffer and then writes to it does so in place only if XLA knows that reading
    comes first. Otherwise it copies the whole buffer, all layers of it, in every round. Data fixes
    the order: a write at an index which follows from what was read must come later. (An
    ``optimization_barrier`` does not help: it is gone before copies are decided upon.)

    Args:
      output: [rows, T, heads, head_dim], computed from what was read.
      layer: int32 scalar below ``layers``.
      layers: layers of the buffer.
    """
    bit = (output[0, 0, 0, 0] > 0).astype(jnp.int32)
    return jnp.minimum(layer, layers - 1 + bit)


@struct.dataclass
class KVCache:
    """Keys and values of all layers that share a row: [layers, rows, capacity, heads, head_dim]."""

    keys: jax.Array
    values: jax.Array


class Slots(Protocol):
    """Where the tokens of layers that share a row lie; frozen, hashable, made before tracing."""

    def init(
        self, layers: int, rows: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> Any:
        """Return empty buffers for this many layers and batch rows."""
        ...

    def attend(
        self,
        cache: Any,
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, Any]:
        """Attend to the cache and to the step's own tokens, then store what later steps need.

        Args:
          cache: the buffers.
          layer: which of the buffers' layers this is, int32 scalar.
          step: the step, static.
          qkv: queries, keys and values of the step's own tokens, [rows, T, heads, head_dim] each.
          scale: factor of the logits.
          implementation: see ``attention.attend``.

        Returns:
          The attention's output [rows, T, heads, head_dim], and the updated buffers.
        """
        ...
