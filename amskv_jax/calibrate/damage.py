"""What every block of the cache is worth: the damage of losing or rounding it, in nats a token.

For every head of every layer, every earlier scale and every way of keeping it (a format, until a
step), the divergence KL(full || that cache) is estimated to second order around a cache in force,
on real pictures whose tokens are forced. One pass through the model and two gradients serve all
blocks: every layer's attention takes from the gradient of its output the effect of all its blocks'
choices. The first gradient, of the divergence, gives what is linear (nothing where the cache in
force is the full one). The second is of the log-probability of tokens drawn from the model: its
mean square over pictures is the curvature (the Gauss-Newton, or Fisher matrix).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.attention import QKV, attend
from amskv_jax.calibrate.blocks import Held, Versions, attend_blocks, choice_effects
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.generate import picture_keys
from amskv_jax.models.guidance import UNGUIDED
from amskv_jax.models.protocol import Conditions, Model
from amskv_jax.numbers import Numbers, numbers_of
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.damage import BlockDamage, DamageRound
from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.mixed import MixedRow
from amskv_jax.policies.optimal import allot_rows, plan_lives
from amskv_jax.precision import FLOAT8
from amskv_jax.schedule import ScaleSchedule

FORMATS = ("bfloat16", "int8", "int4", "int3", "int2", "int1")
"""Formats that are offered, the most exact first."""
SAVINGS = (0.85, 0.9, 0.95, 0.975)
"""Savings around whose plans damage is measured once more, as blocks act together."""

Update = Callable[[str, float], object]
"""Takes what is being done and the share that is done."""


class Frame(NamedTuple):
    """What does not change while damage is measured; static.

    Attributes:
      model: the model's shape.
      schedule: what is drawn.
      dtype: of products.
      formats: in which a block may be kept.
    """

    model: Model
    schedule: ScaleSchedule
    dtype: str
    formats: tuple[Numbers, ...]


class Effects(NamedTuple):
    """What one batch shows.

    Attributes:
      linear: how the divergence falls with every choice, to first order,
        [layers, S, B, heads, S, 1 + formats]: (layer, step, picture, head, source, choice).
      score: likewise how the log-probability of drawn tokens grows.
      divergence: of the cache in force from the full one, summed over tokens, [B].
    """

    linear: jax.Array
    score: jax.Array
    divergence: jax.Array


def measure_damage(
    pipe: Pipeline,
    codes: np.ndarray,
    conditions: Conditions,
    *,
    batch: int,
    formats: Sequence[str] = FORMATS,
    savings: Sequence[float] = SAVINGS,
    seed: int = 0,
    update: Update = lambda what, share: None,
) -> BlockDamage:
    """Measure what the choice of every block does to the prediction of real pictures.

    The first round is around the full cache in the first format. For each saving, the best plan
    that all rounds so far know is made, and a round measured around it. Two programs are compiled,
    whatever the number of rounds.

    Args:
      pipe: the model.
      codes: of the pictures, [N, total, *K] integers: see ``evaluation.score.encode``. They should
        not be those which are scored later.
      conditions: what the pictures show, one for each.
      batch: pictures at once.
      formats: in which a block may be kept, names of ``numbers.NUMBERS``, the most exact first.
      savings: shares of a bfloat16 cache of all scales.
      seed: of the tokens that are drawn for the curvature.
      update: shown the progress.

    Raises:
      UsageError: if there are no pictures, ``batch`` is below 1, a format is unknown, or products
        are in float8.
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
    shape = pipe.shape
    geometry = CacheGeometry(1, shape.num_heads, shape.head_dim, frame.formats[0])
    everything = geometry.bytes(shape.num_heads * shape.num_layers * shape.schedule.offsets[-2])
    scales = pipe.schedule.num_scales
    whole = np.ones((shape.num_layers, scales, shape.num_heads, scales), np.int32)
    keys = picture_keys(jax.random.key(seed), count)
    rounds: list[DamageRound] = []
    batch = min(batch, count)
    for number in range(1 + len(savings)):
        choices, row_bytes = whole, everything
        if number:
            known = BlockDamage(tuple(formats), tuple(rounds), count)
            choices, row_bytes = _base(pipe, known, savings[number - 1])
        sums = _Sums(shape.schedule)
        for start in range(0, count, batch):
            what = f"measuring round {number + 1} of {1 + len(savings)}"
            update(what, (number + start / count) / (1 + len(savings)))
            numbers = np.arange(start, start + batch) % count
            inputs = conditions.batch(numbers), codes[numbers]
            reference = predictions(frame, pipe.params, *inputs, whole)
            found = effects(frame, pipe.params, *inputs, keys[numbers], choices, reference)
            sums.add(jax.device_get(found), min(batch, count - start))
        rounds.append(sums.round(row_bytes))
    return BlockDamage(tuple(formats), tuple(rounds), count)


def _base(pipe: Pipeline, known: BlockDamage, saving: float) -> tuple[np.ndarray, int]:
    """Return the choices of the best plan known that saves so much, and its bytes a row."""
    shape, schedule = pipe.shape, pipe.schedule
    whole = CacheGeometry(1, shape.num_heads, shape.head_dim)
    budget = int(whole.bytes(shape.num_heads * shape.num_layers * schedule.total) * (1 - saving))
    rows, _ = allot_rows(shape, known.formats, known.nearest(budget), budget)
    return block_choices(rows, schedule, known.formats), budget


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

    def round(self, row_bytes: int) -> DamageRound:
        """Return the means, per token; raises AmskvError if they are not finite."""
        if not np.isfinite(self.divergence):
            raise AmskvError(
                "predictions are not finite: are weights damaged, or codes beyond the codebook?"
            )
        per_token = self.count * self.schedule.total
        damage = (self.curvature / 2 - self.linear) / per_token
        return DamageRound(damage.astype(np.float32), row_bytes, self.divergence / per_token)

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


