"""How alike the keys of consecutive scales are: the measure by which AMS-KV classifies layers."""

import jax
import jax.numpy as jnp

from amskv_jax.resize import resize


def key_similarity(
    previous: jax.Array, key: jax.Array, previous_grid: tuple[int, int], grid: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Compare the keys of one scale with those of the scale before, enlarged bilinearly.

    Args:
      previous: [rows, h * w, heads, head_dim].
      key: [rows, H * W, heads, head_dim].
      previous_grid: (h, w).
      grid: (H, W).

    Returns:
      Minus the mean Euclidean distance and the mean cosine, both [rows] float32 and over heads and
      tokens (AMS-KV, arXiv 2511.16047).
    """
    rows, _, heads, head_dim = key.shape
    maps = previous.reshape(rows, *previous_grid, heads * head_dim)
    previous = resize(maps, grid, "bilinear").reshape(key.shape)
    key = key.astype(jnp.float32)
    distance = jnp.sqrt(jnp.square(key - previous).sum(-1))
    norms = jnp.sqrt(jnp.square(key).sum(-1) * jnp.square(previous).sum(-1))
    cosine = (key * previous).sum(-1) / jnp.maximum(norms, 1e-8)
    return -distance.mean((1, 2)), cosine.mean((1, 2))
