"""Retention plans: which earlier tokens every layer may still see at every step.

A plan is decided before anything is traced, so it fixes every shape of the cache. *Step i*
generates scale ``i``; layer ``l`` then attends to what its row keeps at step ``i`` and to scale
``i`` itself.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from amskv_jax.errors import AmskvError
from amskv_jax.plan.mixed import MixedRow
from amskv_jax.plan.rows import HeadRow, Row, StaticRow
from amskv_jax.plan.runtime_rows import OnlineRow, SelectingRow
from amskv_jax.plan.shape import CacheShape
from amskv_jax.schedule import ScaleSchedule

FORMAT = "amskv_jax.retention_plan"

ROWS: dict[str, Any] = {
    row.kind: row for row in (StaticRow, SelectingRow, HeadRow, MixedRow, OnlineRow)
}
"""Name of every kind of row in JSON -> its class."""

MAX_SCANS = 4
"""Runs of layers of one group, up to this number, are scanned one by one. More would make the
program long, so all layers are then scanned at once and each picks its group's attention."""


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
                row.check(self.schedule, f"layer {layer}")
                checked.add(row)

    def check(self, shape: CacheShape) -> None:
        """Raise AmskvError unless the plan is for a cache of this shape."""
        if self.schedule != shape.schedule:
            raise AmskvError(f"the plan's scales are {self.schedule}, the model's {shape.schedule}")
        if self.num_layers != shape.num_layers:
            raise AmskvError(
                f"the retention plan has {self.num_layers} layers, the model {shape.num_layers}"
            )
        for row in layers_by_row(self):
            row.head_slots(shape.num_heads)  # raises where the heads are other ones

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.rows)

    @cached_property
    def group_of(self) -> tuple[int, ...]:
        """The group of every layer, numbered in order of first appearance.

        Layers of a group share buffers and a program: those with equal rows, and all that are
        ``pooled``.
        """
        keys = [None if row.pooled else row for row in self.rows]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return tuple(numbers[key] for key in keys)

    @property
    def states_formats(self) -> bool:
        """Whether some rows say in which formats of numbers they keep tokens."""
        return any(part.numbers is not None for row in set(self.rows) for part in row.parts)

    @classmethod
    def from_keep(
        cls, schedule: ScaleSchedule, keep: Sequence[Any], note: str = ""
    ) -> "RetentionPlan":
        """Build a plan from the table which its JSON form holds.

        Args:
          schedule: the scales.
          keep: for static layers, ``keep[layer][step]`` is a list whose items are a scale id (the
            whole scale) or ``(scale, start, stop)``; for other kinds see ``rows``.
          note: how the plan was made.

        Raises:
          AmskvError: see the class.
        """
        rows = []
        for layer, row in enumerate(keep):
            try:
                rows.append(_row_from_json(row, schedule))
            except AmskvError as error:
                raise AmskvError(f"layer {layer} of the retention plan: {error}") from error
            except (TypeError, ValueError, KeyError, IndexError) as error:
                raise AmskvError(
                    f"layer {layer} of the retention plan: expected lists of scale ids below "
                    f"{schedule.num_scales} or [scale, start, stop], found {error}"
                ) from error
        return cls(schedule, tuple(rows), note)

    def to_json(self) -> str:
        """Return the plan as JSON, a line per layer; whole scales are plain ids.

        Layers that select tokens at run time, or whose heads or formats of numbers differ, are
        objects; see ``rows``.
        """
        head = {"format": FORMAT, "version": 1, "note": self.note, "schedule": self.schedule.grids}
        keep = [_row_to_json(row, self.schedule) for row in self.rows]
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
        except (ValueError, KeyError, TypeError, RecursionError) as error:
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


def scans(group_of: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the ranges of layers that are scanned together, of layers of these groups."""
    starts = [0, *(i for i in range(1, len(group_of)) if group_of[i] != group_of[i - 1])]
    if len(starts) > MAX_SCANS:
        starts = [0]
    return list(zip(starts, [*starts[1:], len(group_of)], strict=True))


def layers_by_row(plan: RetentionPlan) -> dict[Row, list[int]]:
    """Return the distinct rows of a plan, in order of first appearance, and their layers."""
    layers: dict[Row, list[int]] = {}
    for layer, row in enumerate(plan.rows):
        layers.setdefault(row, []).append(layer)
    return layers


def _row_to_json(row: Row, schedule: ScaleSchedule) -> Any:
    """Return one layer's row: static ones as plain lists, the others as objects with their kind."""
    content = row.to_json(schedule)
    return content if isinstance(content, list) else {"kind": row.kind, **content}


def _row_from_json(data: Any, schedule: ScaleSchedule) -> Row:
    """Read one layer's row of any kind; raises ValueError, TypeError, KeyError or IndexError."""
    kind = data["kind"] if isinstance(data, dict) else StaticRow.kind
    if kind not in ROWS:
        raise ValueError(f"the kind {kind!r}, but there are {', '.join(ROWS)}")
    row: Row = ROWS[kind].from_json(data, schedule)
    return row
