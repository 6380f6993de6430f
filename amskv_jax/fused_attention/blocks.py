"""How fused attention is cut into units for the thread blocks of a Hopper GPU."""

from dataclasses import dataclass
from typing import NamedTuple

from amskv_jax.hopper import processors

QUERIES = 64
"""Of a warpgroup: the rows which an instruction of the tensor cores takes."""
WIDTH = 64
"""Channels whose rows are 128 bytes, as copies and tensor cores want them; heads of 128 are two."""
Spans = tuple[tuple[int, int], ...]
"""Runs of slots: the first one, and how many there are."""


@dataclass(frozen=True)
class Blocks:
    """What a thread block does at once.

    Attributes:
      queries: warpgroups that share the keys of one head, with 64 queries each.
      heads: of one or several batch rows.
      keys: tokens of a block of keys, a multiple of 64.
      stages: blocks of keys and values in shared memory, for each head.
      turns: whether two warpgroups take turns with the tensor cores.
      in_turn: whether a thread block takes several units, one after the other.
    """

    queries: int
    heads: int
    keys: int
    stages: int
    turns: bool = False
    in_turn: bool = True

    @property
    def groups(self) -> int:
        """Warpgroups that attend."""
        return self.queries * self.heads


def blocks_for(tokens: int, pairs: int, head_dim: int) -> Blocks:
    """Return the fastest blocks of those which were tried on an H100.

    Args:
      tokens: queries of a head.
      pairs: heads of all batch rows.
      head_dim: 64 or 128.
    """
    queries = -(-tokens // QUERIES)
    if head_dim > WIDTH:  # registers are too few for what a second unit needs
        return Blocks(min(queries, 2), 1, 128, 2, turns=queries > 1, in_turn=False)
    if queries == 1:
        heads = 3 if pairs % 3 == 0 and pairs >= 3 * processors() else 1
        return Blocks(1, heads, 64, 3)
    return Blocks(3, 1, 128, 3) if queries == 3 else Blocks(2, 1, 128, 4, turns=True)


class Step(NamedTuple):
    """One block of keys, or several alike in a loop.

    Attributes:
      source: 0 for cached ones, 1 for the step's own.
      first: first token of the first block.
      rounds: how many blocks; None for a single one, outside of a loop.
      width: of a block, a multiple of 64.
      valid: how many of its tokens count, None for all.
    """

    source: int
    first: int
    rounds: int | None
    width: int
    valid: int | None


def steps_of(spans: Spans, own: int, block: int) -> list[Step]:
    """Return the blocks of all sources in order; the last one is not in a loop."""
    steps = []
    for source, first, length in [*((0, *span) for span in spans), (1, 0, own)]:
        whole, rest = divmod(length, block)
        looped = whole - 1 if source and not rest else whole
        if looped:
            steps.append(Step(source, first, looped, block, None))
        if looped < whole:
            steps.append(Step(source, first + looped * block, None, block, None))
        if rest:
            width = -(-rest // WIDTH) * WIDTH
            steps.append(Step(source, first + whole * block, None, width, rest))
    return steps
