"""What every block of the cache is worth: the damage of losing or rounding it, in nats a token.

Estimated around the full cache, and around caches which are planned by that: see ``effects``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from amskv_jax.calibrate.effects import Effects, Frame, divergence, effects, predictions
from amskv_jax.drawing import Update, full_batches
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.generate import picture_keys
from amskv_jax.models.protocol import Conditions
from amskv_jax.numbers import numbers_of
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.damage import BlockDamage, DamageRound
from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.mixed import MixedRow
from amskv_jax.policies.optimal import allot_rows, plan_lives
from amskv_jax.precision import FLOAT8
from amskv_jax.schedule import ScaleSchedule

FORMATS = ("bfloat16", "int8", "int4", "int3", "int2", "int1")
"""Formats that are offered, the most exact first."""


class Base(NamedTuple):
    """A cache around which damage is measured once more, as blocks act together.

    Attributes:
      saving: share of a bfloat16 cache of all scales.
      formats: in which its blocks are kept, as they are worth it; None for all that are offered.
    """

    saving: float
    formats: tuple[str, ...] | None = None


BASES = (Base(0.75), Base(0.85), Base(0.9), Base(0.95), Base(0.975))
"""The bases if none are given."""


def measure_damage(
    pipe: Pipeline,
    codes: np.ndarray,
    conditions: Conditions,
    *,
    batch: int,
    formats: Sequence[str] = FORMATS,
    bases: Sequence[Base] = BASES,
    seed: int = 0,
    update: Update = lambda what, share: None,
) -> BlockDamage:
    """Measure what the choice of every block does to the prediction of real pictures.

    The first round is around the full cache in the first format. For each base a plan is made by
    every round so far, the one whose predictions diverge least is taken, and a round measured
    around it. A small cache is not always planned best by what was measured around one as small:
    much that is true of the full cache holds there no longer. Two programs are compiled, whatever
    the number of rounds.

    Args:
      pipe: the model.
      codes: of the pictures, [N, total, *K] integers: see ``evaluation.score.encode``. They should
        not be those which are scored later.
      conditions: what the pictures show, one for each.
      batch: pictures at once.
      formats: in which a block may be kept, names of ``numbers.NUMBERS``, the most exact first.
      bases: of further rounds, in this order.
      seed: of the tokens that are drawn for the curvature.
      update: shown the progress.

    Raises:
      UsageError: if there are no pictures, ``batch`` is below 1, a format is unknown or a base's is
        not offered, or products are in float8.
      AmskvError: if pictures do not fit the model, or its predictions are not finite.
    """
    count = len(codes)
    if count < 1 or batch < 1:
        raise UsageError(f"cannot measure {count} pictures, {batch} at once: 1 or more each")
    if not formats:
        raise UsageError("no formats in which blocks may be kept")
    if pipe.dtype in FLOAT8:
        raise UsageError("float8 products have no gradient: load the model in bfloat16")
    if len(conditions) != count or codes.shape[1] != pipe.schedule.total:
        raise AmskvError(
            f"there are {len(conditions)} conditions for {count} pictures of {codes.shape[1]} "
            f"tokens, the model's scales have {pipe.schedule.total}"
        )
    frame = Frame(pipe.model, pipe.schedule, pipe.dtype, tuple(map(numbers_of, formats)))
    for names in (base.formats for base in bases if base.formats is not None):
        BlockDamage(tuple(formats), (), count).of_formats(names)
    shape = pipe.shape
    geometry = CacheGeometry(1, shape.num_heads, shape.head_dim, frame.formats[0])
    everything = geometry.bytes(shape.num_heads * shape.num_layers * shape.schedule.offsets[-2])
    scales = pipe.schedule.num_scales
    whole = np.ones((shape.num_layers, scales, shape.num_heads, scales), np.int32)
    keys = picture_keys(jax.random.key(seed), count)
    rounds: list[DamageRound] = []
    batch = min(batch, count)

    def batches(done: float) -> Iterator[tuple[np.ndarray, int, Any, list[jax.Array]]]:
        """Yield numbers, how many of them are new, inputs, and what the full cache predicts."""
        for numbers in full_batches(count, batch):
            share = (done + numbers[0] / count / 2) / (1 + len(bases))
            update(f"measuring round {len(rounds) + 1} of {1 + len(bases)}", share)
            inputs = conditions.batch(numbers), codes[numbers]
            reference = predictions(frame, pipe.params, *inputs, whole)
            yield numbers, min(batch, count - int(numbers[0])), inputs, reference

    for number, base in enumerate((None, *bases)):
        known = BlockDamage(tuple(formats), tuple(rounds), count)
        plans, row_bytes, own = _plans(pipe, known, base) if base else ([whole], everything, ())
        apart = np.zeros(len(plans))
        for _, new, inputs, reference in batches(number) if len(plans) > 1 else ():
            for index, choices in enumerate(plans):
                found = predictions(frame, pipe.params, *inputs, choices)
                apart[index] += float(divergence(found, reference)[:new].sum())
        best = int(apart.argmin())
        sums = _Sums(shape.schedule)
        for numbers, new, inputs, reference in batches(number + 0.5):
            around = keys[numbers], plans[best], reference
            sums.add(jax.device_get(effects(frame, pipe.params, *inputs, *around)), new)
        damage, far = sums.means()
        rounds.append(DamageRound(damage, row_bytes, far, own, best))
    return BlockDamage(tuple(formats), tuple(rounds), count)


def _plans(
    pipe: Pipeline, known: BlockDamage, base: Base
) -> tuple[list[np.ndarray], int, tuple[str, ...]]:
    """Return what the damage of every round makes of a base, its bytes a row, and its formats.

    Plans are choices of every block at every step, see ``predictions``.
    """
    shape, schedule = pipe.shape, pipe.schedule
    whole = CacheGeometry(1, shape.num_heads, shape.head_dim)
    everything = whole.bytes(shape.num_heads * shape.num_layers * schedule.total)
    budget = int(everything * (1 - base.saving))
    own = known if base.formats is None else known.of_formats(base.formats)
    rows = [allot_rows(shape, own.formats, around, budget)[0] for around in own.rounds]
    return [block_choices(x, schedule, known.formats) for x in rows], budget, own.formats


def block_choices(
    rows: Sequence[MixedRow], schedule: ScaleSchedule, formats: Sequence[str]
) -> np.ndarray:
    """Return the choice of every block at every step, see ``predictions``."""
    format_of, stop = plan_lives(rows, schedule, tuple(formats))
    steps = np.arange(schedule.num_scales)[:, None, None]
    read = (steps > np.arange(schedule.num_scales - 1)) & (steps < stop[:, None])
    choices = np.where(read, 1 + np.maximum(format_of, 0)[:, None], 0)
    return np.pad(choices, ((0, 0), (0, 0), (0, 0), (0, 1))).astype(np.int32)


class _Sums:
    """Sums over pictures of what choices do, in float64."""

    def __init__(self, schedule: ScaleSchedule) -> None:
        self.schedule = schedule
        self.linear: Any = 0.0
        self.curvature: Any = 0.0
        self.divergence, self.count = 0.0, 0

    def add(self, found: Effects, real: int) -> None:
        """Add the first ``real`` pictures of a batch."""
        both = (np.asarray(x)[:, :, :real] for x in (found.linear, found.score))
        linear, score = map(self._outcomes, both)
        self.linear = self.linear + linear.sum(-1)
        self.curvature = self.curvature + (score**2).sum(-1)
        self.divergence += float(found.divergence[:real].sum())
        self.count += real

    def means(self) -> tuple[np.ndarray, float]:
        """Return damage and divergence per token; raises AmskvError if they are not finite."""
        if not np.isfinite(self.divergence):
            raise AmskvError(
                "predictions are not finite: are weights damaged, or codes beyond the codebook?"
            )
        per_token = self.count * self.schedule.total
        damage = (self.curvature / 2 - self.linear) / per_token
        return damage.astype(np.float32), self.divergence / per_token

    def _outcomes(self, effects: np.ndarray) -> np.ndarray:
        """Return what a block does that is kept in a format until a step.

        Args:
          effects: see ``Effects``.

        Returns:
          [layers, heads, S - 1, formats, S + 1, B] float64; NaN up to the block's own step.
        """
        scales = self.schedule.num_scales
        by_picture = np.moveaxis(effects.astype(np.float64), 2, -1)[:, :, :, : scales - 1]
        steps = by_picture.transpose(0, 2, 3, 4, 1, 5)  # layers, heads, source, choice, step, B
        until = np.zeros((*steps.shape[:4], scales + 1, steps.shape[5]))
        np.cumsum(steps, axis=4, out=until[..., 1:, :])
        gone, kept = until[:, :, :, :1], until[:, :, :, 1:]
        outcomes: np.ndarray = kept + gone[..., -1:, :] - gone
        for source in range(scales - 1):
            outcomes[:, :, source, :, : source + 1] = np.nan
        return outcomes
