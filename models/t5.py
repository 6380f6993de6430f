"""The encoder of T5 v1.1 (arXiv 1910.10683, 2002.05202), which turns prompts into text features.

Flan-T5-XL is the one Infinity was trained with.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from amskv_jax.models.layers import RMSNorm
from amskv_jax.models.module import Module
from amskv_jax.models.parts import Built, module_of
from amskv_jax.precision import precision_of

MAX_DISTANCE = 2**20


@dataclass(frozen=True)
class T5Config:
    """Shape of a T5 v1.1 encoder.

    Attributes:
      depth: number of blocks.
      width: channels of the residual stream and of the features, D.
      num_heads: attention heads.
      head_dim: channels of a head; all heads together need not have D.
      hidden: channels between the two layers of the feed-forward part.
      vocab_size: rows of the embedding; at least as many as the tokenizer knows tokens.
      num_buckets: of relative positions, half of them for keys behind the query.
      max_distance: from which on all distances share the last bucket of their side.
      norm_epsilon: added to the mean square before the root.
    """

    depth: int
    width: int
    num_heads: int
    head_dim: int
    hidden: int
    vocab_size: int = 32128
    num_buckets: int = 32
    max_distance: int = 128
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        exact = self.num_buckets // 4
        if self.num_buckets % 4 or not exact < self.max_distance <= MAX_DISTANCE:
            raise ValueError(
                f"{self.num_buckets} buckets up to distance {self.max_distance}: expected a "
                f"multiple of 4, and a distance from {exact + 1} to {MAX_DISTANCE}"
            )
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm epsilon {self.norm_epsilon}: expected a number from 0 to 1")


FLAN_T5_XL = T5Config(depth=24, width=2048, num_heads=32, head_dim=64, hidden=5120)
"""google/flan-t5-xl, the text encoder of Infinity."""


def relative_buckets(distances: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of key position minus query position.

    Each side has half of the buckets. Of these one half is for one distance each, the others grow
    by a common factor up to ``max_distance``.

    Args:
      distances: integers of any shape.
      num_buckets: a multiple of 4.
      max_distance: the first distance that a further bucket would begin with.

    Returns:
      int32 of the same shape, in [0, num_buckets).
    """
    side = num_buckets // 2
    exact = side // 2
    growing = side - exact
    # The k-th growing bucket begins at the least d with (d / exact)^growing >= (max / exact)^k:
    # Python's whole numbers tell where, logarithms only roughly.
    starts, start = [], exact
    for k in range(1, growing):
        start = max(start, int(exact * (max_distance / exact) ** (k / growing)) - 1)
        while start**growing < max_distance**k * exact ** (growing - k):
            start += 1
        starts.append(start)
    size = np.abs(distances)
    bucket = np.where(size < exact, size, exact + np.searchsorted(starts, size, side="right"))
    return (bucket + side * (np.asarray(distances) > 0)).astype(np.int32)


class Linear(Module):
    """A matrix product in ``dtype``, summed and returned in float32; no bias.

    Attributes:
      features: channels of the result.
      deviation: standard deviation of random weights.
      dtype: of the operands.
    """

    features: int
    deviation: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., C] to [..., features] float32."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.deviation), shape)
        return jnp.einsum(
            "...c,cf->...f",
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            precision=precision_of(self.dtype),
            preferred_element_type=jnp.float32,
        )


