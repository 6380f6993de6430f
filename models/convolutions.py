"""Convolutional encoder and decoder of VAR's tokenizer, those of VQGAN (arXiv 2012.09841)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.precision import precision_of


def convolution(features: int, size: int, dtype: DTypeLike, **options: Any) -> nn.Conv:
    """Return a convolution with a square kernel which, at stride 1, keeps the map's size."""
    options = {"padding": size // 2, "precision": precision_of(dtype), **options}
    return nn.Conv(features, (size, size), dtype=dtype, **options)


def normalize(x: jax.Array, dtype: DTypeLike, name: str) -> jax.Array:
    """Apply a group norm of 32 groups with float32 statistics to maps [B, h, w, C]."""
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    norm = nn.GroupNorm(32, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)
    return norm(x)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: [B, h, w, C'] -> [B, h, w, channels]."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the block's output."""
        h = x
        for index in (1, 2):
            h = nn.silu(normalize(h, self.dtype, f"norm{index}"))
            h = convolution(self.channels, 3, self.dtype, name=f"conv{index}")(h)
        if x.shape[-1] != self.channels:
            x = convolution(self.channels, 1, self.dtype, name="shortcut")(x)
        return x + h


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
    """

    channels: int
    num_blocks: int
    attention: bool
    resample: Literal["downsample", "upsample"] | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the level's output."""
        for index in range(self.num_blocks):
            x = ResidualBlock(self.channels, self.dtype, name=f"block_{index}")(x)
            if self.attention:
                x = AttentionBlock(self.dtype, name=f"attention_{index}")(x)
        if self.resample is None:
            return x
        if self.resample == "upsample":
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            options = {}
        else:  # one row and column of zeros, at the bottom and at the right only
            options = {"strides": 2, "padding": ((0, 1), (0, 1))}
        return convolution(self.channels, 3, self.dtype, name=self.resample, **options)(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the middle's output."""
        x = ResidualBlock(x.shape[-1], self.dtype, name="block_1")(x)
        x = AttentionBlock(self.dtype, name="attention_1")(x)
        return ResidualBlock(x.shape[-1], self.dtype, name="block_2")(x)


class Encoder(nn.Module):
    """Pictures [B, H, W, 3] -> features [B, H / f, W / f, latent channels], f = downsampling."""

    config: VQVAEConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Return the features of pictures."""
        config = self.config
        h = convolution(config.channels, 3, self.dtype, name="conv_in")(pictures)
        last = len(config.channel_multipliers) - 1
        for level, multiplier in enumerate(config.channel_multipliers):
            h = Level(
                channels=config.channels * multiplier,
                num_blocks=config.num_res_blocks,
                attention=level == last,
                resample=None if level == last else "downsample",
                dtype=self.dtype,
                name=f"down_{level}",
            )(h)
        h = nn.silu(normalize(Middle(self.dtype, name="middle")(h), self.dtype, "norm_out"))
        return convolution(config.latent_channels, 3, self.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Features [B, h, w, latent channels] -> pictures [B, f h, f w, 3], f = downsampling.

    Levels keep the encoder's numbers, so the one of the highest number runs first.
    """

    config: VQVAEConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Return the pictures of features, not clamped to [-1, 1]."""
        config = self.config
        last = len(config.channel_multipliers) - 1
        lowest_channels = config.channels * config.channel_multipliers[last]
        h = convolution(lowest_channels, 3, self.dtype, name="conv_in")(features)
        h = Middle(self.dtype, name="middle")(h)
        for level in range(last, -1, -1):
            h = Level(
                channels=config.channels * config.channel_multipliers[level],
                num_blocks=config.num_res_blocks + 1,
                attention=level == last,
                resample="upsample" if level else None,
                dtype=self.dtype,
                name=f"up_{level}",
            )(h)
        h = nn.silu(normalize(h, self.dtype, "norm_out"))
        return convolution(3, 3, self.dtype, name="conv_out")(h)
