"""Where the tokens of heads lie that keep different ones: slots assigned, and written as tables.

Every token of every head has a slot of its own. In its layer's share of a buffer it lies wherever
there is room: what one head drops, another may fill. So this share is as large as the most that all
heads of the layer together hold at any step. There is a buffer for every format of numbers, in
which the layers lie one after the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from amskv_jax.cache.sequences import Run, Sequences
from amskv_jax.cache.static import SlotRun, StaticSlots
from amskv_jax.cache.store import Store
from amskv_jax.plan.mixed import MixedRow
from amskv_jax.plan.rows import HeadRow, StaticRow
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True, eq=False)
class Reading:
    """What heads hold while a step attends.

    Attributes:
      lengths: their tokens, [places, heads] int32.
      slots: where these lie, [places, heads]; slots of several buffers are counted on.
      buffers: the buffers in which some of them lie, ascending.
    """

    lengths: np.ndarray
    slots: Sequences
    buffers: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the head that holds most."""
        return self.slots.length

    @property
    def even(self) -> bool:
        """Whether all heads of a layer hold equally many tokens."""
        return bool((self.lengths == self.lengths[:, :1]).all())

    @property
    def equal(self) -> bool:
        """Whether all heads of all layers do."""
        return bool((self.lengths == self.longest).all())


@dataclass(frozen=True, eq=False)
class Writing:
    """What layers store of a step's own tokens in one buffer.

    Attributes:
      tokens: which tokens of which heads, [places]: head * tokens of the step + token.
      slots: where, [places], ascending; beyond the buffer where a layer stores fewer than another.
    """

    tokens: Sequences
    slots: Sequences


@dataclass(frozen=True, eq=False)
class HeadTables:
    """Where the tokens of all heads of all layers lie at every step.

    A *place* is a layer of one of the devices which share the heads: device * layers + layer.

    Attributes:
      layers: that share the buffers.
      devices: that share the heads; each has buffers of its own.
      formats: per buffer, the name of its format of numbers; None for the one of the whole cache.
      capacities: per buffer, its slots, of one token of one head each.
      reading: per step, what is read.
      writing: per step and buffer, what is written; None for nothing.
    """

    layers: int
    devices: int
    formats: tuple[str | None, ...]
    capacities: tuple[int, ...]
    reading: tuple[Reading, ...]
    writing: tuple[tuple[Writing | None, ...], ...]

    @classmethod
    def of(
        cls,
        rows: Sequence[HeadRow | MixedRow],
        schedule: ScaleSchedule,
        store: Store,
        devices: int = 1,
    ) -> "HeadTables":
        """Assign slots to everything that layers keep; see ``HeadSlots.of``."""
        formats = list(dict.fromkeys(part.numbers for row in rows for part in row.parts))
        heads = len(rows[0].parts[0].row.heads)
        shares = np.split(np.arange(heads), devices)
        kept = [[_kept(row, name, share) for share in shares for row in rows] for name in formats]
        assigned = {row: _assigned(row, schedule, store) for row in set(chain(*kept))}
        buffers = [_one_after_the_other([assigned[row] for row in own], devices) for own in kept]
        capacities = tuple(max(place.end for place in own) for own in buffers)
        befores = [sum(capacities[:index]) for index in range(len(formats))]
        reading, writing = [], []
        for step in range(schedule.num_scales):
            held = [
                [place.moved(place.slots.held[step], before) for place in own]
                for own, before in zip(buffers, befores, strict=True)
            ]
            stored = [[place.moved(place.slots.writes[step]) for place in own] for own in buffers]
            reading.append(_reading(schedule, heads // devices, held))
            writing.append(tuple(map(_writing, stored, capacities)))
        return cls(len(rows), devices, tuple(formats), capacities, tuple(reading), tuple(writing))


class _Share(NamedTuple):
    """A place's share of a buffer: its slots, of which the first is number ``first``."""

    slots: StaticSlots
    first: int

    @property
    def end(self) -> int:
        """Number of the slot that follows."""
        return self.first + self.slots.capacity

    def moved(self, runs: Iterable[SlotRun], before: int = 0) -> list[SlotRun]:
        """Return runs as they lie in the buffer, which has ``before`` slots before it."""
        return [run._replace(slot=run.slot + self.first + before) for run in runs]


def _one_after_the_other(places: Sequence[StaticSlots], devices: int) -> list[_Share]:
    """Return the shares of a buffer, in which the layers of a device lie one after the other."""
    layers = len(places) // devices
    shares: list[_Share] = []
    for number, slots in enumerate(places):
        shares.append(_Share(slots, shares[-1].end if number % layers else 0))
    return shares


def _kept(row: HeadRow | MixedRow, numbers: str | None, heads: np.ndarray) -> HeadRow:
    """Return what some heads of a layer keep in one format."""
    for part in row.parts:
        if part.numbers == numbers:
            return part.row.share(heads)
    nothing = StaticRow(((),) * len(row.kept_tokens))
    return HeadRow((nothing,) * len(heads))


def _assigned(row: HeadRow, schedule: ScaleSchedule, store: Store) -> StaticSlots:
    """Assign slots to what all heads keep: as one row whose scales hold those of all, in turn."""
    heads = len(row.heads)
    merged = ScaleSchedule(tuple((heads * height, width) for height, width in schedule.grids))
    kept = []
    for step in range(schedule.num_scales):
        positions = row.positions(schedule, step)
        scales = [positions[:, schedule.slice(j)].ravel() for j in range(schedule.num_scales)]
        kept.append(np.concatenate(scales))
    return StaticSlots.of(StaticRow.from_positions(merged, kept), merged, store)


def _reading(
    schedule: ScaleSchedule, heads: int, held: Sequence[Sequence[Sequence[SlotRun]]]
) -> Reading:
    """Return what is read at a step: every head's tokens in their order of scales and tokens.

    Args:
      schedule: the scales.
      heads: of every place.
      held: per buffer and place, the runs; their slots are counted on from buffer to buffer.
    """
    sequences: list[list[Run]] = []
    for buffers in zip(*held, strict=True):
        of_heads: list[list[Run]] = [[] for _ in range(heads)]
        for scale, start, slot, length in sorted(chain(*buffers)):
            size, stop = schedule.tokens[scale], start + length
            for head in range(start // size, (stop - 1) // size + 1):
                first, last = max(start, head * size), min(stop, (head + 1) * size)
                of_heads[head].append((slot + first - start, last - first))
        sequences += of_heads
    lengths = np.array([sum(count for _, count in runs) for runs in sequences], np.int32)
    lengths = lengths.reshape(-1, heads)
    slots = Sequences.of(sequences, lengths.shape, int(lengths.max()))
    return Reading(lengths, slots, tuple(index for index, own in enumerate(held) if any(own)))


def _writing(places: Sequence[Sequence[SlotRun]], capacity: int) -> Writing | None:
    """Return what is written to a buffer of so many slots."""
    most = max(sum(run.length for run in runs) for runs in places)
    if not most:
        return None
    tokens = [[(run.start, run.length) for run in runs] for runs in places]
    slots = [[*((run.slot, run.length) for run in runs), (capacity, most)] for runs in places]
    shape = (len(places),)
    return Writing(Sequences.of(tokens, shape, most), Sequences.of(slots, shape, most))
