"""How a product with stacked weights is shared out over a GPU."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from amskv_jax.hopper import processors

GRANULE = 64
"""Channels of a tile, in both directions."""
SIZES = 32, 128
"""Numbers of tokens that there are kernels for; fewer are padded."""
CHUNK = 64
"""Most tokens that are written at once."""
SHARED_BYTES = 224 * 1024
"""Shared memory for a thread block's tiles: a processor's, but for some that barriers take."""
INT8_ROWS = 128
"""Tokens of a tile of a product of whole numbers of 8 bits."""
INT8_SUMMED = 128
"""Input channels whose numbers are in shared memory at once: as many as a row of a tile holds."""
INT8_WRITTEN = 64
"""Output channels that a warpgroup writes at once."""
INT8_PADDED = 8192
"""Tokens of all rows up to which one kernel, which takes two seconds to compile, serves all. A
multiple of ``INT8_ROWS``."""


def splits_for(inputs: int, outputs: int) -> int:
    """Return into how many parts the sum over the input channels is split, each a block's.

    They are the most that give no processor a second block, and no block less than four steps.

    Args:
      inputs: channels that are contracted, a multiple of ``GRANULE``.
      outputs: likewise, of the result.
    """
    steps, blocks = inputs // GRANULE, outputs // GRANULE
    return max(
        splits
        for splits in (1, 2, 4, 8)
        if splits == 1 or (blocks * splits <= processors() and steps // splits >= 4)
    )


def stages_for(tokens: int, steps: int) -> int:
    """Return how many steps' tiles of operands are under way or in use.

    Args:
      tokens: one of ``SIZES``.
      steps: of a block.
    """
    stage = 2 * (GRANULE + tokens) * GRANULE
    written = 4 * min(CHUNK, tokens) * GRANULE
    return min(8, steps, (SHARED_BYTES - written) // stage)


def int8_tile(outputs: int, dtype: DTypeLike) -> tuple[int, int]:
    """Return output channels of a tile, the most that registers hold, and stages of the operands.

    Args:
      outputs: channels of the result, a multiple of ``INT8_WRITTEN``.
      dtype: of the result.
    """
    columns = next(wide for wide in (192, 128, 64) if outputs % wide == 0)
    written = 2 * INT8_ROWS * INT8_WRITTEN * jnp.dtype(dtype).itemsize
    stage = (INT8_ROWS + columns) * INT8_SUMMED
    return columns, min(6, (SHARED_BYTES - written) // stage)
