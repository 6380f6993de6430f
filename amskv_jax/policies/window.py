"""Sliding window and attention sink: the token-level baselines."""

from dataclasses import dataclass, replace

import numpy as np

from amskv_jax.errors import UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import StaticRow
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import Policy, default_budget
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class Window(Policy):
    """Keeps the latest tokens of the sequence (sliding window attention, arXiv 2004.05150).

    Attributes:
      window: tokens before the current scale; default: the mean budget of the default AMS-KV plan.

    Raises:
      UsageError: if it is negative.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 0:
            raise UsageError(f"the window must be 0 or more tokens, not {self.window}")

    def with_budget(self, tokens: int, shape: CacheShape) -> Policy:
        """Return this policy with a budget; see ``Budgeted.with_budget``."""
        return replace(self, window=tokens)

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        window = default_budget(shape) if self.window is None else self.window
        row = _first_and_recent(shape.schedule, 0, window)
        note = f"sliding window of {window} tokens"
        return RetentionPlan(shape.schedule, (row,) * shape.num_layers, note)


@dataclass(frozen=True)
class Sink(Policy):
    """Keeps the first and the latest tokens (attention sink, StreamingLLM, arXiv 2309.17453).

    Attributes:
      sink: tokens at the start of the sequence.
      window: latest tokens; default: what the default AMS-KV plan leaves beside the sink.

    Raises:
      UsageError: if a number is negative.
    """

    sink: int = 5
    window: int | None = None

    def __post_init__(self) -> None:
        for name, tokens in (("sink", self.sink), ("window", self.window)):
            if tokens is not None and tokens < 0:
                raise UsageError(f"the {name} must be 0 or more tokens, not {tokens}")

    def with_budget(self, tokens: int, shape: CacheShape) -> Policy:
        """Return this policy with a budget; see ``Budgeted.with_budget``."""
        return replace(self, window=max(0, tokens - self.sink))

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        rest = max(0, default_budget(shape) - self.sink)
        window = rest if self.window is None else self.window
        row = _first_and_recent(shape.schedule, self.sink, window)
        note = f"attention sink of {self.sink} tokens, window of {window}"
        return RetentionPlan(shape.schedule, (row,) * shape.num_layers, note)


def _first_and_recent(schedule: ScaleSchedule, first: int, recent: int) -> StaticRow:
    position = np.arange(schedule.total)
    return StaticRow.from_positions(
        schedule,
        [
            (position < offset) & ((position < first) | (position >= offset - recent))
            for offset in schedule.offsets[:-1]
        ],
    )
