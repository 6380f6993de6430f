"""Memory of what comes and goes while a step is drawn, and how a step is shared out to bound it.

The sampler takes a step's batch rows in turn wherever all at once would need more than
``WORK_BYTES``: how many at a time follows from the formulas below, as does what memory reports
predict. They count the arrays that are alive together when a block, or the head, needs most. What a
compiler fuses is not counted: norms, gates and activation functions are part of the products or
passes next to them.
"""

from dataclasses import dataclass

from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.retention import RetentionPlan
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
      attention_logits: most bytes of attention logits at once; 0 where attention needs none.
    """

    shape: BlockShape
    itemsize: int
    attention_logits: int = 0

    def residual(self, tokens: int) -> int:
        """Return the bytes of the residual stream of ``tokens`` tokens of one batch row."""
        return FLOAT32 * self.shape.width * tokens

    def block(self, tokens: int, held: int, channels: int) -> int:
        """Return what a block needs most besides the residual stream, for one batch row.

        Args:
          tokens: of the step, T.
          held: tokens that a head reads from the cache.
          channels: of the queries of all heads.
        """
        joined = held + tokens
        queries_keys, apart = 2 * tokens, 3 * tokens  # normed; as the product leaves them
        attention = channels * (queries_keys + joined + max(apart, joined))
        feed_forward = tokens * (2 * self.shape.width + self.shape.hidden)
        return self.itemsize * max(attention, feed_forward)

    def head(self, tokens: int, rows_per_picture: int) -> int:
        """Return what the head and drawing need most for one picture.

        These are the logits of all rows, then the guided ones, sorted, their probabilities and the
        random numbers.
        """
        guided = max(rows_per_picture + 1, 4)
        return FLOAT32 * self.shape.choices * tokens * guided


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
    plan: RetentionPlan, step: int, geometry: CacheGeometry, pictures: int, own: Activations
) -> StepShares:
    """Return how a step is shared out.

    Args:
      plan: what is kept.
      step: the step.
      geometry: of the batch, on a mesh that of one device.
      pictures: of the batch.
      own: what the model needs.
    """
    tokens = plan.schedule.tokens[step]
    blocks = parts(geometry.rows * block_bytes(plan, step, geometry, own), pictures)
    if any(isinstance(row, OnlineRow) for row in plan.rows):
        blocks = 1  # what they keep, they decide for the whole batch
    heads = parts(pictures * own.head(tokens, geometry.rows // pictures), pictures)
    return StepShares(blocks, heads)


def block_bytes(plan: RetentionPlan, step: int, geometry: CacheGeometry, own: Activations) -> int:
    """Return what a block needs at ``step`` for one batch row, in the layer that needs most."""
    channels = geometry.num_heads * geometry.head_dim
    held = max(_longest(row, step) for row in set(plan.rows))
    return own.block(plan.schedule.tokens[step], held, channels)


def parts(size: int, pictures: int) -> int:
    """Return in how many equal parts pictures should be taken which need ``size`` bytes at once.

    The fewest whose size is at most ``WORK_BYTES``, but none that would be smaller than a quarter
    of it: a batch whose pictures do not share out so evenly is taken in larger parts.
    """
    divisors = [count for count in range(1, pictures + 1) if pictures % count == 0]
    large = [count for count in divisors if count == 1 or 4 * size >= count * WORK_BYTES]
    return next((count for count in large if size <= count * WORK_BYTES), large[-1])


def _longest(row: Row, step: int) -> int:
    """Return the tokens that the head reads which reads most: all heads are padded to it."""
    heads = getattr(row, "heads", (row,))
    return max(int(head.kept_tokens[step]) for head in heads)
