"""Shared memory for tiles of operands and results."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

MOST_BYTES = 128
"""Of a row of a tile."""


def shared_tiles(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Return shared memory as copies and tensor cores want it: in tiles of eight rows."""
    itemsize = jnp.dtype(dtype).itemsize
    row = min(MOST_BYTES, shape[-1] * itemsize)
    tiling = plgpu.TilingTransform((8, row // itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(row)))
