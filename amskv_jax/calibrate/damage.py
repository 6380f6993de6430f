"""What every block of the cache is worth: the damage of losing or rounding it, in nats a token.

For every head of every layer, every earlier scale and every way of keeping it (a format, up to a
step), the divergence KL(full || that cache) is estimated to second order around a cache in force,
on real pictures whose tokens are forced. Three passes through the model serve all blocks: one
forward, and two backward from the logits, of which every layer's attention takes the effect of all
its blocks' choices. The first, of the divergence itself, gives what is linear (nothing where the
cache in force is the full one). The second is of the log-probability of tokens drawn from the
model: its mean square over pictures is the curvature (the Gauss-Newton, or Fisher matrix).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.attention import QKV, attend
from amskv_jax.calibrate.blocks import Held, Versions, attend_blocks, choice_effects
from amskv_jax.generate import picture_keys
from amskv_jax.models.guidance import UNGUIDED
from amskv_jax.models.protocol import Conditions, Prepared, Tokenizer, Transformer
from amskv_jax.numbers import NUMBERS, Numbers
from amskv_jax.pipeline import Pipeline
from amskv_jax.schedule import ScaleSchedule


def forced_inputs(
    transformer: Transformer, tokenizer: Tokenizer, codes: jax.Array, schedule: ScaleSchedule
) -> list[jax.Array]:
    """Return the inputs of all scales but the first, given the true codes of those before."""
    latent = jnp.zeros((len(codes), *tokenizer.latent_shape), jnp.float32)
    inputs = []
    for step in range(schedule.num_scales - 1):
        entries = tokenizer.embed(codes[:, schedule.slice(step)])
        latent = tokenizer.accumulate(latent, entries, step)
        features = tokenizer.next_input(latent, step)
        inputs.append(transformer.next_input(features, step + 1))
    return inputs


def logits_of(
    transformer: Transformer,
    prepared: Prepared,
    inputs: Sequence[jax.Array],
    choices: jax.Array,
    effects: jax.Array,
    formats: Sequence[Numbers],
) -> list[jax.Array]:
    """Return the logits of every scale, given its input and the caches that choices make.

    Args:
      transformer: the model.
      prepared: of B conditions, without guidance.
      inputs: of every scale, [B, T_i, D].
      choices: of every block at every step, [layers, S, heads, S] int32: (layer, step, head, source).
      effects: zeros [layers, S, B, heads, S, 1 + formats]; the derivative by them is how what is
        differentiated changes with the choice of every block, see ``choice_effects``.
      formats: of the choices 1, 2, ...

    Returns:
      [B, T_i, *K, V] float32 each.
    """
    scale = transformer.attention_scale
    tap = _tap(scale)
    history: list[Versions] = []
    logits = []
    for step, start in enumerate(inputs):

        def body(x: jax.Array, layer: Any, step: int = step) -> tuple[jax.Array, Any]:
            own, past, choice, effect = layer

            def attention(
                query: jax.Array, key: jax.Array, value: jax.Array
            ) -> tuple[jax.Array, Any]:
                qkv = query, key, value
                if not past:
                    output = attend(*qkv, scale, "xla")
                else:
                    held = Held.of(past, choice[step, :, :step])
                    output = attend_blocks(qkv, held, scale)
                    output = tap(output, effect[step, :, :, :step], qkv, held)
                return output.astype(query.dtype), Versions.of(key, value, formats)

            return transformer.block(own, prepared.shared, x, step, attention)

        layers = prepared.layers, tuple(history), choices, effects
        x, own = lax.scan(jax.checkpoint(body), start, layers)
        history.append(own)
        logits.append(transformer.logits(x, prepared.shared))
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


@partial(jax.jit, static_argnums=(0, 1))
def batch_effects(
    pipe_parts: Any,
    formats: tuple[Numbers, ...],
    params: Any,
    condition: Any,
    codes: jax.Array,
    keys: jax.Array,
    choices: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    model, schedule, dtype = pipe_parts
    transformer, tokenizer = model.bind(params, schedule, dtype)
    prepared = transformer.prepare(condition, UNGUIDED)
    later = forced_inputs(transformer, tokenizer, codes, schedule)
    inputs = [prepared.start, *later]
    layers, scales, heads, _ = choices.shape
    zeros = jnp.zeros((layers, scales, len(codes), heads, scales, 1 + len(formats)))
    run = partial(logits_of, transformer, prepared, inputs, formats=formats)
    whole = run(jnp.ones_like(choices), zeros)
    found, back = jax.vjp(lambda effects: run(choices, effects), zeros)
    cots = []
    for step, (a, b) in enumerate(zip(whole, found)):
        step_keys = jax.vmap(partial(jax.random.fold_in, data=step))(keys)
        token = jax.vmap(lambda k, l: jax.random.categorical(k, l))(step_keys, b)
        p = jax.nn.softmax(b)
        cots.append(jnp.stack([jax.nn.softmax(a) - p, jax.nn.one_hot(token, b.shape[-1]) - p]))
    (both,) = jax.vmap(back)(cots)
    kl = sum(
        (jax.nn.softmax(a) * (jax.nn.log_softmax(a) - jax.nn.log_softmax(b))).reshape(len(codes), -1).sum(-1)
        for a, b in zip(whole, found)
    )
    return both[0], both[1], kl