class RelativeAttention(Module):
    """Self-attention in both directions, whose logits are not divided by the root of head_dim."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """Map [B, T, D] to [B, T, D] float32.

        ``bias`` [heads, T, T] float32 is added to the logits; keys where ``mask`` [B, T] is false
        are seen by none.
        """
        heads, head_dim, width = self.config.num_heads, self.config.head_dim, self.config.width
        inner, precision = heads * head_dim, precision_of(self.dtype)

        def project(name: str, deviation: float) -> jax.Array:
            h = Linear(inner, deviation, self.dtype, name=name)(x)
            return h.reshape(*h.shape[:-1], heads, head_dim).astype(self.dtype)

        # Small queries take the place of the division.
        query = project("query", (width * head_dim) ** -0.5)
        key, value = project("key", width**-0.5), project("value", width**-0.5)
        logits = jnp.einsum(
            "bthd,bshd->bhts",
            query,
            key,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        # Finite, so that a row without any token gives no NaN.
        lowest = jnp.finfo(jnp.float32).min
        logits = jnp.where(mask[:, None, None], logits + bias[None], lowest)
        weights = nn.softmax(logits, axis=-1).astype(self.dtype)
        output = jnp.einsum(
            "bhts,bshd->bthd",
            weights,
            value,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        output = output.reshape(*output.shape[:-2], inner)
        return Linear(width, inner**-0.5, self.dtype, name="out")(output)


class GatedFeedForward(Module):
    """Two linear layers with a gate, GELU(x W) * x V (arXiv 2002.05202), GELU by tanh."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, T, D] to [B, T, D] float32."""
        width = x.shape[-1]
        gate = Linear(self.hidden, width**-0.5, self.dtype, name="gate")(x)
        up = Linear(self.hidden, width**-0.5, self.dtype, name="up")(x)
        h = nn.gelu(gate, approximate=True) * up
        return Linear(width, self.hidden**-0.5, self.dtype, name="down")(h)


class T5Block(Module):
    """One block: attention and a feed-forward part, each on the normalised residual stream."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """Map the residual stream [B, T, D] float32 to the next, see ``RelativeAttention``."""
        config, epsilon = self.config, self.config.norm_epsilon
        h = RMSNorm(epsilon, name="attention_norm")(x)
        x = x + RelativeAttention(config, self.dtype, name="attention")(h, bias, mask)
        h = RMSNorm(epsilon, name="mlp_norm")(x)
        return x + GatedFeedForward(config.hidden, self.dtype, name="mlp")(h)


class T5Encoder(Module):
    """The encoder. Blocks are stacked on a leading layer axis of the parameters.

    Attributes:
      config: its shape.
      dtype: of matrix products. Norms, softmax and residual stream are float32: the stream of
        flan-t5-xl grows beyond what float16 can hold, and bfloat16 would round it off.
    """

    config: T5Config
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Create the submodules; parameter names are the checkpoint format."""
        config = self.config
        normal = nn.initializers.normal
        self.embedding = nn.Embed(config.vocab_size, config.width, embedding_init=normal(1.0))
        shape = (config.num_buckets, config.num_heads)
        self.position_bias = self.param("position_bias", normal(config.width**-0.5), shape)
        self.blocks = T5Block(config, self.dtype)
        self.norm = RMSNorm(config.norm_epsilon)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the features of every token.

        Args:
          tokens: [B, T] int32.
          mask: [B, T] bool, true where there is a token; the others are seen by none.

        Returns:
          [B, T, D] float32. What stands where there is no token means nothing.
        """

        def body(
            block: T5Block, x: jax.Array, bias: jax.Array, mask: jax.Array
        ) -> tuple[jax.Array, None]:
            return block(x, bias, mask), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.config.depth,
        )
        x, _ = scan(self.blocks, self.embed(tokens), self.bias(tokens.shape[1]), mask)
        return self.norm(x)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the input [B, T, D] float32 of the first block; it is not scaled."""
        return self.embedding(tokens).astype(jnp.float32)

    def bias(self, length: int) -> jax.Array:
        """Return what all blocks add to their attention logits, [heads, T, T] float32.

        It depends on key position minus query position alone.
        """
        config = self.config
        distances = np.arange(1 - length, length)
        buckets = relative_buckets(distances, config.num_buckets, config.max_distance)
        by_distance = self.position_bias.astype(jnp.float32)[buckets]  # [2 T - 1, heads]
        position = jnp.arange(length)
        return by_distance[position[None] - position[:, None] + length - 1].transpose(2, 0, 1)


@module_of.register
def _(config: T5Config) -> Built:
    shape = (1, 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return T5Encoder(config), (tokens, jax.ShapeDtypeStruct(shape, jnp.bool_))
