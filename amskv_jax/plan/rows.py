"""Rows of a retention plan: what one layer keeps at every step.

Five kinds: ``StaticRow`` names the tokens, ``SelectingRow`` their number, ``HeadRow`` names them
for every head apart, ``MixedRow`` for every format of numbers and head, ``OnlineRow`` decides
everything at run time. All are frozen and hashable, and what they share is ``Row``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from amskv_jax.errors import AmskvError
from amskv_jax.schedule import ScaleSchedule

RowT_co = TypeVar("RowT_co", covariant=True)


class Part(NamedTuple, Generic[RowT_co]):
    """What a row keeps in one format of numbers.

    Attributes:
      numbers: name of the format, see ``numbers.NUMBERS``; None for the one of the whole cache.
      row: what is kept.
    """

    numbers: str | None
    row: RowT_co


class Segment(NamedTuple):
    """Tokens ``start:stop`` of one scale, counted from the scale's own first token."""

    scale: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class StaticRow:
    """What all heads of one layer keep: a fixed set of token segments per step.

    Attributes:
      keep: for every step the segments of earlier scales which the layer attends to, in order.
    """

    kind: ClassVar[str] = "static"
    pooled: ClassVar[bool] = False
    keep: tuple[tuple[Segment, ...], ...]

    @classmethod
    def from_positions(cls, schedule: ScaleSchedule, kept: Sequence[np.ndarray]) -> "StaticRow":
        """Build a row from one boolean array over all ``schedule.total`` positions per step."""
        return cls(tuple(segments_of(schedule, positions) for positions in kept))

    @classmethod
    def from_scales(cls, schedule: ScaleSchedule, kept: Iterable[Iterable[int]]) -> "StaticRow":
        """Build a row from whole scale ids per step."""
        tokens = schedule.tokens
        return cls(tuple(tuple(Segment(j, 0, tokens[j]) for j in sorted(ids)) for ids in kept))

    @classmethod
    def from_json(cls, data: Any, schedule: ScaleSchedule) -> "StaticRow":
        """Read a row from lists of scale ids or ``[scale, start, stop]``, one per step."""
        return cls(tuple(tuple(_item(schedule, item) for item in step) for step in data))

    def to_json(self, schedule: ScaleSchedule) -> Any:
        """Return what ``from_json`` reads; whole scales are plain ids."""
        return [[_plain(schedule, segment) for segment in step] for step in self.keep]

    @property
    def parts(self) -> tuple["Part[StaticRow]"]:
        """See ``Row.parts``."""
        return (Part(None, self),)

    @cached_property
    def kept_tokens(self) -> tuple[int, ...]:
        """Number of tokens read from the cache at every step."""
        return tuple(sum(segment.tokens for segment in step) for step in self.keep)

    @property
    def capacity(self) -> int:
        """Slots per head that hold the row: the most tokens any step reads."""
        return max(self.kept_tokens)

    def head_slots(self, num_heads: int) -> int:
        """Return the slots of all heads together."""
        return num_heads * self.capacity

    def scores(self, num_heads: int) -> int:
        """Return how many float32 scores are cached per batch row."""
        return 0

    def shares(self, schedule: ScaleSchedule) -> np.ndarray:
        """See ``Row.shares``."""
        read = np.zeros((schedule.num_scales, schedule.num_scales))
        for step, segments in enumerate(self.keep):
            for segment in segments:
                read[segment.scale, step] += segment.tokens
        shares: np.ndarray = read / np.array(schedule.tokens)[:, None]
        return shares

    def head_shares(self, schedule: ScaleSchedule, num_heads: int) -> np.ndarray:
        """See ``Row.head_shares``."""
        return np.stack([self.shares(schedule)] * num_heads)

    def positions(self, schedule: ScaleSchedule, step: int) -> np.ndarray:
        """Return the tokens kept at ``step`` as a boolean array over all positions."""
        kept = np.zeros(schedule.total, bool)
        for scale, start, stop in self.keep[step]:
            kept[schedule.offsets[scale] + start : schedule.offsets[scale] + stop] = True
        return kept

    def check(self, schedule: ScaleSchedule, where: str) -> None:
        """Raise AmskvError where the row cannot be carried out; ``where`` names it."""
        self.check_segments(schedule, where)
        for step in range(1, schedule.num_scales):
            available = self.positions(schedule, step - 1)
            available[schedule.slice(step - 1)] = True
            revived = self.positions(schedule, step) & ~available
            if revived.any():
                scale, start, stop = segments_of(schedule, revived)[0]
                raise AmskvError(
                    f"{where}, step {step} of the retention plan keeps tokens {start}:{stop} "
                    f"of scale {scale}, which were dropped before: what is gone cannot come back. "
                    "Keep them at every step in between, or drop them here too"
                )

    def check_segments(self, schedule: ScaleSchedule, where: str) -> None:
        """Raise AmskvError where a step alone cannot be carried out; ``where`` names the row."""
        check_steps(schedule, where, self.keep)
        for step, segments in enumerate(self.keep):
            seen: dict[int, int] = {}
            for scale, start, stop in segments:
                keeps = f"{where}, step {step} of the retention plan keeps"
                if not 0 <= scale < step:
                    raise AmskvError(f"{keeps} scale {scale}, which is not an earlier scale")
                if not 0 <= start < stop <= schedule.tokens[scale]:
                    raise AmskvError(
                        f"{keeps} tokens {start}:{stop} of scale {scale}, "
                        f"which has {schedule.tokens[scale]}"
                    )
                if start < seen.get(scale, 0):
                    raise AmskvError(f"{keeps} some tokens of scale {scale} twice or out of order")
                seen[scale] = stop


