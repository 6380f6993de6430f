"""Convolutional encoders and decoders of the tokenizers, those of VQGAN (arXiv 2012.09841)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from amskv_jax.models.layers import per_channel
from amskv_jax.models.strips import identity, in_strips, sum_in_strips
from amskv_jax.precision import precision_of

NUM_GROUPS = 32
NORM_EPSILON = 1e-6


def convolution(features: int, size: int, dtype: DTypeLike, **options: Any) -> nn.Conv:
    """Return a convolution with a square kernel which, at stride 1, keeps the map's size."""
    options = {"padding": size // 2, "precision": precision_of(dtype), **options}
    return nn.Conv(features, (size, size), dtype=dtype, **options)


class GroupNorm(nn.Module):
    """Group norm of 32 groups, with float32 statistics of whole maps.

    Attributes:
      dtype: of the result.
      strip_bytes: see ``strips.sum_in_strips``.
    """

    dtype: DTypeLike
    strip_bytes: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """Return the norm of maps x [B, h, w, C] as a function of any of their rows."""
        batch, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        size = channels // NUM_GROUPS

        def mean_of(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
            def term(rows: jax.Array) -> jax.Array:
                groups = rows.astype(jnp.float32).reshape(*rows.shape[:-1], NUM_GROUPS, size)
                return function(groups).sum((1, 2, 4), keepdims=True)

            return sum_in_strips(x, term, self.strip_bytes) / (height * width * size)

        def of_groups(statistic: jax.Array) -> jax.Array:
            wide = jnp.broadcast_to(statistic, (batch, 1, 1, NUM_GROUPS, size))
            return wide.reshape(batch, 1, 1, channels)

        # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
        mean = mean_of(lambda groups: groups)
        variance = mean_of(lambda groups: jnp.square(groups - mean))
        shift, factor = of_groups(mean), of_groups(lax.rsqrt(variance + NORM_EPSILON))
        factor, offset = factor * per_channel(scale, x), per_channel(bias, x)
        return lambda rows: ((rows - shift) * factor + offset).astype(self.dtype)


def normalize(x: jax.Array, dtype: DTypeLike, name: str) -> jax.Array:
    """Return the group norm of maps [B, h, w, C]."""
    return GroupNorm(dtype, name=name)(x)(x)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: [B, h, w, C'] -> [B, h, w, channels].

    Attributes:
      channels: channels of the result.
      dtype: of the computation.
      strip_bytes: see ``strips.in_strips``.
    """

    channels: int
    dtype: DTypeLike
    strip_bytes: int | None = None

    def setup(self) -> None:
        """Declare the layers; the shortcut has weights only where the channels change."""
        self.norm1 = GroupNorm(self.dtype, self.strip_bytes)
        self.norm2 = GroupNorm(self.dtype, self.strip_bytes)
        self.conv1 = convolution(self.channels, 3, self.dtype)
        self.conv2 = convolution(self.channels, 3, self.dtype)
        self.shortcut = convolution(self.channels, 1, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the block's output."""

        def first(block: ResidualBlock, rows: jax.Array) -> jax.Array:
            return block.conv1(rows)

        def second(block: ResidualBlock, rows: jax.Array, x: jax.Array) -> jax.Array:
            return block.conv2(rows) + (x if x.shape[-1] == self.channels else block.shortcut(x))

        strips = partial(
            in_strips, self, features=self.channels, dtype=self.dtype, strip_bytes=self.strip_bytes
        )
        h = strips(first, [(x, _activated(self.norm1(x)))])
        return strips(second, [(h, _activated(self.norm2(h))), (x, identity)])


class AttentionBlock(nn.Module):
    """Residual self-attention with one head over all positions of a map [B, h, w, C]."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the block's output."""
        batch, height, width, channels = x.shape
        qkv = convolution(3 * channels, 1, self.dtype, name="qkv")(normalize(x, self.dtype, "norm"))
        query, key, value = jnp.split(qkv.reshape(batch, height * width, -1), 3, axis=-1)
        precision = precision_of(self.dtype)
        logits = jnp.einsum(
            "bqc,bkc->bqk",
            query,
            key,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        weights = nn.softmax(logits * channels**-0.5).astype(self.dtype)
        attended = jnp.einsum("bqk,bkc->bqc", weights, value, precision=precision)
        return x + convolution(channels, 1, self.dtype, name="out")(attended.reshape(x.shape))


class Level(nn.Module):
    """Residual blocks at one resolution, then possibly a change to the next one.

    Attributes:
      channels: channels of the result.
      num_blocks: residual blocks.
      attention: attend after every residual block.
      resample: "downsample" halves the resolution at the end, "upsample" doubles it.
      dtype: of the computation.
      strip_bytes: see ``strips.in_strips``.
    """

    channels: int
    num_blocks: int
    attention: bool
    resample: Literal["downsample", "upsample"] | None
    dtype: DTypeLike
    strip_bytes: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the level's output."""
        for index in range(self.num_blocks):
            name = f"block_{index}"
            x = ResidualBlock(self.channels, self.dtype, self.strip_bytes, name=name)(x)
            if self.attention:
                x = AttentionBlock(self.dtype, name=f"attention_{index}")(x)
        if self.resample is None:
            return x
        if self.resample == "upsample":
            return in_strips(
                convolution(self.channels, 3, self.dtype, name="upsample"),
                lambda conv, rows: conv(rows.repeat(2, axis=1).repeat(2, axis=2)),
                [(x, identity)],
                self.channels,
                self.dtype,
                enlarge=2,
                strip_bytes=self.strip_bytes,
            )
        # One row and column of zeros, at the bottom and at the right only.
        options = {"strides": 2, "padding": ((0, 1), (0, 1))}
        return convolution(self.channels, 3, self.dtype, name="downsample", **options)(x)


class Middle(nn.Module):
    """Residual block, attention if wanted, residual block at the lowest resolution."""

    attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the middle's output."""
        x = ResidualBlock(x.shape[-1], self.dtype, name="block_1")(x)
        if self.attention:
            x = AttentionBlock(self.dtype, name="attention_1")(x)
        return ResidualBlock(x.shape[-1], self.dtype, name="block_2")(x)


class Encoder(nn.Module):
    """Pictures [B, H, W, 3] -> features [B, H / f, W / f, features], f = 2^(levels - 1).

    Attributes:
      channels: channels of the first convolution.
      multipliers: channels of each level over ``channels``; every level but the last halves the
        resolution.
      num_blocks: residual blocks per level.
      features: channels of the result.
      attention: attend at the lowest resolution.
      dtype: of the computation.
    """

    channels: int
    multipliers: tuple[int, ...]
    num_blocks: int
    features: int
    attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Return the features of pictures."""
        h = convolution(self.channels, 3, self.dtype, name="conv_in")(pictures)
        last = len(self.multipliers) - 1
        for level, multiplier in enumerate(self.multipliers):
            h = Level(
                channels=self.channels * multiplier,
                num_blocks=self.num_blocks,
                attention=self.attention and level == last,
                resample=None if level == last else "downsample",
                dtype=self.dtype,
                name=f"down_{level}",
            )(h)
        h = Middle(self.attention, self.dtype, name="middle")(h)
        h = nn.silu(normalize(h, self.dtype, "norm_out"))
        return convolution(self.features, 3, self.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Features [B, h, w, C] -> pictures [B, f h, f w, 3], f = 2^(levels - 1).

    Levels keep the encoder's numbers, so the one of the highest number runs first.

    Attributes:
      channels: channels of the last level, with a multiplier of 1.
      multipliers: channels of each level over ``channels``; every level but the first doubles the
        resolution.
      num_blocks: residual blocks per level.
      attention: attend at the lowest resolution.
      dtype: of the computation.
      strip_bytes: see ``strips.in_strips``.
    """

    channels: int
    multipliers: tuple[int, ...]
    num_blocks: int
    attention: bool
    dtype: DTypeLike
    strip_bytes: int | None = None

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Return the pictures of features, not clamped to [-1, 1]."""
        last = len(self.multipliers) - 1
        lowest_channels = self.channels * self.multipliers[last]
        h = convolution(lowest_channels, 3, self.dtype, name="conv_in")(features)
        h = Middle(self.attention, self.dtype, name="middle")(h)
        for level in range(last, -1, -1):
            h = Level(
                channels=self.channels * self.multipliers[level],
                num_blocks=self.num_blocks,
                attention=self.attention and level == last,
                resample="upsample" if level else None,
                dtype=self.dtype,
                strip_bytes=self.strip_bytes,
                name=f"up_{level}",
            )(h)
        norm = GroupNorm(self.dtype, self.strip_bytes, name="norm_out")(h)
        return in_strips(
            convolution(3, 3, self.dtype, name="conv_out"),
            lambda conv, rows: conv(rows),
            [(h, _activated(norm))],
            3,
            self.dtype,
            strip_bytes=self.strip_bytes,
        )


def _activated(norm: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda rows: nn.silu(norm(rows))
