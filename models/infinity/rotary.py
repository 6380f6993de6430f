"""Rotary positions in two dimensions (RoPE, arXiv 2104.09864; their use in arXiv 2412.04431).

The first half of a head's pairs of channels turns with the row, the second half with the column.
The rows and columns of every scale are stretched to those of the last scale of size 1M, whatever
size is drawn, so that a position in the picture has nearly the same angle at all scales. Keys are
cached as they are turned: dropping some from a cache changes nothing for the others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from amskv_jax.models.infinity.schedules import whole_of
from amskv_jax.schedule import ScaleSchedule

BASE = 10000.0


def positions(schedule: ScaleSchedule, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows [h] and the columns [w] of a scale on the last grid of size 1M, int64.

    Raises:
      AmskvError: if it is no schedule of Infinity.
    """
    height, width = schedule.grids[scale]
    last_height, last_width = whole_of(schedule).grids[-1]
    # NumPy rounds halves to even, as the reference does.
    rows = np.rint(np.arange(height) * last_height / height).astype(np.int64)
    columns = np.rint(np.arange(width) * last_width / width).astype(np.int64)
    return rows, columns


def turns(schedule: ScaleSchedule, scale: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine for every pair of channels at every token, [T, head_dim / 2] each.

    Args:
      schedule: the token maps.
      scale: the scale.
      head_dim: channels of a head, a multiple of 4.

    Returns:
      float32, made of small constants where it is traced.

    Raises:
      AmskvError: if it is no schedule of Infinity.
    """
    exponents = np.arange(0, head_dim // 2, 2) / (head_dim // 2)
    frequencies = (BASE**-exponents).astype(np.float32)
    rows, columns = (axis.astype(np.float32) for axis in positions(schedule, scale))
    shape = (len(rows), len(columns), len(frequencies))

    def spread(function: Callable[[np.ndarray], np.ndarray]) -> jax.Array:
        by_row = jnp.broadcast_to(function(rows[:, None] * frequencies)[:, None], shape)
        by_column = jnp.broadcast_to(function(columns[:, None] * frequencies), shape)
        return jnp.concatenate([by_row, by_column], axis=-1).reshape(-1, head_dim // 2)

    return spread(np.cos), spread(np.sin)


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Return queries or keys with channels 2 i and 2 i + 1 turned as ``turns`` says of pair i.

    Args:
      x: [rows, T, heads, head_dim] float32.
      cosine: [T, head_dim / 2] float32.
      sine: likewise.
    """
    # Not by even and odd channels: their results would have to be woven into each other, which
    # costs a GPU a pass over memory of its own.
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    cosine = cosine[None, :, None, :, None]
    sine = jnp.stack([-sine, sine], axis=-1)[None, :, None]
    return (pairs * cosine + pairs[..., ::-1] * sine).reshape(x.shape)
