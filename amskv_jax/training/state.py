"""What a training run carries from step to step, and how the optimiser changes it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from amskv_jax.training.config import Optimization, Run


@struct.dataclass
class TrainState:
    """State of a run; a pytree.

    Attributes:
      step: steps made so far, int32.
      params: weights, float32.
      ema: exponential moving average of the weights, float32: the run's result.
      optimizer: state of the optimiser.
      extra: what else the trained model's steps need.
    """

    step: jax.Array
    params: Any
    ema: Any
    optimizer: Any
    extra: Any


def learning_rate(optimization: Optimization, steps: int) -> optax.Schedule:
    """Return the rate by step: linear from 0, then half a cosine down to the final share."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optimization.learning_rate,
        warmup_steps=optimization.warmup_steps,
        decay_steps=max(steps, optimization.warmup_steps + 1),
        end_value=optimization.learning_rate * optimization.final_share,
    )


def make_optimizer(optimization: Optimization, steps: int) -> optax.GradientTransformation:
    """Return the optimiser, with weight decay on kernels alone, after clipping."""
    rate, decay = learning_rate(optimization, steps), optimization.weight_decay
    beta1, beta2 = optimization.beta1, optimization.beta2
    if optimization.method == "adamw":
        rule = optax.adamw(rate, b1=beta1, b2=beta2, weight_decay=decay, mask=_is_kernel)
    else:
        rule = optax.chain(
            optax.add_decayed_weights(decay, mask=_is_kernel),
            optax.sgd(rate, momentum=beta1, nesterov=True),
        )
    return optax.chain(optax.clip_by_global_norm(optimization.clip_norm), rule)


def initial_key(seed: int) -> jax.Array:
    """Return the key of initial weights, of a generator that compiles faster than the default."""
    return jax.random.key(seed, impl="rbg")


def create_state(params: Any, optimization: Optimization, run: Run, extra: Any) -> TrainState:
    """Return the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # another buffer, as the state is donated
        optimizer=make_optimizer(optimization, run.steps).init(params),
        extra=extra,
    )


def apply_gradients(
    state: TrainState, gradients: Any, optimization: Optimization, run: Run
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Return the state after a step with these gradients, and the step's own figures."""
    updates, optimizer = make_optimizer(optimization, run.steps).update(
        gradients, state.optimizer, state.params
    )
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(optimization, state.step)
    figures = {
        "learning_rate": learning_rate(optimization, run.steps)(state.step),
        "gradient_norm": optax.tree.norm(gradients),
    }
    state = replace(
        state,
        step=state.step + 1,
        params=params,
        ema=optax.incremental_update(params, state.ema, 1 - decay),
        optimizer=optimizer,
    )
    return state, figures


def ema_decay(optimization: Optimization, step: jax.Array) -> jax.Array:
    """Return the decay of the averaged weights, lower at first, so that they forget the start."""
    return jnp.minimum(optimization.ema_decay, (1 + step) / (10 + step))


def _is_kernel(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "phi_kernel"), params
    )
