"""Slots of layers whose heads keep different tokens: one flat buffer per layer for all heads.

Every token of every head has a slot of its own, wherever there is room: what one head drops,
another may fill. So the buffer is as large as the most that all heads together hold at any step. A
step gathers the tokens of every head by a static table of segments, pads them to the head that
holds most, and attends once, heads being folded into the batch with a length each.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from amskv_jax.attention import QKV, Implementation, attend
from amskv_jax.cache.static import StaticSlots
from amskv_jax.cache.store import KVCache, Store, read
from amskv_jax.plan.rows import HeadRow, StaticRow
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class HeadSegments:
    """Where the tokens lie that every head holds while a step attends; all heads one after another.

    Attributes:
      lengths: tokens per head.
      starts: per head, for each of its segments of consecutive slots, how many of the head's tokens
        come before it.
      slots: likewise, the segment's first slot.
    """

    lengths: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the head that holds most."""
        return max(self.lengths)

    @property
    def even(self) -> bool:
        """Whether all heads hold equally many tokens."""
        return len(set(self.lengths)) == 1

    def index(self) -> jax.Array:
        """Return the slots of every head's tokens, [heads, longest] int32.

        What comes after a head's last token is no slot of it, and may lie beyond the buffer. Sums
        over few segments take the place of a large table in the program.
        """
        most = max(map(len, self.starts))
        starts = np.full((len(self.lengths), most), self.longest, np.int32)
        jumps = np.zeros_like(starts)
        for head, (begins, slots) in enumerate(zip(self.starts, self.slots, strict=True)):
            starts[head, : len(begins)] = begins
            shifts = np.subtract(slots, begins)
            jumps[head, : len(begins)] = np.diff(shifts, prepend=0)
        position = jnp.arange(self.longest, dtype=jnp.int32)[None]
        passed = position[..., None] >= starts[:, None]
        return position + jnp.where(passed, jumps[:, None], 0).sum(-1, dtype=jnp.int32)


@dataclass(frozen=True)
class HeadSlots:
    """Where the tokens of a layer's heads lie at every step.

    Attributes:
      flat: the slots of all heads' tokens, as those of one head: a scale of T tokens is one of
        heads x T, head by head.
      segments: per step, where every head's tokens lie while it attends.
    """

    flat: StaticSlots
    segments: tuple[HeadSegments, ...]

    @classmethod
    def of(cls, row: HeadRow, schedule: ScaleSchedule, store: Store) -> "HeadSlots":
        """Assign slots to everything the row keeps."""
        heads = len(row.heads)
        merged = ScaleSchedule(tuple((heads * height, width) for height, width in schedule.grids))
        flat = StaticSlots.of(_merged(row, schedule, merged), merged, store)
        steps = range(schedule.num_scales)
        return cls(flat, tuple(_segments(flat, schedule, heads, step) for step in steps))

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> KVCache:
        """Return empty buffers, leaves [layers, rows, capacity, 1, something]."""
        return self.flat.init(layers, rows, 1, head_dim)

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
        query, key, value = qkv
        segments = self.segments[step]
        parts = [self._cached(cache, layer, segments)] if segments.longest else []
        if segments.even:
            keys, values = self.flat.store.with_own(parts, key, value)
            output = attend(query, keys, values, scale, implementation)
        else:
            output = self._attend_folded(parts[0], segments, qkv, scale, implementation)
        own = jax.tree.map(_flat, self.flat.store.encode(key, value))
        return output, self.flat.written(cache, layer, step, own, output)

    def _cached(self, cache: KVCache, layer: jax.Array, segments: HeadSegments) -> KVCache:
        """Return the codes of every head's tokens, leaves [rows, longest, heads, something]."""
        index = segments.index().T
        held = read(cache, layer, 0, self.flat.capacity)
        return jax.tree.map(lambda leaf: jnp.take(leaf[:, :, 0], index, axis=1, mode="clip"), held)

    def _attend_folded(
        self,
        part: KVCache,
        segments: HeadSegments,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> jax.Array:
        """Attend with every head as a batch row of its own, [rows, T, heads, head_dim]."""
        query, key, value = qkv
        rows, length, heads, _ = query.shape
        cached = self.flat.store.decode(part, key.dtype)
        # The own tokens come first, so that padding comes last.
        keys, values = (
            jnp.concatenate(pair, axis=1) for pair in zip((key, value), cached, strict=True)
        )
        lengths = jnp.tile(jnp.array(segments.lengths, jnp.int32) + length, rows)
        query, keys, values = (
            _flat(x).reshape(rows * heads, -1, 1, x.shape[-1]) for x in (query, keys, values)
        )
        output = attend(query, keys, values, scale, implementation, lengths)
        return jnp.swapaxes(output.reshape(rows, heads, length, -1), 1, 2)


def _flat(leaf: jax.Array) -> jax.Array:
    """Return tokens [rows, T, heads, n] as those of one head, [rows, heads * T, 1, n]."""
    return jnp.swapaxes(leaf, 1, 2).reshape(len(leaf), -1, 1, leaf.shape[-1])


def _merged(row: HeadRow, schedule: ScaleSchedule, merged: ScaleSchedule) -> StaticRow:
    """Return what all heads keep, as one row of the schedule whose scales hold all heads'."""
    kept = []
    for step in range(schedule.num_scales):
        positions = np.stack([head.positions(schedule, step) for head in row.heads])
        scales = [positions[:, schedule.slice(j)].ravel() for j in range(schedule.num_scales)]
        kept.append(np.concatenate(scales))
    return StaticRow.from_positions(merged, kept)


def _segments(flat: StaticSlots, schedule: ScaleSchedule, heads: int, step: int) -> HeadSegments:
    """Return where every head's tokens lie at ``step``: in their order of scales and tokens."""
    lengths = [0] * heads
    starts: list[list[int]] = [[] for _ in range(heads)]
    slots: list[list[int]] = [[] for _ in range(heads)]
    for scale, start, slot, length in sorted(flat.held[step]):
        size, stop = schedule.tokens[scale], start + length
        for head in range(start // size, (stop - 1) // size + 1):
            first, last = max(start, head * size), min(stop, (head + 1) * size)
            begin = slot + first - start
            follows = slots[head] and slots[head][-1] + lengths[head] - starts[head][-1] == begin
            if not follows:
                starts[head].append(lengths[head])
                slots[head].append(begin)
            lengths[head] += last - first
    return HeadSegments(tuple(lengths), tuple(map(tuple, starts)), tuple(map(tuple, slots)))