@dataclass(frozen=True)
class HeadRow:
    """What every head of one layer keeps; all heads share the layer's slots.

    Attributes:
      heads: one row per head.
    """

    kind: ClassVar[str] = "heads"
    pooled: ClassVar[bool] = True
    heads: tuple[StaticRow, ...]

    @classmethod
    def from_json(cls, data: Any, schedule: ScaleSchedule) -> "HeadRow":
        """Read a row from ``{"rows": [static rows], "heads": [which of them, per head]}``."""
        rows = [StaticRow.from_json(row, schedule) for row in data["rows"]]
        return cls(tuple(rows[index] for index in data["heads"]))

    def to_json(self, schedule: ScaleSchedule) -> Any:
        """Return what ``from_json`` reads."""
        rows = list(self.groups)
        return {
            "rows": [row.to_json(schedule) for row in rows],
            "heads": [rows.index(row) for row in self.heads],
        }

    @property
    def parts(self) -> tuple["Part[HeadRow]"]:
        """See ``Row.parts``."""
        return (Part(None, self),)

    def share(self, heads: Iterable[int]) -> "HeadRow":
        """Return what some of the heads keep."""
        return HeadRow(tuple(self.heads[head] for head in heads))

    @cached_property
    def groups(self) -> dict[StaticRow, tuple[int, ...]]:
        """The distinct rows in order of first appearance, and their heads."""
        return {
            row: tuple(head for head, other in enumerate(self.heads) if other == row)
            for row in dict.fromkeys(self.heads)
        }

    @cached_property
    def kept_tokens(self) -> tuple[float, ...]:
        """Number of tokens read from the cache at every step, mean over the heads."""
        return tuple(float(x) for x in np.mean([row.kept_tokens for row in self.heads], axis=0))

    @property
    def capacity(self) -> int:
        """Slots of the head that needs most."""
        return max(row.capacity for row in self.heads)

    def head_slots(self, num_heads: int) -> int:
        """Return the slots of all heads together; raises AmskvError for another number of heads."""
        check_heads(len(self.heads), num_heads)
        return max(map(sum, zip(*(row.kept_tokens for row in self.heads), strict=True)))

    def scores(self, num_heads: int) -> int:
        """Return how many float32 scores are cached per batch row."""
        return 0

    def shares(self, schedule: ScaleSchedule) -> np.ndarray:
        """See ``Row.shares``; mean over the heads."""
        shares: np.ndarray = self.head_shares(schedule, len(self.heads)).mean(0)
        return shares

    def head_shares(self, schedule: ScaleSchedule, num_heads: int) -> np.ndarray:
        """See ``Row.head_shares``."""
        check_heads(len(self.heads), num_heads)
        return np.stack([head.shares(schedule) for head in self.heads])

    def positions(self, schedule: ScaleSchedule, step: int) -> np.ndarray:
        """Return the tokens kept at ``step``, [heads, all positions] bool."""
        return np.stack([head.positions(schedule, step) for head in self.heads])

    def check(self, schedule: ScaleSchedule, where: str) -> None:
        """Raise AmskvError where the row cannot be carried out; ``where`` names it."""
        self.check_segments(schedule, where)
        for row, heads in self.groups.items():
            row.check(schedule, f"{where}, head {heads[0]}")

    def check_segments(self, schedule: ScaleSchedule, where: str) -> None:
        """Raise AmskvError where a step alone cannot be carried out; ``where`` names the row."""
        if not self.heads:
            raise AmskvError(f"{where} of the retention plan has no heads")
        for row, heads in self.groups.items():
            row.check_segments(schedule, f"{where}, head {heads[0]}")


