"""What every choice of every block does to the predictions of real pictures, by two gradients.

For every head of every layer, every earlier scale and every way of keeping it, the divergence
KL(full || that cache) is estimated to second order around a cache in force, on real pictures whose
tokens are forced. One pass through the model and two gradients serve all blocks: every layer's
attention takes from the gradient of its output the effect of all its blocks' choices. The first
gradient, of the divergence, gives what is linear (nothing where the cache in force is the full
one). The second is of the log-probability of tokens drawn from the model: its mean square over
pictures is the curvature (the Gauss-Newton, or Fisher matrix).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.attention import QKV, attend
from amskv_jax.calibrate.blocks import Held, Versions, attend_blocks, choice_effects
from amskv_jax.models.guidance import UNGUIDED
from amskv_jax.models.protocol import Model
from amskv_jax.numbers import Numbers
from amskv_jax.schedule import ScaleSchedule


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
        divergence += _apart(found, full)
    ((linear, score),) = jax.vmap(pull_back)(gradients)
    return Effects(linear, score, divergence)


def _apart(found: jax.Array, reference: jax.Array) -> jax.Array:
    """Return the divergence from a reference of one scale's log-probabilities, summed: [B]."""
    apart = jnp.exp(reference) * (reference - found)
    return apart.sum(tuple(range(1, apart.ndim)))


@jax.jit
def divergence(found: list[jax.Array], reference: list[jax.Array]) -> jax.Array:
    """Return the divergence of all scales, [B]."""
    return jnp.stack([_apart(*both) for both in zip(found, reference, strict=True)]).sum(0)


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

            def attention(qkv: QKV) -> tuple[jax.Array, Versions]:
                qkv = qkv._replace(product=None)  # gradients need not keep it
                if not past:
                    output = attend(*qkv[:3], scale, "xla")
                else:
                    held = Held.of(past, choice[step, :, :step])
                    output = attend_blocks(qkv, held, scale)
                    if effect is not None:
                        output = tap(output, effect[step, :, :, :step], qkv, held)
                versions = Versions.of(qkv.key, qkv.value, frame.formats)
                return output.astype(qkv.query.dtype), versions

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
