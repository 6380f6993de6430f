"""Layers which transformers of several kinds share."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from amskv_jax.attention import QKV, Attention, Product
from amskv_jax.float8 import Float8Weight, float8_product
from amskv_jax.mesh import gathered, shards, summed
from amskv_jax.models.module import Module
from amskv_jax.packed_weight import is_packed, widened
from amskv_jax.precision import precision_of
from amskv_jax.stacked import Int8Weight, StackedWeight

NORM_EPSILON = 1e-6
MAX_LOG_TEMPERATURE = math.log(100.0)


def per_channel(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Return a vector [C] with the axes of x [..., C], [1, ..., C]."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def layer_norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Return the normalised ``x * (1 + scale) + shift``, in float32, with no gain of its own."""
    shape = x.shape
    x = x.astype(jnp.float32).reshape(-1, shape[-1])  # see ``normalize_heads``
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normalised = (centred * lax.rsqrt(variance + NORM_EPSILON)).reshape(shape)
    return normalised * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)


def normalize_heads(x: jax.Array) -> jax.Array:
    """Return vectors of unit length along the last axis, in float32."""
    # With few axes: XLA tries tiles of all shapes, which took a third of the sampler's compilation.
    shape = x.shape
    x = x.astype(jnp.float32).reshape(-1, *shape[-2:])
    norm = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
    return (x / jnp.maximum(norm, 1e-12)).reshape(shape)


class RMSNorm(Module):
    """Scaling to a mean square of one, with a gain per channel, in float32; no mean, no bias."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., D] to [..., D] float32."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        root = lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return x * root * per_channel(scale.astype(jnp.float32), x)


class BlockDense(Module):
    """A linear layer of a block; how its kernel is kept decides how the product is computed.

    Attributes:
      features: channels of the output.
      dtype: of product and output.
      is_shared: devices share the contracted channels, so that their products are summed.
      gelu: whether a tanh-approximated GELU follows.
      output: the type to which the next product rounds, where this one can do it already.
    """

    features: int
    dtype: Any = jnp.float32
    is_shared: bool = False
    gelu: bool = False
    output: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Map [..., in] to [..., features]; a bias [features] that is given is no parameter."""
        init, shape = nn.initializers.lecun_normal(), (x.shape[-1], self.features)
        kept = self.param("kernel", init, shape)
        if bias is None:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        bias = bias.astype(self.dtype)
        if isinstance(kept, Int8Weight):
            return kept.product(x, bias, gelu=self.gelu, dtype=self.output or self.dtype)
        if isinstance(kept, Float8Weight):
            y = float8_product(x, kept).astype(self.dtype)
        else:
            x = x.astype(self.dtype)
            if isinstance(kept, StackedWeight):
                if kept.pays(x) and shards() == 1:
                    return kept.product(x, bias, self.gelu)
                kept = kept.copied()
            dimensions = (((x.ndim - 1,), (0,)), ((), ()))
            precision = precision_of(self.dtype)
            y = lax.dot_general(x, kept.astype(self.dtype), dimensions, precision=precision)
        y = summed(y) if self.is_shared else y
        y += per_channel(bias, y)
        return nn.gelu(y, approximate=True) if self.gelu else y


