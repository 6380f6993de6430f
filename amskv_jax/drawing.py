"""Drawing many pictures: balanced over the classes, numbered, the same for every policy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from amskv_jax.generate import Sampler

IN_FLIGHT = 2
"""Batches the device works on while the host waits for the oldest."""


def balanced_labels(first: int, count: int, num_classes: int) -> np.ndarray:
    """Return the classes of pictures ``first : first + count``, int32: 0, 1, 2, ... in turn."""
    return (np.arange(first, first + count) % num_classes).astype(np.int32)


class Drawer:
    """A sampler compiled for one batch size; picture n of a seed is the same in every batch.

    Attributes:
      batch: pictures drawn at once.
    """

    def __init__(self, sampler: Sampler, params: Any, batch: int) -> None:
        """Compile; may be called in any thread, as compilation leaves the interpreter free.

        Args:
          sampler: what to draw with; it must decode.
          params: the weights, see ``Sampler``.
          batch: pictures drawn at once.
        """
        self.batch = batch
        key, numbers = jax.random.key(0), jax.ShapeDtypeStruct((batch,), jnp.int32)
        cfg = jax.ShapeDtypeStruct((), jnp.float32)
        self._compiled = _draw.lower(sampler, params, key, numbers, cfg).compile()

    def draw(self, params: Any, seed: int, first: int, count: int, cfg: float) -> np.ndarray:
        """Return pictures ``first : first + count`` of a seed, uint8 [count, H, W, 3].

        Args:
          params: the weights.
          seed: of the random numbers.
          first: number of the first picture; its class is that of ``balanced_labels``.
          count: pictures.
          cfg: strength of classifier-free guidance at the last scale.
        """
        key, guidance = jax.random.key(seed), np.float32(cfg)
        running: list[jax.Array] = []
        done: list[np.ndarray] = []
        for start in range(first, first + count, self.batch):
            numbers = np.arange(start, start + self.batch, dtype=np.int32)
            running.append(self._compiled(params, key, numbers, guidance))
            if len(running) > IN_FLIGHT:
                done.append(np.asarray(running.pop(0)))
        done += map(np.asarray, running)
        return np.concatenate(done)[:count]


@partial(jax.jit, static_argnums=0)
def _draw(
    sampler: Sampler, params: Any, key: jax.Array, numbers: jax.Array, cfg: jax.Array
) -> jax.Array:
    """Return the pictures with these numbers, uint8 [B, H, W, 3]; see ``generate.picture_keys``."""
    labels = numbers % sampler.transformer.num_classes
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
    pictures = sampler(params, labels, keys, cfg).pictures
    assert pictures is not None, "the sampler decodes"
    return jnp.rint(jnp.clip(pictures, 0, 1) * 255).astype(jnp.uint8)
