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
from jax import lax

from amskv_jax.attention import Implementation, attend
from amskv_jax.cache.store import KVCache, after
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
      capacity: slots per head: the fewest that can hold the row.
      held: per step, what the cache holds while that step attends, in slot order.
      writes: per step, which of its own tokens are stored after it attended, and where.
    """

    capacity: int
    held: tuple[tuple[SlotRun, ...], ...]
    writes: tuple[tuple[SlotRun, ...], ...]

    @classmethod
    def of(cls, row: StaticRow, schedule: ScaleSchedule) -> "StaticSlots":
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
        return cls(row.capacity, tuple(held), (*writes, ()))

    def where(self, step: int, scale: int) -> tuple[SlotRun, ...]:
        """Return where the tokens of ``scale`` are while ``step`` attends."""
        return tuple(run for run in self.held[step] if run.scale == scale)

    def init(
        self, layers: int, rows: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> KVCache:
        """Return empty buffers."""
        shape = (layers, rows, self.capacity, num_heads, head_dim)
        return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    def attend(
        self,
        cache: KVCache,
        layer: jax.Array,
        step: int,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, KVCache]:
        """Attend to the cache and to the step's own tokens, then store what later steps need.

        Args:
          cache: the buffers.
          layer: which of the buffers' layers this is, int32 scalar.
          step: the step, static.
          qkv: queries, keys and values of the step's own tokens, [rows, T, heads, head_dim] each.
          scale: factor of the logits.
          implementation: see ``attention.attend``.

        Returns:
          The attention's output [rows, T, heads, head_dim], and the updated buffers.
        """
        query, key, value = qkv
        output = attend(
            query,
            self._read(cache.keys, layer, step, key),
            self._read(cache.values, layer, step, value),
            scale,
            implementation,
        )
        layer = after(output, layer, len(cache.keys))
        return output, KVCache(
            keys=self._write(cache.keys, layer, step, key),
            values=self._write(cache.values, layer, step, value),
        )

    def _read(self, buffer: jax.Array, layer: jax.Array, step: int, own: jax.Array) -> jax.Array:
        rows, _, heads, head_dim = own.shape
        parts = [
            lax.dynamic_slice(buffer, (layer, 0, slot, 0, 0), (1, rows, length, heads, head_dim))[0]
            for slot, length in _spans(self.held[step])
        ]
        return jnp.concatenate([*parts, own], axis=1)

    def _write(self, buffer: jax.Array, layer: jax.Array, step: int, own: jax.Array) -> jax.Array:
        own = own.astype(buffer.dtype)
        for _, start, slot, length in self.writes[step]:
            part = lax.slice_in_dim(own, start, start + length, axis=1)
            buffer = lax.dynamic_update_slice(buffer, part[None], (layer, 0, slot, 0, 0))
        return buffer


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


def _spans(runs: Iterable[SlotRun]) -> list[tuple[int, int]]:
    """Merge runs in slot order into (first slot, length) spans, whatever they hold."""
    spans: list[tuple[int, int]] = []
    for run in runs:
        if spans and sum(spans[-1]) == run.slot:
            spans[-1] = (spans[-1][0], spans[-1][1] + run.length)
        else:
            spans.append((run.slot, run.length))
    return spans
