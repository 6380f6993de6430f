"""Rows of a retention plan of which some is decided while pictures are drawn."""

import math
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from amskv_jax.errors import AmskvError
from amskv_jax.plan.rows import Part, check_steps
from amskv_jax.plan.selectors import SELECTORS, Selector
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class SelectingRow:
    """How many tokens every head of one layer keeps; which ones is decided at run time.

    Attributes:
      counts: for every step the number of earlier tokens which each head attends to.
      selector: ranks the tokens, for every batch row and head apart.
    """

    kind: ClassVar[str] = "selecting"
    pooled: ClassVar[bool] = False
    counts: tuple[int, ...]
    selector: Selector

    @classmethod
    def from_json(cls, data: Any, schedule: ScaleSchedule) -> "SelectingRow":
        """Read a row from ``{"counts": [...], "selector": {"name": ..., options}}``."""
        options = dict(data["selector"])
        name = options.pop("name")
        if name not in SELECTORS:
            raise ValueError(f"selector {name!r}, but there are {', '.join(SELECTORS)}")
        return cls(tuple(int(count) for count in data["counts"]), SELECTORS[name](**options))

    def to_json(self, schedule: ScaleSchedule) -> Any:
        """Return what ``from_json`` reads."""
        name = next(name for name, kind in SELECTORS.items() if type(self.selector) is kind)
        options = asdict(self.selector)  # type: ignore[call-overload]
        return {"counts": list(self.counts), "selector": {"name": name, **options}}

    @property
    def parts(self) -> tuple["Part[SelectingRow]"]:
        """See ``Row.parts``."""
        return (Part(None, self),)

    @property
    def kept_tokens(self) -> tuple[int, ...]:
        """Number of tokens read from the cache at every step."""
        return self.counts

    @property
    def capacity(self) -> int:
        """Slots per head that hold the row: the most tokens any step reads."""
        return max(self.counts)

    def head_slots(self, num_heads: int) -> int:
        """Return the slots of all heads together."""
        return num_heads * self.capacity

    def scores(self, num_heads: int) -> int:
        """Return how many float32 scores are cached per batch row."""
        return num_heads * self.capacity if self.selector.accumulates else 0

    def shares(self, schedule: ScaleSchedule) -> np.ndarray:
        """See ``Row.shares``."""
        counts = np.array(self.counts)
        return _shares(schedule, counts < schedule.offsets[:-1], counts == 0)

    def head_shares(self, schedule: ScaleSchedule, num_heads: int) -> np.ndarray:
        """See ``Row.head_shares``."""
        return np.stack([self.shares(schedule)] * num_heads)

    def check(self, schedule: ScaleSchedule, where: str) -> None:
        """Raise AmskvError where the row cannot be carried out; ``where`` names it."""
        check_steps(schedule, where, self.counts)
        at_hand = 0
        for step, count in enumerate(self.counts):
            place = f"{where}, step {step} of the retention plan"
            if not 0 <= count <= at_hand:
                raise AmskvError(f"{place} keeps {count} tokens, but {at_hand} are at hand")
            if 0 < count < at_hand:
                try:
                    self.selector.check(schedule.grids[step - 1], count)
                except AmskvError as error:
                    raise AmskvError(f"{place}: {error}") from error
            at_hand = count + schedule.tokens[step]


@dataclass(frozen=True)
class OnlineRow:
    """A layer that decides at run time what it keeps (Algorithm 1 of AMS-KV, arXiv 2511.16047).

    Attributes:
      tokens: of every scale.
      c_min: capacity in tokens at first.
      c_max: capacity once the layer has proved demanding.
      condensed: scales below this id are never evicted.
      theta: similarity below which a layer that overflows is demanding.
    """

    kind: ClassVar[str] = "online"
    pooled: ClassVar[bool] = False
    tokens: tuple[int, ...]
    c_min: int
    c_max: int
    condensed: int
    theta: float

    @classmethod
    def from_json(cls, data: Any, schedule: ScaleSchedule) -> "OnlineRow":
        """Read a row from ``{"c_min": ..., "c_max": ..., "condensed": ..., "theta": ...}``."""
        c_min, c_max, condensed = (int(data[name]) for name in ("c_min", "c_max", "condensed"))
        return cls(schedule.tokens, c_min, c_max, condensed, float(data["theta"]))

    def to_json(self, schedule: ScaleSchedule) -> Any:
        """Return what ``from_json`` reads."""
        return {name: getattr(self, name) for name in ("c_min", "c_max", "condensed", "theta")}

    @property
    def parts(self) -> tuple["Part[OnlineRow]"]:
        """See ``Row.parts``."""
        return (Part(None, self),)

    @property
    def kept_tokens(self) -> tuple[int, ...]:
        """Number of tokens read at every step, visible or not."""
        return (0, *accumulate(self.tokens[:-1]))

    @property
    def capacity(self) -> int:
        """Slots per head: all scales that are ever read."""
        return self.kept_tokens[-1]

    def head_slots(self, num_heads: int) -> int:
        """Return the slots of all heads together."""
        return num_heads * self.capacity

    def scores(self, num_heads: int) -> int:
        """Return how many float32 scores are cached per batch row."""
        return 0

    def shares(self, schedule: ScaleSchedule) -> np.ndarray:
        """See ``Row.shares``."""
        chosen = np.array(schedule.offsets[:-1]) > self.c_min
        return _shares(schedule, chosen, np.zeros(schedule.num_scales, bool))

    def head_shares(self, schedule: ScaleSchedule, num_heads: int) -> np.ndarray:
        """See ``Row.head_shares``."""
        return np.stack([self.shares(schedule)] * num_heads)

    def check(self, schedule: ScaleSchedule, where: str) -> None:
        """Raise AmskvError where the row cannot be carried out; ``where`` names it."""
        if self.tokens != schedule.tokens:
            raise AmskvError(f"{where} of the retention plan was made for other scales")
        if not 0 <= self.c_min <= self.c_max or self.condensed < 0 or math.isnan(self.theta):
            raise AmskvError(
                f"{where} of the retention plan has C_min {self.c_min}, C_max {self.c_max}, "
                f"condensed {self.condensed} and theta {self.theta}: expected "
                "0 <= C_min <= C_max, 0 <= condensed, and a number"
            )


def _shares(schedule: ScaleSchedule, chosen: np.ndarray, nothing: np.ndarray) -> np.ndarray:
    """Return ``Row.shares`` where tokens are ``chosen`` [S] at run time, or none is read, [S]."""
    shares = np.triu(np.ones((schedule.num_scales, schedule.num_scales)), 1)
    shares[:, nothing] = 0
    return np.where((shares > 0) & chosen, np.nan, shares)
