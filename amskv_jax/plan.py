"""Retention plans: which earlier tokens every layer may still see at every step.

A plan is decided before anything is traced, so it fixes every shape of the cache. *Step i* generates
scale ``i``; layer ``l`` then attends to what its row keeps at step ``i`` and to scale ``i`` itself.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from amskv_jax.errors import AmskvError
from amskv_jax.schedule import ScaleSchedule

FORMAT = "amskv_jax.retention_plan"


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

    keep: tuple[tuple[Segment, ...], ...]

    @classmethod
    def from_positions(cls, schedule: ScaleSchedule, kept: Sequence[np.ndarray]) -> "StaticRow":
        """Build a row from one boolean array over all ``schedule.total`` positions per step."""
        return cls(tuple(_segments(schedule, positions) for positions in kept))

    @classmethod
    def from_scales(cls, schedule: ScaleSchedule, kept: Iterable[Iterable[int]]) -> "StaticRow":
        """Build a row from whole scale ids per step."""
        tokens = schedule.tokens
        return cls(tuple(tuple(Segment(j, 0, tokens[j]) for j in sorted(ids)) for ids in kept))

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

    def positions(self, schedule: ScaleSchedule, step: int) -> np.ndarray:
        """Return the tokens kept at ``step`` as a boolean array over all positions."""
        kept = np.zeros(schedule.total, bool)
        for scale, start, stop in self.keep[step]:
            kept[schedule.offsets[scale] + start : schedule.offsets[scale] + stop] = True
        return kept

    def check(self, schedule: ScaleSchedule, layer: int) -> None:
        """Raise AmskvError where the row cannot be carried out."""
        if len(self.keep) != schedule.num_scales:
            raise AmskvError(
                f"layer {layer} of the retention plan has {len(self.keep)} steps, "
                f"but the schedule has {schedule.num_scales} scales"
            )
        for step, segments in enumerate(self.keep):
            seen: dict[int, int] = {}
            for scale, start, stop in segments:
                where = f"layer {layer}, step {step} of the retention plan keeps"
                if not 0 <= scale < step:
                    raise AmskvError(f"{where} scale {scale}, which is not an earlier scale")
                if not 0 <= start < stop <= schedule.tokens[scale]:
                    raise AmskvError(
                        f"{where} tokens {start}:{stop} of scale {scale}, "
                        f"which has {schedule.tokens[scale]}"
                    )
                if start < seen.get(scale, 0):
                    raise AmskvError(f"{where} some tokens of scale {scale} twice or out of order")
                seen[scale] = stop
        for step in range(1, schedule.num_scales):
            available = self.positions(schedule, step - 1)
            available[schedule.slice(step - 1)] = True
            revived = self.positions(schedule, step) & ~available
            if revived.any():
                scale, start, stop = _segments(schedule, revived)[0]
                raise AmskvError(
                    f"layer {layer}, step {step} of the retention plan keeps tokens {start}:{stop} "
                    f"of scale {scale}, which were dropped before: what is gone cannot come back. "
                    "Keep them at every step in between, or drop them here too"
                )


Row = StaticRow


def _segments(schedule: ScaleSchedule, positions: np.ndarray) -> tuple[Segment, ...]:
    """Return the maximal runs of a boolean array over all positions, scale by scale."""
    segments = []
    for scale in range(schedule.num_scales):
        edges = np.flatnonzero(np.diff(positions[schedule.slice(scale)], prepend=0, append=0))
        segments += [
            Segment(scale, int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]
    return tuple(segments)


class Run(NamedTuple):
    """Consecutive layers with equal rows."""

    row: Row
    start: int
    stop: int


@dataclass(frozen=True)
class RetentionPlan:
    """What every layer keeps at every step: hashable, checked, readable and writable as JSON.

    Attributes:
      schedule: the scales it was made for.
      rows: one row per layer.
      note: how the plan was made, for people; plans that differ only here are equal.

    Raises:
      AmskvError: if a row refers to scales or tokens that do not exist, keeps something twice, or
        brings back what an earlier step dropped.
    """

    schedule: ScaleSchedule
    rows: tuple[Row, ...]
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.rows:
            raise AmskvError("a retention plan needs at least one layer")
        checked: set[Row] = set()
        for layer, row in enumerate(self.rows):
            if row not in checked:
                row.check(self.schedule, layer)
                checked.add(row)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.rows)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Runs of consecutive layers with equal rows."""
        runs, start = [], 0
        for row, layers in groupby(self.rows):
            stop = start + len(list(layers))
            runs.append(Run(row, start, stop))
            start = stop
        return tuple(runs)

    @classmethod
    def from_keep(
        cls,
        schedule: ScaleSchedule,
        keep: Sequence[Sequence[Sequence[int | Sequence[int]]]],
        note: str = "",
    ) -> "RetentionPlan":
        """Build a static plan from ``keep[layer][step]``.

        Args:
          schedule: the scales.
          keep: items are a scale id (the whole scale) or ``(scale, start, stop)``.
          note: how the plan was made.

        Raises:
          AmskvError: see the class.
        """
        rows = []
        for layer, steps in enumerate(keep):
            try:
                rows.append(
                    StaticRow(tuple(tuple(_item(schedule, x) for x in step) for step in steps))
                )
            except (TypeError, ValueError, IndexError) as error:
                raise AmskvError(
                    f"layer {layer} of the retention plan: expected lists of scale ids below "
                    f"{schedule.num_scales} or [scale, start, stop], found {error}"
                ) from error
        return cls(schedule, tuple(rows), note)

    def to_json(self) -> str:
        """Return the plan as JSON; whole scales are plain ids."""
        keep = [
            [[_plain(self.schedule, segment) for segment in step] for step in row.keep]
            for row in self.rows
        ]
        head = {"format": FORMAT, "version": 1, "note": self.note, "schedule": self.schedule.grids}
        layers = ",\n  ".join(json.dumps(layer, separators=(",", ":")) for layer in keep)
        return json.dumps(head)[:-1] + f', "keep": [\n  {layers}\n]}}\n'

    @classmethod
    def from_json(cls, text: str, schedule: ScaleSchedule | None = None) -> "RetentionPlan":
        """Read a plan from JSON.

        Args:
          text: what ``to_json`` wrote, or just ``{"keep": [[[scale ids], ...per step], ...]}``.
          schedule: the model's schedule; required where the text names none.

        Raises:
          AmskvError: if the text is no plan, or was made for another schedule.
        """
        try:
            data = json.loads(text)
            keep = data["keep"]
            stated = (
                ScaleSchedule(tuple(map(tuple, data["schedule"]))) if "schedule" in data else None
            )
        except (ValueError, KeyError, TypeError) as error:
            raise AmskvError(
                'this is no retention plan: expected JSON with a "keep" table of '
                f"[layer][step] lists of scale ids ({error})"
            ) from error
        if stated and schedule and stated != schedule:
            raise AmskvError(
                f"the retention plan was made for the scales {stated}; the model has {schedule}"
            )
        if not (schedule or stated):
            raise AmskvError("the retention plan names no schedule, and none was given")
        return cls.from_keep(schedule or stated, keep, str(data.get("note", "")))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path, schedule: ScaleSchedule | None = None) -> "RetentionPlan":
        """Read a plan file; see ``from_json``."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise AmskvError(f"cannot read the retention plan {path}: {error}") from error
        try:
            return cls.from_json(text, schedule)
        except AmskvError as error:
            raise AmskvError(f"{path}: {error}") from error


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
