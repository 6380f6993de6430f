"""Memory of what comes and goes while a step is drawn, and how a step is shared out to bound it.

The sampler takes a step's batch rows in turn wherever all at once would need more than
``WORK_BYTES``: how many at a time follows from the formulas below, as does what memory reports
predict. They count the arrays that are alive together when a block, or the head, needs most. What a
compiler fuses is not counted: norms, gates and activation functions are part of the products or
passes next to them.
"""

from dataclasses import dataclass

from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.retention import RetentionPlan, scans
from amskv_jax.plan.rows import Row
from amskv_jax.plan.runtime_rows import OnlineRow
from amskv_jax.plan.shape import BlockShape

WORK_BYTES = 2**31
"""Bytes of activations, besides the residual stream, which a step should not exceed. Products of
fewer tokens would be too small for large chips."""

FLOAT32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of activations.

    Attributes:
      shape: of blocks and head.
      itemsize: bytes of a number in products.
      logits_bytes: most bytes of float32 attention logits at once; 0 where attention makes none.
      copied: bytes of a number's copy in the type in which it is multiplied, 0 where that is its
        own.
    """

    shape: BlockShape
    itemsize: int
    logits_bytes: int = 0
    copied: int = 0

    def residual(self, rows: int, tokens: int) -> int:
        """Return the bytes of the residual stream: ``tokens`` of every batch row."""
        return self.itemsize * self.shape.width * rows * tokens

    def block(
        self, tokens: int, held: int, geometry: CacheGeometry, *, picked: bool, folded: bool
    ) -> int:
        """Return what a block needs most besides the residual stream.

        Args:
          tokens: of the step, T.
          held: tokens that a head reads from the cache.
          geometry: rows and heads.
          picked: layers pick their group's attention while the program runs, so that queries, keys,
            values and output are whole.
          folded: heads are rows of their own, which transposes queries and output.
        """
        channels = geometry.num_heads * geometry.head_dim
        normed = self.itemsize * 2 * tokens  # queries and keys
        if self.shape.rotary:
            normed = (2 * FLOAT32 + self.itemsize) * tokens
        apart = 3 * tokens  # queries, keys and values as their product leaves them
        joined = held + tokens
        needed = joined + max(apart, joined)
        if picked:
            needed = max(needed, 3 * tokens + 2 * joined)  # values, outputs; joined
        needed += 2 * tokens if folded else 0
        attention = channels * (normed + self.itemsize * needed)
        feed_forward = self.itemsize * tokens * (2 * self.shape.width + self.shape.hidden)
        feed_forward += self.copied * tokens * self.shape.hidden
        logits = FLOAT32 * geometry.rows * geometry.num_heads * tokens * joined
        weights = 2 * min(self.logits_bytes, logits)  # and the probabilities
        return max(geometry.rows * attention + weights, geometry.rows * feed_forward)

    def head(self, tokens: int, pictures: int, rows_per_picture: int) -> int:
        """Return what the head and drawing need most.

        These are the logits of all rows and the guided ones; then the guided ones, sorted, their
        probabilities and the random numbers.
        """
        copies = max(rows_per_picture + 1, 4)
        return FLOAT32 * self.shape.choices * tokens * pictures * copies


@dataclass(frozen=True)
class StepShares:
    """How many parts a step's batch is taken in.

    Attributes:
      blocks: parts in which the blocks take the batch rows.
      heads: parts in which the head takes the pictures.
    """

    blocks: int = 1
    heads: int = 1


def step_shares(
    plan: RetentionPlan, step: int, geometry: CacheGeometry, pictures: int, work: Activations
) -> StepShares:
    """Return how a step is shared out.

    Args:
      plan: what is kept.
      step: the step.
      geometry: of the batch, on a mesh that of one device.
      pictures: of the batch, likewise.
      work: what the model needs.
    """
    blocks = parts(block_bytes(plan, step, geometry, work), pictures)
    if any(isinstance(row, OnlineRow) for row in plan.rows):
        blocks = 1  # what they keep, they decide for the whole batch
    head = work.head(plan.schedule.tokens[step], pictures, geometry.rows // pictures)
    return StepShares(blocks, parts(head, pictures))


def block_bytes(plan: RetentionPlan, step: int, geometry: CacheGeometry, work: Activations) -> int:
    """Return what the blocks need at ``step``: that of the layer which needs most."""
    rows = set(plan.rows)
    return work.block(
        plan.schedule.tokens[step],
        max(max(_read(row, step)) for row in rows),
        geometry,
        picked=len(set(plan.group_of)) > len(scans(plan.group_of)),
        folded=any(len(set(_read(row, step))) > 1 for row in rows),
    )


def parts(size: int, pictures: int) -> int:
    """Return in how many equal parts pictures should be taken which need ``size`` bytes at once.

    The fewest whose size is at most ``WORK_BYTES``, but none that would be smaller than a quarter
    of it: a batch whose pictures do not share out so evenly is taken in larger parts.
    """
    divisors = [count for count in range(1, pictures + 1) if pictures % count == 0]
    large = [count for count in divisors if count == 1 or 4 * size >= count * WORK_BYTES]
    return next((count for count in large if size <= count * WORK_BYTES), large[-1])


def _read(row: Row, step: int) -> list[int]:
    """Return the tokens that are read from the cache: by every head, or once if all read as many.

    Heads that read fewer than another are padded.
    """
    parts = [getattr(part.row, "heads", (part.row,)) for part in row.parts]
    return [sum(int(own.kept_tokens[step]) for own in head) for head in zip(*parts, strict=True)]
