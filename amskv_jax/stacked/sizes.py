"""How a product with stacked weights is shared out over a GPU."""

from amskv_jax.hopper import processors

GRANULE = 64
"""Channels of a tile, in both directions."""
SIZES = 32, 128
"""Numbers of tokens that there are kernels for; fewer are padded."""
CHUNK = 64
"""Most tokens that are written at once."""
SHARED_BYTES = 224 * 1024
"""Shared memory for a thread block's tiles: a processor's, but for some that barriers take."""


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