class SelfAttention(Module):
    """Multi-head self-attention around an injected attention function.

    Where devices share the heads (``mesh``), each has the weights of its own.

    Attributes:
      num_heads: heads; they share the width equally.
      l2_norm: queries and keys have unit length, with a learned temperature per head.
      dtype: of the products, and of what ``attention`` gets.
      rotate: turns queries and keys [rows, T, heads, head_dim] float32 by their positions.
    """

    num_heads: int
    l2_norm: bool = True
    dtype: Any = jnp.float32
    rotate: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, attention: Attention) -> tuple[jax.Array, Any]:
        """Map [rows, T, D] to [rows, T, D] and the carry of ``attention``."""
        heads, width = self.num_heads // shards(), x.shape[-1] // shards()
        query_bias = self.param("query_bias", nn.initializers.zeros, (width,))
        value_bias = self.param("value_bias", nn.initializers.zeros, (width,))
        # As one bias, which is part of the product.
        bias = jnp.concatenate([query_bias, jnp.zeros_like(query_bias), value_bias])
        product = BlockDense(3 * width, dtype=self.dtype, name="qkv")(x, bias)
        product = product.reshape(*product.shape[:-1], 3 * heads, width // heads)
        query, key, value = jnp.split(product, 3, axis=-2)
        temperature = None
        if self.l2_norm:
            initial = nn.initializers.constant(math.log(4.0))
            log_temperature = self.param("log_temperature", initial, (heads,)).astype(jnp.float32)
            temperature = jnp.exp(jnp.minimum(log_temperature, MAX_LOG_TEMPERATURE))
            # Of every token: of so small an operand as the heads', XLA thinks that it pays to give
            # a kernel few neighbouring channels of many tokens, and takes three times as long.
            of_tokens = lax.optimization_barrier(
                jnp.broadcast_to(temperature[None, None], query.shape[:-1])
            )
            query = normalize_heads(query) * of_tokens[..., None]
            key = normalize_heads(key)
        if self.rotate is not None:
            query, key, temperature = self.rotate(query), self.rotate(key), None
        query, key = query.astype(self.dtype), key.astype(self.dtype)
        output, carry = attention(QKV(query, key, value, Product(product, temperature)))
        output = output.reshape(*output.shape[:-2], width)
        out = BlockDense(x.shape[-1], dtype=self.dtype, is_shared=True, name="out")
        return out(output), carry


class FeedForward(Module):
    """Two linear layers, the first of ``hidden`` channels, around a tanh-approximated GELU."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [rows, T, D] to [rows, T, D]."""
        own: Any = self.variables.get("params", {})
        first, second = (own.get(name, {}).get("kernel") for name in ("up", "down"))
        up = BlockDense(
            self.hidden // shards(),
            dtype=self.dtype,
            gelu=True,
            output=jnp.float8_e4m3fn if isinstance(second, Float8Weight) else None,
            name="up",
        )
        down = BlockDense(x.shape[-1], dtype=self.dtype, is_shared=True, name="down")
        # As one row of tokens in float8: nothing may stand between the first product, GELU and the
        # rounding if they are to be one call of cuBLASLt.
        flat = isinstance(first, Float8Weight)
        tokens = x.reshape(-1, x.shape[-1]) if flat else x
        return down(up(tokens)).reshape(x.shape)


class StackedDense(Module):
    """One linear layer per block, applied to the same input at once."""

    depth: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [rows, D] to [depth, rows, features] in float32."""
        width, features = x.shape[-1], self.features // shards()
        init = nn.initializers.truncated_normal(0.5 * math.sqrt(1 / (3 * width)))
        kernel = self.param("kernel", init, (self.depth, width, features))
        bias = self.param("bias", nn.initializers.zeros, (self.depth, features))
        x = x.astype(kernel.dtype)
        product = partial(
            jnp.einsum,
            precision=precision_of(kernel.dtype),
            preferred_element_type=jnp.float32,
        )
        if is_packed(kernel):  # one after the other, as all at once would widen all
            y = lax.map(lambda layer: product("rd,de->re", x, widened(layer)), kernel)
        else:
            y = product("rd,lde->lre", x, kernel)
        return gathered(y + bias[:, None].astype(jnp.float32), -1)


class Head(Module):
    """The classifier over the codebook: products in ``dtype``, sums and result in float32."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [rows, T, D] to [rows, T, V] float32."""
        init = nn.initializers.truncated_normal(0.02)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = jnp.einsum(
            "rtd,dv->rtv",
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            precision=precision_of(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return y + per_channel(bias.astype(jnp.float32), y)
