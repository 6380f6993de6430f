"""Rows whose tokens are kept in different formats of numbers, and how they are made from tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.numbers import NUMBERS, numbers_of
from amskv_jax.plan.rows import HeadRow, Part, StaticRow, segments_of
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class MixedRow:
    """What every head of one layer keeps in every format of numbers.

    A token has one format for life. All heads share the slots of a format.

    Attributes:
      parts: a format and what every head keeps in it; each format once, and its name stated.
    """

    kind: ClassVar[str] = "mixed"
    pooled: ClassVar[bool] = True
    parts: tuple[Part[HeadRow], ...]

    @classmethod
    def from_json(cls, data: Any, schedule: ScaleSchedule) -> "MixedRow":
        """Read a row from ``{"parts": [{"numbers": name, "rows": ..., "heads": ...}, ...]}``.

        "rows" and "heads" are those of ``HeadRow.from_json``.
        """
        parts = [(part["numbers"], HeadRow.from_json(part, schedule)) for part in data["parts"]]
        return cls(tuple(Part(str(numbers), row) for numbers, row in parts))

    def to_json(self, schedule: ScaleSchedule) -> Any:
        """Return what ``from_json`` reads."""
        return {
            "parts": [{"numbers": numbers, **row.to_json(schedule)} for numbers, row in self.parts]
        }

    @cached_property
    def kept_tokens(self) -> tuple[float, ...]:
        """Number of tokens read from the cache at every step, mean over the heads."""
        per_part = [row.kept_tokens for _, row in self.parts]
        return tuple(map(sum, zip(*per_part, strict=True)))

    @property
    def capacity(self) -> int:
        """The most tokens that a head reads at any step, in all formats together."""
        per_part = [[head.kept_tokens for head in row.heads] for _, row in self.parts]
        return int(np.sum(per_part, axis=0).max())

    def head_slots(self, num_heads: int) -> int:
        """Return the slots of all heads and formats; raises AmskvError for other heads."""
        return sum(row.head_slots(num_heads) for _, row in self.parts)

    def scores(self, num_heads: int) -> int:
        """Return how many float32 scores are cached per batch row."""
        return 0

    def shares(self, schedule: ScaleSchedule) -> np.ndarray:
        """See ``Row.shares``; mean over the heads, of all formats together."""
        shares: np.ndarray = np.sum([row.shares(schedule) for _, row in self.parts], axis=0)
        return shares

    def head_shares(self, schedule: ScaleSchedule, num_heads: int) -> np.ndarray:
        """See ``Row.head_shares``; of all formats together."""
        per_part = [row.head_shares(schedule, num_heads) for _, row in self.parts]
        shares: np.ndarray = np.sum(per_part, axis=0)
        return shares

    def positions(self, schedule: ScaleSchedule, step: int) -> np.ndarray:
        """Return the tokens kept at ``step``, [heads, all positions] bool."""
        return self.formats(schedule, step) >= 0

    def formats(self, schedule: ScaleSchedule, step: int) -> np.ndarray:
        """Return in which part every token is kept at ``step``, [heads, all positions]; else -1."""
        kept = np.stack([row.positions(schedule, step) for _, row in self.parts])
        return np.where(kept.any(0), kept.argmax(0), -1)

    def check(self, schedule: ScaleSchedule, where: str) -> None:
        """Raise AmskvError where the row cannot be carried out; ``where`` names it."""
        plan = f"{where} of the retention plan"
        names = [numbers for numbers, _ in self.parts]
        if not names:
            raise AmskvError(f"{plan} has no parts: expected one for a format of numbers at least")
        for name in names:
            if name not in NUMBERS:
                raise AmskvError(f"{plan} keeps numbers as {name!r}: expected {', '.join(NUMBERS)}")
            if names.count(name) > 1:
                raise AmskvError(f"{plan} has two parts in {name}: put both into one")
        for numbers, row in self.parts:
            row.check_segments(schedule, f"{where}, {numbers}")
        heads = [len(row.heads) for _, row in self.parts]
        if len(set(heads)) > 1:
            raise AmskvError(f"{plan} has parts of {heads} heads: expected as many in all of them")
        self._check_formats(schedule, where)
        for numbers, row in self.parts:
            row.check(schedule, f"{where}, {numbers}")

    def _check_formats(self, schedule: ScaleSchedule, where: str) -> None:
        """Raise AmskvError where a token is in two formats, at one step or one after the other."""
        before = np.full((len(self.parts[0].row.heads), schedule.total), -1)
        for step in range(schedule.num_scales):
            kept = np.stack([row.positions(schedule, step) for _, row in self.parts])
            owner = np.where(kept.any(0), kept.argmax(0), -1)
            last = len(kept) - 1 - kept[::-1].argmax(0)
            place = f"step {step} of the retention plan"
            self._refuse(schedule, kept.sum(0) > 1, where, f"{place} has", (owner, last))
            changed = (before >= 0) & (owner >= 0) & (before != owner)
            self._refuse(schedule, changed, where, f"{place} changes", (before, owner))
            before = owner

    def _refuse(
        self,
        schedule: ScaleSchedule,
        wrong: np.ndarray,
        where: str,
        what: str,
        parts: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Raise AmskvError if tokens [heads, all positions] are ``wrong``; all of that shape."""
        if not wrong.any():
            return
        head = int(wrong.any(1).argmax())
        scale, start, stop = segments_of(schedule, wrong[head])[0]
        first, second = (
            self.parts[part[head, schedule.offsets[scale] + start]].numbers for part in parts
        )
        raise AmskvError(
            f"{where}, head {head}, {what} tokens {start}:{stop} of scale {scale} in {first} and "
            f"in {second}: a token has one format for life"
        )


