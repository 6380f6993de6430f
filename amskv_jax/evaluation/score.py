"""How well a model predicts real pictures when its cache keeps what a plan says: a proper score.

Real pictures are turned into codes, and these are forced through the sampler's own cached path,
without guidance. Nothing is drawn: no random numbers, no feature network, no decoder. What a cache
dropped, or rounded, shows as cross-entropy above that of the full cache on the same pictures, and
as divergence from the full cache's distribution.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.decode import encode_pixels
from amskv_jax.drawing import Update, full_batches
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.generate import Sampler, Samples, picture_keys
from amskv_jax.models.guidance import UNGUIDED, Controls
from amskv_jax.models.protocol import Conditions
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.policies.full import Full
from amskv_jax.sampling import TokenSampling
from amskv_jax.schedule import ScaleSchedule


class Mean(NamedTuple):
    """A mean over pictures and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True, eq=False)
class Figure:
    """What was measured of every picture.

    Attributes:
      values: of picture and scale, mean over the scale's tokens, [N, S] float64.
      tokens: of every scale.
    """

    values: np.ndarray
    tokens: tuple[int, ...]

    @property
    def total(self) -> Mean:
        """The mean over all tokens."""
        return _mean(self.values @ np.array(self.tokens) / sum(self.tokens))

    @property
    def scales(self) -> tuple[Mean, ...]:
        """The mean over the tokens of every scale."""
        return tuple(_mean(column) for column in self.values.T)

    def above(self, other: "Figure") -> "Figure":
        """Return the difference to another figure of the same pictures: the error is paired."""
        return Figure(self.values - other.values, self.tokens)

    def times(self, factor: float) -> "Figure":
        """Return the figure in another unit."""
        return Figure(self.values * factor, self.tokens)

    def record(self) -> dict[str, Any]:
        """Return means and errors for JSON."""
        return {**self.total._asdict(), "scales": [scale._asdict() for scale in self.scales]}


@dataclass(frozen=True, eq=False)
class Score:
    """How well real pictures are predicted with one plan's cache, in nats per token.

    Attributes:
      entropy: cross-entropy, -log p(code): what the codes of a token cost together.
      above_full: its difference to the full cache's on the same pictures.
      divergence: Kullback-Leibler divergence KL(full || plan) of the two distributions of a token;
        unlike the difference it is never negative, and does not ask which code was the right one.
      codes: codes per token, 1 in VAR, the number of bits in Infinity.
    """

    entropy: Figure
    above_full: Figure
    divergence: Figure
    codes: int

    def bits(self, figure: Figure) -> Figure:
        """Return a figure in bits per token."""
        return figure.times(1 / math.log(2))

    def bits_per_code(self, figure: Figure) -> Figure:
        """Return a figure in bits per code: bits per bit in Infinity."""
        return self.bits(figure).times(1 / self.codes)

    def record(self) -> dict[str, Any]:
        """Return all figures for JSON: in nats per token, cross-entropy in bits too."""
        return {
            "nats_per_token": self.entropy.record(),
            "bits_per_token": self.bits(self.entropy).record(),
            "bits_per_code": self.bits_per_code(self.entropy).record(),
            "above_full": self.above_full.record(),
            "divergence": self.divergence.record(),
        }


def encode(pipe: Pipeline, pixels: np.ndarray, batch: int) -> np.ndarray:
    """Return the codes of pictures as the model's tokenizer sees them.

    Args:
      pipe: the model.
      pixels: uint8 [N, H, W, 3].
      batch: pictures at once.

    Returns:
      [N, total, *K] integers.

    Raises:
      UsageError: if there are no pictures, or ``batch`` is below 1.
      AmskvError: if they have another size than the model's.
    """
    if len(pixels) < 1 or batch < 1:
        raise UsageError(f"cannot encode {len(pixels)} pictures, {batch} at once: 1 or more each")
    params = {"tokenizer": pipe.params["tokenizer"]}
    parts = []
    for numbers in full_batches(len(pixels), batch):
        codes = encode_pixels(pipe.model, pipe.schedule, params, pixels[numbers])
        parts.append(np.asarray(codes))
    return np.concatenate(parts)[: len(pixels)]


def score(
    pipe: Pipeline,
    plans: Mapping[str, RetentionPlan | Sampler],
    codes: np.ndarray,
    conditions: Conditions,
    *,
    batch: int,
    attention: Implementation = "auto",
    update: Update = lambda what, share: None,
) -> dict[str, Score]:
    """Measure how well pictures are predicted with the caches of plans.

    With the full cache in float32 the cross-entropy is the loss of the trainer,
    ``training.transformer.objective``. The full cache in the pipeline's dtype runs in any case, as
    the others are compared with it. Log-probabilities of one batch, four bytes each, stay on the
    device: its own, and those of one more cache. A program is compiled for every plan; all batches
    have the same shape.

    Args:
      pipe: the model.
      plans: name -> plan, in numbers of the pipeline's ``cache_dtype``; or a sampler of the
        pipeline's, for other numbers: its way of drawing is left aside.
      codes: of the pictures, [N, total, *K] integers: see ``encode``.
      conditions: what the pictures show, one for each.
      batch: pictures at once.
      attention: back end for plans, see ``attention.attend``.
      update: shown the progress.

    Returns:
      Name -> score.

    Raises:
      UsageError: if there are no plans, fewer than two pictures (they have no standard error), or
        ``batch`` is below 1.
      AmskvError: if plans, codes or conditions do not fit the model or each other, or the model's
        predictions are not finite.
    """
    count = len(codes)
    if not plans:
        raise UsageError("no policies to score")
    if count < 2 or batch < 1:
        raise UsageError(
            f"cannot score {count} pictures, {batch} at once: expected two or more, as one has no "
            "standard error, and 1 or more at once"
        )
    if len(conditions) != count:
        raise AmskvError(f"there are {len(conditions)} conditions for {count} pictures")
    if codes.shape[1] != pipe.schedule.total:
        raise AmskvError(
            f"the pictures have {codes.shape[1]} tokens each, the model's scales "
            f"{pipe.schedule.total}"
        )
    full = replace(_forced(pipe.sampler(Full(), attention=attention)), cache_dtype=None)
    samplers = {}
    for name, plan in plans.items():
        given = plan if isinstance(plan, Sampler) else pipe.sampler(plan, attention=attention)
        _check(pipe, name, given)
        samplers[name] = _forced(given)
    names = {full: "the full cache", **{own: name for name, own in samplers.items() if own != full}}
    measured = _measure(pipe, names, codes, conditions, min(batch, count), update)
    per_token = math.prod(codes.shape[2:])
    scores = {}
    for name, sampler in samplers.items():
        entropy, divergence = measured[sampler]
        scores[name] = Score(entropy, entropy.above(measured[full][0]), divergence, per_token)
    return scores