class Row(Protocol):
    """What all kinds of rows share.

    Attributes:
      kind: its name in a plan's JSON.
      pooled: whether all layers with such rows share their buffers, in which each has slots of its
        own, and one program for which their differences are data.
    """

    kind: ClassVar[str]
    pooled: ClassVar[bool]

    @property
    def parts(self) -> Sequence[Part["Row"]]:
        """What is kept in which format of numbers: buffers of their own, each format once."""
        ...

    @property
    def kept_tokens(self) -> Sequence[float]:
        """Number of tokens read from the cache at every step, mean over the heads."""
        ...

    @property
    def capacity(self) -> int:
        """Slots of the head that needs most."""
        ...

    def head_slots(self, num_heads: int) -> int:
        """Return the slots of all heads; raises AmskvError if the row is for another number."""
        ...

    def scores(self, num_heads: int) -> int:
        """Return how many float32 scores are cached per batch row."""
        ...

    def shares(self, schedule: ScaleSchedule) -> np.ndarray:
        """Return which share of every scale's tokens is read at every step, mean over the heads.

        Returns:
          [S, S]: entry (j, i) for scale j at step i; NaN where that is decided while drawing.
        """
        ...

    def head_shares(self, schedule: ScaleSchedule, num_heads: int) -> np.ndarray:
        """Return ``shares`` of every head, [heads, S, S]; raises as ``head_slots``."""
        ...

    def check(self, schedule: ScaleSchedule, where: str) -> None:
        """Raise AmskvError where the row cannot be carried out; ``where`` names it."""
        ...

    def to_json(self, schedule: ScaleSchedule) -> Any:
        """Return what ``from_json`` reads."""
        ...


def check_heads(planned: int, num_heads: int) -> None:
    """Raise AmskvError unless a plan for ``planned`` heads a layer meets a model with as many."""
    if planned != num_heads:
        raise AmskvError(
            f"the retention plan is for {planned} heads a layer, the model has {num_heads}: "
            "make one from this model's calibration"
        )


def check_steps(schedule: ScaleSchedule, where: str, steps: Sequence[Any]) -> None:
    """Raise AmskvError unless there is one of ``steps`` per scale; ``where`` names the row."""
    if len(steps) != schedule.num_scales:
        raise AmskvError(
            f"{where} of the retention plan has {len(steps)} steps, "
            f"but the schedule has {schedule.num_scales} scales"
        )


def segments_of(schedule: ScaleSchedule, positions: np.ndarray) -> tuple[Segment, ...]:
    """Return the maximal runs of a boolean array over all positions, scale by scale."""
    segments = []
    for scale in range(schedule.num_scales):
        edges = np.flatnonzero(np.diff(positions[schedule.slice(scale)], prepend=0, append=0))
        segments += [
            Segment(scale, int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]
    return tuple(segments)


def _item(schedule: ScaleSchedule, item: int | Sequence[int]) -> Segment:
    if isinstance(item, int):
        if not 0 <= item < schedule.num_scales:
            raise IndexError(item)
        return Segment(item, 0, schedule.tokens[item])
    scale, start, stop = (int(x) for x in item)
    return Segment(scale, start, stop)


def _plain(schedule: ScaleSchedule, segment: Segment) -> int | list[int]:
    whole = segment.start == 0 and segment.stop == schedule.tokens[segment.scale]
    return segment.scale if whole else list(segment)