class _Life(NamedTuple):
    """How a block is kept: in which format, and until which step, itself not included."""

    numbers: str
    stop: int


def mixed_row(
    schedule: ScaleSchedule,
    formats: Sequence[Sequence[str | None]],
    last_steps: Sequence[Sequence[int]] | np.ndarray | None = None,
    lend: Iterable[tuple[int, int]] = (),
) -> MixedRow:
    """Make the row of a layer from tables of its blocks, each all tokens of one scale in one head.

    A format has as many slots as its blocks need at the step at which they need most. At other
    steps some are free and can be lent: to blocks that are kept nowhere, from the step after their
    own on, and to others beyond their last step; whole, without a gap, and adding no slot.

    Args:
      schedule: the scales, S of them.
      formats: [heads][S - 1]: name of the format of every block, None for those that are kept
        nowhere; the last scale never is.
      last_steps: [heads][S - 1]: the last step that reads a block; S - 1 for all if not given. Of
        blocks that are kept nowhere it does not matter.
      lend: blocks (head, scale) to lend free slots to, the one worth most first. A block that is
        kept nowhere lies in the format in which it can stay longest, of equal ones the most exact.
        None is lent to which is not named.

    Returns:
      A row that passes ``check``. Formats are in the order of ``NUMBERS``.

    Raises:
      UsageError: if a format is unknown, or a table has another shape.
    """
    steps, tokens = schedule.num_scales, schedule.tokens
    heads, sources = len(formats), steps - 1
    last = np.full((heads, sources), sources) if last_steps is None else np.asarray(last_steps)
    if not heads or last.shape != (heads, sources) or {len(own) for own in formats} != {sources}:
        raise UsageError(
            f"expected a format and a last step for each of {sources} scales of every head, "
            f"found {[len(own) for own in formats]} formats and last steps {last.shape}"
        )
    lives: dict[tuple[int, int], _Life] = {}
    used: dict[str, np.ndarray] = {}
    for head, scale in np.ndindex(heads, sources):
        name, stop = formats[head][scale], min(int(last[head, scale]), sources) + 1
        if name is not None and stop > scale + 1:
            numbers_of(name)
            lives[head, scale] = _Life(name, stop)
            used.setdefault(name, np.zeros(steps, int))[scale + 1 : stop] += tokens[scale]
    free = {name: read.max() - read for name, read in used.items()}
    for head, scale in lend:
        if not (0 <= head < heads and 0 <= scale < sources):
            raise UsageError(
                f"slots are to be lent to scale {scale} of head {head}: expected one of {sources} "
                f"scales of {heads} heads"
            )
        _lend(schedule, lives, free, (head, scale))
    names = [name for name in NUMBERS if name in used] or [next(iter(NUMBERS))]
    return MixedRow(
        tuple(Part(name, _head_row(schedule, heads, lives, name)) for name in names),
    )


def _lend(
    schedule: ScaleSchedule,
    lives: dict[tuple[int, int], _Life],
    free: dict[str, np.ndarray],
    block: tuple[int, int],
) -> None:
    """Lengthen the life of a block (head, scale) as long as slots are ``free``, per format [S]."""
    size, life = schedule.tokens[block[1]], lives.get(block)
    start = block[1] + 1 if life is None else life.stop
    # Most exact first, for ``max`` takes the first of equal ones.
    options = sorted(free, key=lambda name: -numbers_of(name).bytes(64))
    if life is not None:
        options = [life.numbers]
    stops = {name: start + int((free[name][start:] >= size).cumprod().sum()) for name in options}
    name = max(stops, key=stops.__getitem__, default=None)
    if name is not None and stops[name] > start:
        free[name][start : stops[name]] -= size
        lives[block] = _Life(name, stops[name])


def _head_row(
    schedule: ScaleSchedule, heads: int, lives: dict[tuple[int, int], _Life], name: str
) -> HeadRow:
    """Return what all heads keep in one format."""
    kept: list[list[list[int]]] = [[[] for _ in range(schedule.num_scales)] for _ in range(heads)]
    for (head, scale), life in lives.items():
        if life.numbers == name:
            for step in range(scale + 1, life.stop):
                kept[head][step].append(scale)
    return HeadRow(tuple(StaticRow.from_scales(schedule, own) for own in kept))