def _measure(
    pipe: Pipeline,
    names: Mapping[Sampler, str],
    codes: np.ndarray,
    conditions: Conditions,
    batch: int,
    update: Update,
) -> dict[Sampler, tuple[Figure, Figure]]:
    """Return cross-entropy, and divergence from the first sampler, of every sampler."""
    count, tokens = len(codes), pipe.schedule.tokens
    parts: dict[Sampler, list[tuple[np.ndarray, np.ndarray]]] = {own: [] for own in names}
    batches = full_batches(count, batch)
    for number, numbers in enumerate(batches):
        condition, true = conditions.batch(numbers), codes[numbers]
        reference = None
        for done, (sampler, name) in enumerate(names.items()):
            update(f"scoring {name}", (number + done / len(names)) / len(batches))
            found = _log_probabilities(sampler, pipe.params, condition, true)
            reference = found if reference is None else reference
            parts[sampler].append(jax.device_get(_figures(pipe.schedule, found, reference, true)))
            del found  # before the next one needs the memory
    measured = {}
    for sampler, name in names.items():
        values = [np.concatenate(own)[:count] for own in zip(*parts[sampler], strict=True)]
        if not np.isfinite(values).all():
            raise AmskvError(
                f"predictions with {name} are not finite: are weights damaged, or codes beyond the "
                "codebook?"
            )
        entropy, divergence = (Figure(value.astype(np.float64), tokens) for value in values)
        measured[sampler] = entropy, divergence
    return measured


def _forced(sampler: Sampler) -> Sampler:
    """Return a sampler without guidance; greedy, as what it draws is thrown away."""
    greedy = TokenSampling(top_k=1)
    return replace(sampler, guidance=UNGUIDED, sampling=greedy, trace=True, observe=None)


def _check(pipe: Pipeline, name: str, sampler: Sampler) -> None:
    """Raise an AmskvError unless the sampler belongs to the pipeline."""
    if sampler.plan.schedule != pipe.schedule:
        raise AmskvError(
            f"the scales of {name} are {sampler.plan.schedule}, the model's {pipe.schedule}"
        )
    if (sampler.model, sampler.dtype) != (pipe.model, pipe.dtype):
        raise AmskvError(
            f"the sampler of {name} is of another model or dtype: expected {pipe.dtype}"
        )


def _log_probabilities(
    sampler: Sampler, params: Any, condition: Any, codes: np.ndarray
) -> jax.Array:
    """Return what the model says of every code after the true ones, [B, total, *K, V] float32.

    Not one program with the sampler's: inside another it would be compiled without its options.
    """
    ones = jnp.ones(sampler.plan.schedule.num_scales)
    controls = Controls(strength=ones, temperature=ones, forced=jnp.asarray(codes, jnp.int32))
    keys = picture_keys(jax.random.key(0), len(codes))
    samples: Samples = sampler(params, condition, keys, controls)
    assert samples.logits is not None, "the sampler traces"
    return _normalised(samples.logits)


@partial(jax.jit, donate_argnums=0)
def _normalised(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits)


@partial(jax.jit, static_argnums=0)
def _figures(
    schedule: ScaleSchedule, found: jax.Array, reference: jax.Array, codes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the cross-entropy of codes, and the divergence from a reference.

    Args:
      schedule: the scales.
      found: log-probabilities, [B, total, *K, V].
      reference: likewise.
      codes: [B, total, *K] integers.

    Returns:
      [B, S] float32 each.
    """
    true = codes.astype(jnp.int32)[..., None]
    entropy = -jnp.take_along_axis(found, true, axis=-1)[..., 0]
    divergence = (jnp.exp(reference) * (reference - found)).sum(-1)
    return _per_scale(entropy, schedule), _per_scale(divergence, schedule)


def _per_scale(values: jax.Array, schedule: ScaleSchedule) -> jax.Array:
    """Sum over the codes of a token [B, total, *K], average over the tokens of a scale: [B, S]."""
    tokens = values.reshape(*values.shape[:2], -1).sum(-1)
    means = [tokens[:, schedule.slice(i)].mean(1) for i in range(schedule.num_scales)]
    return jnp.stack(means, axis=1)


def _mean(values: np.ndarray) -> Mean:
    error = values.std(ddof=1) / math.sqrt(len(values))
    return Mean(float(values.mean()), float(error))
