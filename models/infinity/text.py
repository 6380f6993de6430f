"""What Infinity makes of text features: one vector of the whole, and keys and values per layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax

from amskv_jax.attention import attend
from amskv_jax.mesh import shards
from amskv_jax.models.guidance import Guidance
from amskv_jax.models.layers import per_channel
from amskv_jax.models.module import Module
from amskv_jax.packed_weight import widened
from amskv_jax.precision import precision_of

Array = jax.Array | np.ndarray
"""On a device or on the host."""


@struct.dataclass
class TextCondition:
    """The texts of B pictures, padded to one length, and what to keep away from.

    Attributes:
      features: of a text encoder, [B, L, C] float32; what lies after a text's end has no influence
        but must be finite.
      lengths: tokens of every text, [B] int32, from 1 to L.
      negative_features: of negative prompts, [B, L', C] float32; None for the learned
        unconditional features, as many as the picture's own text has tokens.
      negative_lengths: [B] int32 from 1 to L'; None likewise.
    """

    features: Array
    lengths: Array
    negative_features: Array | None = None
    negative_lengths: Array | None = None

    def rows(self, unconditional: jax.Array, guidance: Guidance) -> tuple[jax.Array, jax.Array]:
        """Return features [rows, L'', C] float32 and lengths [rows] of all rows.

        Args:
          unconditional: the learned features, [text_maxlen, C].
          guidance: makes rows of pictures.
        """
        features, lengths = jnp.asarray(self.features, jnp.float32), jnp.asarray(self.lengths)
        if not guidance.paired:
            return features, lengths
        if self.negative_features is None or self.negative_lengths is None:
            table = _pad(unconditional.astype(jnp.float32), features.shape[1])
            others, other_lengths = jnp.broadcast_to(table, features.shape), lengths
        else:
            others = jnp.asarray(self.negative_features, jnp.float32)
            other_lengths = jnp.asarray(self.negative_lengths)
            length = max(features.shape[1], others.shape[1])
            features, others = (
                jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0))) for x in (features, others)
            )
        return guidance.pair(features, others), guidance.pair(lengths, other_lengths)


class Pooling(Module):
    """Attention of one learned query per head to a text, in float32.

    Attributes:
      width: channels of the result.
      num_heads: heads; they share ``width`` equally.
    """

    width: int
    num_heads: int

    @nn.compact
    def __call__(self, features: jax.Array, lengths: jax.Array) -> jax.Array:
        """Map features [rows, L, C] with lengths [rows] to [rows, D] float32."""
        heads, head_dim = self.num_heads, self.width // self.num_heads
        dense = {"dtype": jnp.float32, "precision": lax.Precision.HIGHEST}
        query = self.param("query", nn.initializers.normal(0.02), (heads, head_dim))
        both = nn.Dense(2 * self.width, use_bias=False, name="key_value", **dense)(features)
        key, value = jnp.split(both, 2, axis=-1)
        bias = self.param("value_bias", nn.initializers.zeros, (self.width,))
        key, value = (
            x.reshape(*x.shape[:2], heads, head_dim)
            for x in (key, value + per_channel(bias.astype(jnp.float32), value))
        )
        query = jnp.broadcast_to(query.astype(jnp.float32), (len(features), 1, heads, head_dim))
        scale = 1 / math.sqrt(head_dim)
        pooled = attend(query, key, value, scale, "xla", lengths).reshape(-1, self.width)
        return nn.Dense(self.width, name="out", **dense)(pooled)


class Projection(Module):
    """Two linear layers around a tanh-approximated GELU: what the cross-attention reads.

    Attributes:
      width: channels of both.
      dtype: of the products.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Map [rows, L, C] to [rows, L, D] in ``dtype``."""
        dense = {"dtype": self.dtype, "precision": precision_of(self.dtype)}
        h = nn.gelu(nn.Dense(self.width, name="up", **dense)(features), approximate=True)
        return nn.Dense(self.width, name="out", **dense)(h)


class KeysValues(Module):
    """The cross-attention's keys and values in all blocks, once per picture.

    Attributes:
      depth: number of blocks.
      num_heads: heads; they share the width equally.
      dtype: of the products and the result.
    """

    depth: int
    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map [rows, L, D] to keys and values [depth, rows, L, heads, head_dim] each."""
        width, heads = text.shape[-1] // shards(), self.num_heads // shards()
        init = nn.initializers.truncated_normal(0.5 * math.sqrt(1 / (3 * text.shape[-1])))
        kernel = self.param("kernel", init, (self.depth, text.shape[-1], 2 * width))
        bias = self.param("value_bias", nn.initializers.zeros, (self.depth, width))
        shape = (*text.shape[:2], heads, width // heads)
        text = text.astype(self.dtype)

        def project(layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            kernel, bias = (x.astype(self.dtype) for x in widened(layer))
            both = jnp.matmul(text, kernel, precision=precision_of(self.dtype))
            key, value = jnp.split(both, 2, axis=-1)
            return key.reshape(shape), (value + per_channel(bias, value)).reshape(shape)

        # One after the other, as all at once would copy the text for every block.
        keys, values = lax.map(project, (kernel, bias))
        return keys, values


def _pad(table: jax.Array, length: int) -> jax.Array:
    """Return the first rows of a table, with zeros where it has fewer."""
    return jnp.pad(table[:length], ((0, max(0, length - len(table))), (0, 0)))
