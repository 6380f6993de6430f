"""How fused attention is cut into units for the thread blocks of a Hopper GPU."""

from collections import defaultdict
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


class Part(NamedTuple):
    """Blocks of keys of one source, one after the other.

    Attributes:
      source: 0 for cached ones, 1 for the step's own.
      first: first token of the first block.
      rounds: how many blocks.
      valid: how many tokens of a block count, None for all.
    """

    source: int
    first: int
    rounds: int
    valid: int | None


class Step(NamedTuple):
    """Blocks of keys that are attended to by one piece of code; the fewer, the sooner compiled.

    Attributes:
      parts: what the blocks are, in order: of whole ones, or of single ones of which some counts.
      width: of a block, a multiple of 64.
    """

    parts: tuple[Part, ...]
    width: int

    @property
    def rounds(self) -> int:
        """How many blocks."""
        return sum(part.rounds for part in self.parts)


def steps_of(spans: Spans, own: int, block: int, *, apart: bool = False) -> list[Step]:
    """Return all blocks of keys: whole ones, then what is left of every source, by width.

    Args:
      spans: of cached tokens.
      own: the step's tokens.
      block: keys of a whole block.
      apart: whether cached and own tokens need code of their own.
    """
    found: dict[tuple[bool, int, int], list[Part]] = defaultdict(list)
    for source, first, length in [*((0, *span) for span in spans), (1, 0, own)]:
        whole, rest = divmod(length, block)
        kind = source if apart else 0
        if whole:
            found[False, block, kind].append(Part(source, first, whole, None))
        if rest:
            width = -(-rest // WIDTH) * WIDTH
            found[True, width, kind].append(Part(source, first + whole * block, 1, rest))
    return [Step(tuple(parts), width) for (_, width, _), parts in sorted(found.items())]
