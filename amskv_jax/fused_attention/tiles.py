"""Shared memory for tiles of queries, keys and values, and what is copied to it."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.typing import DTypeLike

from amskv_jax.fused_attention.blocks import WIDTH


def tile_memory(*shape: int, dtype: DTypeLike, interpret: Any) -> Any:
    """Return shared memory for tiles of ``WIDTH`` channels; see ``views``.

    Args:
      *shape: [..., tokens, WIDTH].
      dtype: of two bytes.
      interpret: parameters of Pallas' interpreter, which knows no layouts, or None.
    """
    if interpret:
        return plgpu.SMEM(shape, dtype)
    swizzle = plgpu.SwizzleTransform(128)
    eights = plgpu.TilingTransform((8, WIDTH))
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(eights, swizzle)),
        plgpu.SMEM(shape, dtype, transforms=(swizzle,)),
    )


def views(memory: Any, interpret: Any) -> tuple[Any, Any]:
    """Return two views of ``tile_memory``: for tensor cores and registers, and for copies.

    Copies can be of any number of rows if these are not seen in eights. It is the same memory.
    """
    return (memory, memory) if interpret else tuple(memory)


def channels(half: int) -> Any:
    """Return where the channels of one of a head's tiles are."""
    return pl.ds(half * WIDTH, WIDTH)
