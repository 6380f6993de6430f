"""The cache of layers that select tokens at run time: compacted after every step.

The tokens which stay are gathered before they are written, so that besides the buffers no more than
one layer's uncompressed keys and values exist at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import struct

from amskv_jax.attention import QKV, Implementation
from amskv_jax.cache.store import KVCache, Store, after, read, take, write
from amskv_jax.plan.runtime_rows import SelectingRow
from amskv_jax.plan.selectors import Selector, attention_mass, best
from amskv_jax.schedule import ScaleSchedule


@struct.dataclass
class SelectedCache:
    """Keys and values of all layers which share a row, each head holding tokens of its own choice.

    Attributes:
      tokens: the buffers, tokens in the order of the sequence.
      scores: what the selector carries on, [layers, rows, heads, capacity] float32, or None.
    """

    tokens: KVCache
    scores: jax.Array | None


@dataclass(frozen=True)
class SelectingSlots:
    """Buffers whose first ``counts[step]`` slots hold what the layer kept of the earlier scales.

    Attributes:
      store: how numbers are kept.
      counts: per step, tokens read from the cache.
      grids: per step, (height, width) of its own map.
      selector: ranks the tokens.
    """

    store: Store
    counts: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    selector: Selector

    @classmethod
    def of(cls, row: SelectingRow, schedule: ScaleSchedule, store: Store) -> "SelectingSlots":
        """Return the slots of a row."""
        return cls(store, row.counts, schedule.grids, row.selector)

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

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> SelectedCache:
        """Return empty buffers."""
        scores = (layers, rows, num_heads, self.capacity)
        return SelectedCache(
            tokens=self.store.init(layers, rows, self.capacity, num_heads, head_dim),
            scores=jnp.zeros(scores, jnp.float32) if self.selector.accumulates else None,
        )

    def attend(
        self,
        cache: SelectedCache,
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, SelectedCache]:
        """Store after attending those tokens that rank highest; see ``store.Slots``."""
        query, key, value, product = qkv
        if self.selector.accumulates and product is not None:
            # The sums of exponentials are to be of the queries from which the mass is computed.
            qkv = qkv._replace(product=product._replace(temperature=None))
        held = self.counts[step]
        spans = ((0, held),) if held else ()
        output, sums = self.store.attend(cache.tokens, layer, spans, qkv, scale, implementation)
        if step + 1 == len(self.counts) or self.counts[step + 1] == 0:
            return output, cache

        cached = read(cache.tokens, layer, 0, held)

        def rank(before: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
            keys, _ = self.store.with_own([cached], key, value)
            mass = None
            if self.selector.accumulates and sums is not None:
                mass = self.store.mass(cache.tokens, layer, spans, qkv, sums, scale)
            elif self.selector.accumulates:
                mass = attention_mass(query, keys, scale)
            return self.selector.rank(query, keys, scale, self.grids[step], mass, before)

        chosen, scores = self._choose(cache.scores, layer, step, rank)
        own = self.store.encode(key, value)
        if chosen is not None:
            own, held = take([cached, own], chosen), 0
        later = after(output, layer, cache.tokens)
        return output, SelectedCache(write(cache.tokens, later, held, own), scores)

    def _choose(
        self,
        scores: jax.Array | None,
        layer: jax.Array,
        step: int,
        rank: Callable[[jax.Array | None], tuple[jax.Array, jax.Array | None]],
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Return which tokens stay, [rows, heads, count] (None: all), and the new scores.

        Args:
          scores: of the buffers, or None.
          layer: see ``attend``.
          step: likewise.
          rank: the selector's ``rank``, but for the cached tokens' scores.
        """
        drops, drops_later = self.drops[step], any(self.drops[step + 1 :])
        if not drops and (scores is None or not drops_later):
            return None, scores
        before = None if scores is None else read(scores, layer, 0, self.counts[step], axis=2)
        ranks, updated = rank(before)
        chosen = best(ranks, self.counts[step + 1]) if drops else None
        if scores is not None and updated is not None and drops_later:
            if chosen is not None:
                updated = jnp.take_along_axis(updated, chosen, axis=2)
            scores = write(scores, layer, 0, updated, axis=2)
        return chosen, scores
