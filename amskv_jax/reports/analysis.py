"""What calibration says about a model: which layers are cache-demanding, and all its numbers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.damage import BlockDamage
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.ams import AMSKV, Classes
from amskv_jax.policies.heads import head_mass
from amskv_jax.words import number_ranges

SHOWN_LAYERS = 5
"""Layers that get a panel of their own in the figures if none are asked for."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """Statistics, and what a policy makes of them.

    Attributes:
      stats: the statistics.
      policy: which layers are demanding, and what they keep.

    Raises:
      AmskvError: if the model has a single scale, so that there is nothing to keep.
    """

    stats: LayerStats
    policy: AMSKV = AMSKV()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if self.stats.schedule.num_scales == 1:
            raise AmskvError("the model has one scale only: there is no earlier one to attend to")

    @cached_property
    def classes(self) -> Classes:
        """Which layers are cache-demanding, and why."""
        return self.policy.classify(self.stats)

    @cached_property
    def plan(self) -> RetentionPlan:
        """What every layer keeps."""
        return self.policy.plan(self.stats.shape, self.stats)

    @cached_property
    def head_mass(self) -> np.ndarray:
        """Attention of every head to every earlier scale, see ``policies.heads.head_mass``."""
        return head_mass(self.stats.head_density)

    def chosen_layers(self, layers: Sequence[int] | None = None) -> list[int]:
        """Return the layers to show apart: ``layers``, or some from the first to the last.

        Raises:
          UsageError: if a layer does not exist.
        """
        count = self.stats.num_layers
        if layers is None:
            spread = np.linspace(0, count - 1, min(count, SHOWN_LAYERS)).round().astype(int)
            return spread.tolist()
        unknown = number_ranges(layer for layer in layers if not 0 <= layer < count)
        if unknown or not layers:
            raise UsageError(
                f"cannot show layers {unknown or 'none'}: the model has layers 0-{count - 1}"
            )
        return list(layers)

    def tables(self) -> dict[str, tuple[list[str], Iterable[Sequence[Any]]]]:
        """Return all numbers behind the figures: name -> head and rows of a table."""
        tables: dict[str, tuple[list[str], Iterable[Sequence[Any]]]] = {
            "density": (
                ["layer", "target_scale", "source_scale", "probability"],
                _entries(self.stats.density),
            ),
            "heads": (
                ["layer", "head", "target_scale", "source_scale", "probability"],
                _entries(self.stats.head_density),
            ),
            "similarity": (
                ["layer", "scale", "similarity", "cosine", "overflows"],
                self._similarities(),
            ),
            "layers": (
                ["layer", "lowest_similarity", "theta", "demanding", "expands_at", "capacity"],
                self._layers(),
            ),
            "kept_tokens": (
                ["layer", "step", "kept_tokens", "earlier_tokens"],
                self._kept_tokens(),
            ),
        }
        if self.stats.damage is not None:
            head = ["layer", "head", "scale", "numbers", "nats_per_token"]
            tables["damage"] = head, self._damage(self.stats.damage)
        return tables

    def _damage(self, damage: BlockDamage) -> Iterator[Sequence[Any]]:
        """Yield what the loss of every block, and its rounding, does to the full cache."""
        for layer, head, scale in np.ndindex(damage.rounds[0].damage.shape[:3]):
            block = damage.rounds[0].damage[layer, head, scale]
            yield layer, head, scale, "", float(block[0, scale + 1])
            for name, kept in zip(damage.formats, block[:, -1], strict=True):
                yield layer, head, scale, name, float(kept)

    def _similarities(self) -> Iterator[Sequence[Any]]:
        """Yield rows; the last scale is read by nobody, so that it needs no room."""
        stats = self.stats
        for layer, scale in np.ndindex(stats.similarity.shape):
            if scale:
                values = float(stats.similarity[layer, scale]), float(stats.cosine[layer, scale])
                yield layer, scale, *values, int(scale in self.classes.overflows)

    def _layers(self) -> Iterator[Sequence[Any]]:
        classes = self.classes
        for layer, row in enumerate(self.plan.rows):
            expands_at = classes.expansions[layer]
            yield (
                layer,
                float(classes.lowest[layer]),
                classes.theta,
                int(expands_at is not None),
                "" if expands_at is None else expands_at,
                row.capacity,
            )

    def _kept_tokens(self) -> Iterator[Sequence[Any]]:
        offsets = self.stats.schedule.offsets
        for layer, row in enumerate(self.plan.rows):
            for step, tokens in enumerate(row.kept_tokens):
                yield layer, step, tokens, offsets[step]


def plan_blocks(plan: RetentionPlan, num_heads: int) -> tuple[list[str], Iterable[Sequence[Any]]]:
    """Return head and rows of a table of all blocks that a plan keeps, one scale in one head each.

    ``share`` is the most of its tokens that any step reads, ``last_step`` the last that reads some
    of them; both are empty where that is decided while drawing. ``numbers`` is empty for the
    format of the whole cache.
    """
    head = ["layer", "head", "scale", "tokens", "numbers", "share", "last_step"]
    return head, _blocks(plan, num_heads)


def _blocks(plan: RetentionPlan, num_heads: int) -> Iterator[Sequence[Any]]:
    for layer, row in enumerate(plan.rows):
        for numbers, part in row.parts:
            for head, shares in enumerate(part.head_shares(plan.schedule, num_heads)):
                for scale, read in enumerate(shares):
                    block = layer, head, scale, plan.schedule.tokens[scale], numbers or ""
                    if np.isnan(read).any():
                        yield *block, "", ""
                    elif read.any():
                        yield *block, float(read.max()), int(np.flatnonzero(read)[-1])


def _entries(array: np.ndarray) -> Iterator[Sequence[Any]]:
    """Yield indices and value of what is not in the future: [..., target scale, source scale]."""
    for index, value in np.ndenumerate(array):
        if index[-1] <= index[-2]:
            yield *index, float(value)
