"""Slots of layers whose tokens are known beforehand.

Every retained token has a slot, so that dropped tokens are overwritten by the new scale in the same
layer's turn: the buffers never hold more than the most that any step reads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from amskv_jax.attention import QKV, Implementation
from amskv_jax.cache.store import KVCache, Store, after, read, tokens, write
from amskv_jax.fused_attention.blocks import Spans
from amskv_jax.plan.rows import StaticRow
from amskv_jax.schedule import ScaleSchedule


class SlotRun(NamedTuple):
    """``length`` tokens of ``scale``, the first its token ``start``, in slots from ``slot``."""

    scale: int
    start: int
    slot: int
    length: int


@dataclass(frozen=True)
class StaticSlots:
    """Where a static row's tokens lie at every step.

    Attributes:
      store: how numbers are kept.
      capacity: slots per head: the fewest that can hold the row.
      held: per step, what the cache holds while that step attends, in slot order.
      writes: per step, which of its own tokens are stored after it attended, and where.
    """

    store: Store
    capacity: int
    held: tuple[tuple[SlotRun, ...], ...]
    writes: tuple[tuple[SlotRun, ...], ...]

    @classmethod
    def of(cls, row: StaticRow, schedule: ScaleSchedule, store: Store) -> "StaticSlots":
        """Assign slots to everything the row keeps."""
        owner = np.full(row.capacity, -1)  # position of the token in each slot
        held: list[tuple[SlotRun, ...]] = [()]
        writes: list[tuple[SlotRun, ...]] = []
        for step in range(schedule.num_scales - 1):
            kept = row.positions(schedule, step + 1)
            owner[(owner >= 0) & ~kept[owner]] = -1
            new = schedule.offsets[step] + np.flatnonzero(kept[schedule.slice(step)])
            slots = _free_slots(owner, len(new))
            owner[slots] = new
            writes.append(_runs(schedule, slots, new))
            occupied = np.flatnonzero(owner >= 0)
            held.append(_runs(schedule, occupied, owner[occupied]))
        return cls(store, row.capacity, tuple(held), (*writes, ()))

    def where(self, step: int, scale: int) -> tuple[SlotRun, ...]:
        """Return where the tokens of ``scale`` are while ``step`` attends."""
        return tuple(run for run in self.held[step] if run.scale == scale)

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> KVCache:
        """Return empty buffers."""
        return self.store.init(layers, rows, self.capacity, num_heads, head_dim)

    def attend(
        self,
        cache: KVCache,
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, KVCache]:
        """See ``store.Slots``."""
        spans = _spans(self.held[step])
        output, _ = self.store.attend(cache, layer, spans, qkv, scale, implementation)
        return output, self.written(cache, layer, step, KVCache(qkv.key, qkv.value), output)

    def written(
        self, cache: KVCache, layer: jax.Array, step: int, own: KVCache, output: jax.Array
    ) -> KVCache:
        """Return the buffers with what later steps need of a step's own tokens; no other is coded.

        Args:
          cache: the buffers.
          layer: which of their layers this is.
          step: the step, static.
          own: its keys and values, [rows, T, heads, head_dim] each, as they are.
          output: of its attention, after which the buffers may be written.
        """
        runs = self.writes[step]
        if not runs:
            return cache
        layer = after(output, layer, cache)
        parts = [tokens(own, run.start, run.start + run.length) for run in runs]
        stored = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)
        codes, begin = self.store.encode(stored.keys, stored.values), 0
        for slot, length in _spans(runs):
            cache = write(cache, layer, slot, tokens(codes, begin, begin + length))
            begin += length
        return cache

    def keys(
        self, cache: KVCache, layer: jax.Array, step: int, scale: int, dtype: DTypeLike
    ) -> jax.Array:
        """Return the keys of an earlier scale, of which the row keeps all at ``step``.

        Returns:
          [rows, T, heads, head_dim] in ``dtype``.
        """
        runs = sorted(self.where(step, scale), key=lambda run: run.start)
        parts = [read(cache, layer, run.slot, run.length) for run in runs]
        found = [self.store.decode(part, dtype)[0] for part in parts]
        return jnp.concatenate(found, axis=1)


def _free_slots(owner: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` free slots: the tightest gap that takes them all, else the lowest ones."""
    free = np.flatnonzero(owner < 0)
    gaps = np.split(free, np.flatnonzero(np.diff(free) > 1) + 1)
    fitting = [gap for gap in gaps if len(gap) >= count]
    return min(fitting, key=len)[:count] if fitting else free[:count]


def _runs(schedule: ScaleSchedule, slots: np.ndarray, owners: np.ndarray) -> tuple[SlotRun, ...]:
    """Merge (slot, token) pairs in slot order into runs within one scale."""
    scales = np.searchsorted(schedule.offsets, owners, side="right") - 1
    breaks = (np.diff(slots) != 1) | (np.diff(owners) != 1) | (np.diff(scales) != 0)
    runs = []
    for part in np.split(np.arange(len(slots)), np.flatnonzero(breaks) + 1):
        if len(part):
            scale = int(scales[part[0]])
            start = int(owners[part[0]]) - schedule.offsets[scale]
            runs.append(SlotRun(scale, start, int(slots[part[0]]), len(part)))
    return tuple(runs)


def _spans(runs: Iterable[SlotRun]) -> Spans:
    """Merge runs in slot order into (first slot, length) spans, whatever they hold."""
    spans: list[tuple[int, int]] = []
    for run in runs:
        if spans and sum(spans[-1]) == run.slot:
            spans[-1] = (spans[-1][0], spans[-1][1] + run.length)
        else:
            spans.append((run.slot, run.length))
    return tuple(spans)
