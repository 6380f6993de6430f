"""Scale schedules: the growing token maps of a next-scale autoregressive model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class ScaleSchedule:
    """The token maps which a model generates one after the other (VAR, arXiv 2404.02905).

    Scale ``i`` is a map of ``grids[i] = (height, width)`` tokens. Sequences hold the maps of all
    scales in order, each row by row, so scale ``i`` occupies ``offsets[i] : offsets[i + 1]``.

    Attributes:
      grids: (height, width) of every scale, in tokens.

    Raises:
      ValueError: if there is no scale, or a side is not a positive integer.
    """

    grids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        grids = tuple((int(height), int(width)) for height, width in self.grids)
        object.__setattr__(self, "grids", grids)
        if not grids:
            raise ValueError("a scale schedule needs at least one scale")
        for index, (height, width) in enumerate(grids):
            if height < 1 or width < 1:
                raise ValueError(f"scale {index} is {height}x{width}: sides must be at least 1")

    @classmethod
    def square(cls, sides: Sequence[int]) -> "ScaleSchedule":
        """Return the schedule of square maps with the given sides (the ``patch_nums`` of VAR)."""
        return cls(tuple((side, side) for side in sides))

    @property
    def num_scales(self) -> int:
        """Number of scales S."""
        return len(self.grids)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens T_i of every scale."""
        return tuple(height * width for height, width in self.grids)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of the first token of every scale, then the total: S + 1 numbers."""
        return (0, *accumulate(self.tokens))

    @property
    def total(self) -> int:
        """Number of tokens of all scales."""
        return self.offsets[-1]

    def slice(self, scale: int) -> slice:
        """Return where the tokens of ``scale`` lie in a sequence of all scales."""
        return slice(self.offsets[scale], self.offsets[scale + 1])

    def __str__(self) -> str:
        return ", ".join(f"{h}" if h == w else f"{h}x{w}" for h, w in self.grids)


VAR_256 = ScaleSchedule.square((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
"""Schedule of the 256-pixel VAR models: 680 tokens."""

VAR_512 = ScaleSchedule.square((1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
"""Schedule of the 512-pixel VAR model: 2240 tokens."""
