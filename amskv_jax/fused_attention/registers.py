"""What the warpgroups of attention compute in registers, of 64 queries by keys or channels."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from amskv_jax.fused_attention.blocks import QUERIES, WIDTH


def full(shape: tuple[int, ...], fill: float, layout: Any) -> jax.Array:
    """Return an array in registers, all of one number, float32."""
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


def of_rows(x: Any, shape: tuple[int, ...]) -> Any:
    """Return a number of every query [64] in all of its row [64, N]; a number of all as it is."""
    return lax.broadcast_in_dim(x, shape, [0]) if jnp.ndim(x) else x


def norms(tiles: Sequence[Any]) -> jax.Array:
    """Return the lengths of vectors whose channels are in tiles [64, WIDTH]: [64] float32."""
    load: Any = plgpu.load  # its parameters differ between versions of JAX
    square = full((QUERIES,), 0, plgpu.Layout.WGMMA.reduce(1))
    for tile in tiles:
        part = load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        square = square + jnp.square(part).sum(axis=1)
    return jnp.maximum(jnp.sqrt(square), 1e-12)


def weighed(sums: Any, weights: jax.Array, tiles: Any, memory: Any) -> list[jax.Array]:
    """Add weights times values to sums as the interpreter can: operands are in shared memory."""
    operand = memory.at[:, pl.ds(0, weights.shape[1])]
    operand[...] = weights

    def product(tile: Any, accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, operand, tile)
        return accumulator[...]

    shape = QUERIES, WIDTH
    return [
        own + pl.run_scoped(partial(product, tile), plgpu.ACC(shape, jnp.float32))
        for own, tile in zip(sums, tiles, strict=True)
    ]
