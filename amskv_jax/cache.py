"""The scale-indexed key/value cache: static layouts, and buffers which are updated in place.

A layout is computed from a retention plan before tracing. It assigns every retained token a slot,
so that dropped tokens are overwritten by the new scale in the same layer's turn: the buffers never
hold more than the most that any step reads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from amskv_jax.attention import Implementation, attend
from amskv_jax.inplace import after
from amskv_jax.online import OnlineRow, OnlineSlots
from amskv_jax.plan import HeadRow, RetentionPlan, Row, SelectingRow, StaticRow
from amskv_jax.rows import check_heads
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.selecting import SelectingSlots


class SlotRun(NamedTuple):
    """``length`` tokens of ``scale``, the first its token ``start``, in slots from ``slot``."""

    scale: int
    start: int
    slot: int
    length: int


@struct.dataclass
class KVCache:
    """Keys and values of all layers that share a row: [layers, rows, capacity, heads, head_dim]."""

    keys: jax.Array
    values: jax.Array


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


@dataclass(frozen=True)
class HeadSlots:
    """Slots of a layer whose heads keep different tokens: one cache per set of equal heads.

    Attributes:
      groups: the slots of every set of heads.
      heads: the heads of every set.
    """

    groups: tuple[StaticSlots, ...]
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, row: HeadRow, schedule: ScaleSchedule) -> "HeadSlots":
        """Assign slots to everything the row keeps."""
        groups = tuple(StaticSlots.of(part, schedule) for part in row.groups)
        return cls(groups, tuple(row.groups.values()))

    def init(
        self, layers: int, rows: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> tuple[KVCache, ...]:
        """Return empty buffers, one entry per set of heads."""
        check_heads(sum(map(len, self.heads)), num_heads)
        return tuple(
            group.init(layers, rows, len(heads), head_dim, dtype)
            for group, heads in zip(self.groups, self.heads, strict=True)
        )

    def attend(
        self,
        cache: tuple[KVCache, ...],
        layer: jax.Array,
        step: int,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Attend with every set of heads to its own cache; see ``StaticSlots.attend``."""
        query, key, value = qkv
        outputs, caches = [], []
        for group, heads, part in zip(self.groups, map(np.array, self.heads), cache, strict=True):
            own = query[:, :, heads], key[:, :, heads], value[:, :, heads]
            output, updated = group.attend(part, layer, step, own, scale, implementation)
            outputs.append(output)
            caches.append(updated)
        order = np.argsort(np.concatenate(self.heads))
        return jnp.concatenate(outputs, axis=2)[:, :, order], tuple(caches)


Slots = StaticSlots | SelectingSlots | HeadSlots | OnlineSlots


def slots_of(row: Row, schedule: ScaleSchedule) -> Slots:
    """Assign slots to a row of any kind."""
    if isinstance(row, StaticRow):
        return StaticSlots.of(row, schedule)
    if isinstance(row, SelectingRow):
        return SelectingSlots.of(row, schedule)
    if isinstance(row, OnlineRow):
        return OnlineSlots(schedule, row)
    return HeadSlots.of(row, schedule)


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a whole model: one set of buffers per distinct row of the plan.

    Attributes:
      groups: the distinct rows' slots, in order of first appearance.
      group_of: for every layer, the index of its group.
      index_in_group: for every layer, its index in the group's buffers.
    """

    groups: tuple[Slots, ...]
    group_of: tuple[int, ...]
    index_in_group: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, plan: RetentionPlan) -> "CacheLayout":
        """Return the layout of a plan."""
        rows = list(dict.fromkeys(plan.rows))
        group_of = tuple(rows.index(row) for row in plan.rows)
        index = tuple(group_of[:layer].count(group) for layer, group in enumerate(group_of))
        return cls(tuple(slots_of(row, plan.schedule) for row in rows), group_of, index)

    def init(
        self, rows: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> tuple[Any, ...]:
        """Return empty buffers for ``rows`` batch rows, one entry per group."""
        return tuple(
            group.init(self.group_of.count(index), rows, num_heads, head_dim, dtype)
            for index, group in enumerate(self.groups)
        )
