"""The cache of layers that select tokens at run time: compacted after every step.

The tokens which stay are gathered before they are written, so that besides the buffers no more than
one layer's uncompressed keys and values exist at a time.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from amskv_jax.attention import Implementation, attend
from amskv_jax.cache.store import after
from amskv_jax.plan.runtime_rows import SelectingRow
from amskv_jax.plan.selectors import Selector, best
from amskv_jax.schedule import ScaleSchedule


@struct.dataclass
class SelectedCache:
    """Keys and values of all layers which share a row, each head holding tokens of its own choice.

    Attributes:
      keys: [layers, rows, capacity, heads, head_dim], in the order of the sequence.
      values: like ``keys``.
      scores: what the selector carries on, [layers, rows, heads, capacity] float32, or None.
    """

    keys: jax.Array
    values: jax.Array
    scores: jax.Array | None


@dataclass(frozen=True)
class SelectingSlots:
    """Buffers whose first ``counts[step]`` slots hold what the layer kept of the earlier scales.

    Attributes:
      counts: per step, tokens read from the cache.
      grids: per step, (height, width) of its own map.
      selector: ranks the tokens.
    """

    counts: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    selector: Selector

    @classmethod
    def of(cls, row: SelectingRow, schedule: ScaleSchedule) -> "SelectingSlots":
        """Return the slots of a row."""
        return cls(row.counts, schedule.grids, row.selector)

    @property
    def capacity(self) -> int:
        """Slots per head."""
        return max(self.counts)

    @cached_property
    def drops(self) -> tuple[bool, ...]:
        """Whether tokens are dropped after each step but the last, which stores nothing."""
        tokens = [height * width for height, width in self.grids]
        return tuple(
            later < now + own
            for now, own, later in zip(self.counts[:-1], tokens[:-1], self.counts[1:], strict=True)
        )

    def init(
        self, layers: int, rows: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> SelectedCache:
        """Return empty buffers."""
        shape = (layers, rows, self.capacity, num_heads, head_dim)
        scores = (layers, rows, num_heads, self.capacity)
        return SelectedCache(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            scores=jnp.zeros(scores, jnp.float32) if self.selector.accumulates else None,
        )

    def attend(
        self,
        cache: SelectedCache,
        layer: jax.Array,
        step: int,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, SelectedCache]:
        """Attend to the cache and to the step's own tokens, then store those that rank highest.

        Arguments and result are those of ``cache.StaticSlots.attend``.
        """
        query, key, value = qkv
        held = self.counts[step]
        keys, values = (
            jnp.concatenate([_read(buffer, layer, held, axis=1), own], axis=1)
            for buffer, own in ((cache.keys, key), (cache.values, value))
        )
        output = attend(query, keys, values, scale, implementation)
        if step + 1 == len(self.counts) or self.counts[step + 1] == 0:
            return output, cache

        chosen, scores = self._choose(cache.scores, layer, step, query, keys, scale=scale)
        if chosen is not None:
            index = jnp.moveaxis(chosen, 2, 1)[..., None]
            key, value = (jnp.take_along_axis(x, index, axis=1) for x in (keys, values))
            held = 0
        layer = after(output, layer, len(cache.keys))
        return output, SelectedCache(
            keys=_write(cache.keys, layer, held, key, axis=1),
            values=_write(cache.values, layer, held, value, axis=1),
            scores=scores,
        )

    def _choose(
        self,
        scores: jax.Array | None,
        layer: jax.Array,
        step: int,
        query: jax.Array,
        keys: jax.Array,
        *,
        scale: float,
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Return which of ``keys`` stay, [rows, heads, count] (None: all), and the new scores."""
        drops, drops_later = self.drops[step], any(self.drops[step + 1 :])
        if not drops and (scores is None or not drops_later):
            return None, scores
        before = None if scores is None else _read(scores, layer, self.counts[step], axis=2)
        rank, updated = self.selector.rank(query, keys, scale, self.grids[step], before)
        chosen = best(rank, self.counts[step + 1]) if drops else None
        if scores is not None and updated is not None and drops_later:
            if chosen is not None:
                updated = jnp.take_along_axis(updated, chosen, axis=2)
            scores = _write(scores, layer, 0, updated, axis=2)
        return chosen, scores


def _read(buffer: jax.Array, layer: jax.Array, length: int, axis: int) -> jax.Array:
    """Return the first ``length`` slots of one layer, slots being along ``axis`` of the result."""
    sizes = [1, *buffer.shape[1:]]
    sizes[1 + axis] = length
    return lax.dynamic_slice(buffer, [layer] + [0] * (buffer.ndim - 1), sizes)[0]


def _write(buffer: jax.Array, layer: jax.Array, slot: int, part: jax.Array, axis: int) -> jax.Array:
    """Store ``part`` in the slots from ``slot`` of one layer."""
    start = [layer] + [0] * (buffer.ndim - 1)
    start[1 + axis] = slot
    return lax.dynamic_update_slice(buffer, part[None].astype(buffer.dtype), start)
