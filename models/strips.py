"""Convolution of large maps strip by strip, which gives the same numbers in less memory.

Whole maps at the resolution of a large picture are what a decoder's memory goes into. What a layer
takes in and gives out has to exist, because group norms want the statistics of whole maps; the
copies between (normalised, enlarged, in float32, the workspace of a convolution) need not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

Pointwise = Callable[[jax.Array], jax.Array]
"""Acts on every position alone: [B, n, w, C] -> [B, n, w, C]."""


def identity(rows: jax.Array) -> jax.Array:
    """Return the rows as they are."""
    return rows


def in_strips(
    module: nn.Module,
    step: Callable[..., jax.Array],
    maps: Sequence[tuple[jax.Array, Pointwise]],
    features: int,
    dtype: Any,
    *,
    enlarge: int = 1,
    strip_bytes: int | None = None,
) -> jax.Array:
    """Return ``step(module, *maps)``, in strips of rows one after the other if maps are large.

    Args:
      module: bound module whose weights ``step`` uses.
      step: sees one row of context above and below, with zeros outside the map: convolutions of
        stride 1 with kernels of at most 3x3 that keep the size, after nearest-neighbour
        enlargement by ``enlarge``. [B, n, w, C] -> [B, enlarge n, enlarge w, features].
      maps: [B, h, w, C] each, and what to do to them before ``step``.
      features: channels of the result.
      dtype: of the result.
      enlarge: rows of the result for one row of the maps.
      strip_bytes: if the first map takes more bytes per picture, enlarged and in ``dtype``, it is
        cut into strips of at most that size; None is never.

    Returns:
      [B, enlarge h, enlarge w, features].
    """
    batch, height, width, channels = maps[0][0].shape
    row_bytes = enlarge**2 * width * channels * jnp.dtype(dtype).itemsize
    length = strip_length(height, row_bytes, strip_bytes)
    if length == height:
        return step(module, *(before(x) for x, before in maps))

    def strip(module: nn.Module, result: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        positions = start + jnp.arange(-1, length + 1)
        inside = ((positions >= 0) & (positions < height))[:, None, None]
        positions = positions.clip(0, height - 1)
        strips = [jnp.where(inside, before(x.take(positions, axis=1)), 0) for x, before in maps]
        rows = step(module, *strips)[:, enlarge:-enlarge].astype(dtype)
        return lax.dynamic_update_slice_in_dim(result, rows, enlarge * start, axis=1), None

    # Every strip is overwritten. A constant would do, but nothing would keep the compiler from
    # making the results of all layers before the first one is needed.
    shape = (batch, enlarge * height, enlarge * width, features)
    result = jnp.broadcast_to(maps[0][0][:, :1, :1, :1].astype(dtype), shape)
    every = nn.scan(strip, variable_broadcast="params", split_rngs={"params": False})
    result, _ = every(module, result, jnp.arange(0, height, length))
    return result


def sum_in_strips(
    x: jax.Array, term: Callable[[jax.Array], jax.Array], strip_bytes: int | None = None
) -> jax.Array:
    """Return the sum of ``term`` over strips of rows of maps.

    Args:
      x: maps [B, h, w, C].
      term: the sum over the rows [B, n, w, C] which it is given; any shape.
      strip_bytes: bound of a strip's bytes per picture, None for none.
    """
    _, height, width, channels = x.shape
    length = strip_length(height, width * channels * x.dtype.itemsize, strip_bytes)
    if length == height:
        return term(x)
    starts = jnp.arange(0, height, length)
    terms = lax.map(lambda start: term(lax.dynamic_slice_in_dim(x, start, length, 1)), starts)
    return terms.sum(axis=0)


def strip_length(height: int, row_bytes: int, strip_bytes: int | None) -> int:
    """Return of how many rows a strip is: the largest divisor of ``height`` within the bound.

    Args:
      height: rows of a map.
      row_bytes: bytes of one of them.
      strip_bytes: bound of a strip's bytes, None for none; one row is the least.
    """
    if strip_bytes is None:
        return height
    lengths = (n for n in range(height, 0, -1) if height % n == 0)
    return next((n for n in lengths if n * row_bytes <= strip_bytes), 1)
