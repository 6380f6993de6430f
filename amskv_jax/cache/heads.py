"""Slots of layers whose heads keep different tokens: flat buffers per layer for all heads.

Every token of every head has a slot of its own, wherever there is room: what one head drops,
another may fill. So a buffer is as large as the most that all heads together hold at any step. A
step gathers the tokens of every head by a static table of segments, pads them to the head that
holds most, and attends once, heads being folded into the batch with a length each.

There is one such buffer, or one for every format of numbers in which the layer keeps some tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from amskv_jax.attention import QKV, Implementation, attend
from amskv_jax.cache.static import StaticSlots
from amskv_jax.cache.store import KVCache, Store, read
from amskv_jax.numbers import numbers_of
from amskv_jax.plan.mixed import MixedRow
from amskv_jax.plan.rows import HeadRow, StaticRow
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class HeadSegments:
    """Where the tokens lie that every head holds while a step attends; all heads one after another.

    Attributes:
      lengths: tokens per head.
      starts: per head, for each of its segments of consecutive slots, how many of the head's tokens
        come before it.
      slots: likewise, the segment's first slot; those of several buffers are counted on.
      read: per buffer, how many of its first slots the step reads.
    """

    lengths: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[int, ...], ...]
    read: tuple[int, ...]

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

        What comes after a head's last token is no slot of it, and may lie beyond the buffers. Sums
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
      flats: per format of numbers, the slots of all heads' tokens, as those of one head: a scale of
        T tokens is one of heads x T, head by head.
      segments: per step, where every head's tokens lie while it attends.
    """

    flats: tuple[StaticSlots, ...]
    segments: tuple[HeadSegments, ...]

    @classmethod
    def of(cls, row: HeadRow | MixedRow, schedule: ScaleSchedule, store: Store) -> "HeadSlots":
        """Assign slots to everything the row keeps; ``store`` serves parts that name no format."""
        heads = len(row.parts[0].row.heads)
        merged = ScaleSchedule(tuple((heads * height, width) for height, width in schedule.grids))
        flats = tuple(
            StaticSlots.of(
                _merged(part, schedule, merged),
                merged,
                store if numbers is None else Store(numbers_of(numbers)),
            )
            for numbers, part in row.parts
        )
        steps = range(schedule.num_scales)
        return cls(flats, tuple(_segments(flats, schedule, heads, step) for step in steps))

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> tuple[KVCache, ...]:
        """Return empty buffers per format, leaves [layers, rows, capacity, 1, something]."""
        return tuple(flat.init(layers, rows, 1, head_dim) for flat in self.flats)

    def attend(
        self,
        cache: tuple[KVCache, ...],
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """See ``store.Slots``."""
        query, key, value = qkv
        segments = self.segments[step]
        cached = [self._cached(cache, layer, segments, key.dtype)] if segments.longest else []
        if segments.even:
            keys, values = (
                jnp.concatenate(pair, axis=1) for pair in zip(*cached, (key, value), strict=True)
            )
            output = attend(query, keys, values, scale, implementation)
        else:
            output = _attend_folded(cached[0], segments, qkv, scale, implementation)
        own = KVCache(_flat(key), _flat(value))
        written = [
            flat.written(part, layer, step, own, output)
            for flat, part in zip(self.flats, cache, strict=True)
        ]
        return output, tuple(written)

    def _cached(
        self,
        cache: tuple[KVCache, ...],
        layer: jax.Array,
        segments: HeadSegments,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the keys and values of every head's tokens, [rows, longest, heads, head_dim].

        Of one buffer the codes are gathered, which are fewer bytes, and then decoded; those of
        several must be decoded to lie in one row.
        """
        index = segments.index().T
        parts = [
            (flat.store, read(part, layer, 0, slots))
            for flat, part, slots in zip(self.flats, cache, segments.read, strict=True)
            if slots
        ]
        if len(parts) == 1:
            store, held = parts[0]
            return store.decode(jax.tree.map(lambda leaf: _gather(leaf, index), held), dtype)
        keys, values = zip(*(store.decode(held, dtype) for store, held in parts), strict=True)
        key, value = (_gather(jnp.concatenate(x, axis=1), index) for x in (keys, values))
        return key, value


def _attend_folded(
    cached: tuple[jax.Array, jax.Array],
    segments: HeadSegments,
    qkv: QKV,
    scale: float,
    implementation: Implementation,
) -> jax.Array:
    """Attend with every head as a batch row of its own, [rows, T, heads, head_dim]."""
    query, key, value = qkv
    rows, length, heads, _ = query.shape
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


def _gather(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """Return slots ``index`` [longest, heads] of [rows, slots, 1, n]: [rows, longest, heads, n]."""
    return jnp.take(leaf[:, :, 0], index, axis=1, mode="clip")


def _flat(leaf: jax.Array) -> jax.Array:
    """Return tokens [rows, T, heads, n] as those of one head, [rows, heads * T, 1, n]."""
    return jnp.swapaxes(leaf, 1, 2).reshape(len(leaf), -1, 1, leaf.shape[-1])


def _merged(row: HeadRow, schedule: ScaleSchedule, merged: ScaleSchedule) -> StaticRow:
    """Return what all heads keep, as one row of the schedule whose scales hold all heads'."""
    kept = []
    for step in range(schedule.num_scales):
        positions = row.positions(schedule, step)
        scales = [positions[:, schedule.slice(j)].ravel() for j in range(schedule.num_scales)]
        kept.append(np.concatenate(scales))
    return StaticRow.from_positions(merged, kept)


def _segments(
    flats: Sequence[StaticSlots], schedule: ScaleSchedule, heads: int, step: int
) -> HeadSegments:
    """Return where every head's tokens lie at ``step``: in their order of scales and tokens."""
    held = [flat.held[step] for flat in flats]
    ends = [max((run.slot + run.length for run in runs), default=0) for runs in held]
    runs = [
        run._replace(slot=before + run.slot)
        for runs, before in zip(held, accumulate(ends, initial=0), strict=False)
        for run in runs
    ]
    lengths = [0] * heads
    starts: list[list[int]] = [[] for _ in range(heads)]
    slots: list[list[int]] = [[] for _ in range(heads)]
    for scale, start, slot, length in sorted(runs):
        size, stop = schedule.tokens[scale], start + length
        for head in range(start // size, (stop - 1) // size + 1):
            first, last = max(start, head * size), min(stop, (head + 1) * size)
            begin = slot + first - start
            follows = slots[head] and slots[head][-1] + lengths[head] - starts[head][-1] == begin
            if not follows:
                starts[head].append(lengths[head])
                slots[head].append(begin)
            lengths[head] += last - first
    return HeadSegments(
        tuple(lengths), tuple(map(tuple, starts)), tuple(map(tuple, slots)), tuple(ends)
    )