@partial(jax.jit, static_argnums=0)
def predictions(
    frame: Frame, params: Any, condition: Any, codes: jax.Array, choices: jax.Array
) -> list[jax.Array]:
    """Return log-probabilities of every scale [B, T_i, *K, V], with the caches of choices.

    Args:
      frame: see the class.
      params: the weights.
      condition: of B pictures.
      codes: of them, [B, total, *K]: those of earlier scales are given.
      choices: of every block at every step, [layers, S, heads, S] int32: (layer, step, head,
        source); the same for all pictures.
    """
    logits = _logits(frame, params, condition, codes, choices, None)
    return [jax.nn.log_softmax(x) for x in logits]


@partial(jax.jit, static_argnums=0)
def effects(
    frame: Frame,
    params: Any,
    condition: Any,
    codes: jax.Array,
    keys: jax.Array,
    choices: jax.Array,
    reference: list[jax.Array],
) -> Effects:
    """Return what every other choice than those in force would do.

    Args:
      frame: see the class.
      params: see ``predictions``, as the next three.
      condition: ...
      codes: ...
      keys: of the tokens that are drawn, [B].
      choices: see ``predictions``.
      reference: what ``predictions`` returned for the full cache.
    """
    layers, scales, heads, _ = choices.shape
    zeros = jnp.zeros((layers, scales, len(codes), heads, scales, 1 + len(frame.formats)))
    run = partial(_logits, frame, params, condition, codes, choices)
    logits, pull_back = jax.vjp(run, zeros)
    gradients, divergence = [], jnp.zeros(len(codes))
    for step, (own, full) in enumerate(zip(logits, reference, strict=True)):
        found = jax.nn.log_softmax(own)
        step_keys = jax.vmap(partial(jax.random.fold_in, data=step))(keys)
        drawn = jax.nn.one_hot(jax.vmap(jax.random.categorical)(step_keys, own), own.shape[-1])
        gradients.append(jnp.stack([jnp.exp(full), drawn]) - jnp.exp(found)[None])
        apart = jnp.exp(full) * (full - found)
        divergence += apart.sum(tuple(range(1, apart.ndim)))
    ((linear, score),) = jax.vmap(pull_back)(gradients)
    return Effects(linear, score, divergence)


def _logits(
    frame: Frame,
    params: Any,
    condition: Any,
    codes: jax.Array,
    choices: jax.Array,
    effects: jax.Array | None,
) -> list[jax.Array]:
    """Return the logits of every scale, given true codes and the caches that choices make.

    ``effects`` are zeros [layers, S, B, heads, S, 1 + formats]: the derivative by them is how what
    is differentiated changes with the choice of every block, see ``choice_effects``.
    """
    schedule = frame.schedule
    transformer, tokenizer = frame.model.bind(params, schedule, frame.dtype)
    prepared = transformer.prepare(condition, UNGUIDED)
    scale = transformer.attention_scale
    tap = _tap(scale)
    latent = jnp.zeros((len(codes), *tokenizer.latent_shape), jnp.float32)
    history: list[Versions] = []
    logits = []
    x = prepared.start
    for step in range(schedule.num_scales):

        def body(x: jax.Array, layer: Any, step: int = step) -> tuple[jax.Array, Versions]:
            own, past, choice, effect = layer

            def attention(
                query: jax.Array, key: jax.Array, value: jax.Array
            ) -> tuple[jax.Array, Versions]:
                qkv = query, key, value
                if not past:
                    output = attend(*qkv, scale, "xla")
                else:
                    held = Held.of(past, choice[step, :, :step])
                    output = attend_blocks(qkv, held, scale)
                    if effect is not None:
                        output = tap(output, effect[step, :, :, :step], qkv, held)
                return output.astype(query.dtype), Versions.of(key, value, frame.formats)

            result: tuple[jax.Array, Versions] = transformer.block(
                own, prepared.shared, x, step, attention
            )
            return result

        layers = prepared.layers, tuple(history), choices, effects
        x, own = lax.scan(jax.checkpoint(body), x, layers)
        history.append(own)
        logits.append(transformer.logits(x, prepared.shared))
        if step + 1 < schedule.num_scales:
            entries = tokenizer.embed(codes[:, schedule.slice(step)].astype(jnp.int32))
            latent = tokenizer.accumulate(latent, entries, step)
            features = tokenizer.next_input(latent, step)
            x = transformer.next_input(features, step + 1)
    return logits


def _tap(scale: float) -> Callable[..., jax.Array]:
    """Return the identity of an attention's output, from whose gradient that of effects is made."""

    @jax.custom_vjp
    def tap(output: jax.Array, effect: jax.Array, qkv: QKV, held: Held) -> jax.Array:
        return output

    def forward(output: jax.Array, effect: jax.Array, qkv: QKV, held: Held) -> Any:
        return output, (qkv, held)

    def backward(kept: tuple[QKV, Held], gradient: jax.Array) -> Any:
        nothing = jax.tree.map(_no_gradient, kept)
        return gradient, choice_effects(gradient, *kept, scale), *nothing

    tap.defvjp(forward, backward)
    return tap


def _no_gradient(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.integer):
        return np.zeros(x.shape, jax.dtypes.float0)
    return jnp.zeros_like(x)
