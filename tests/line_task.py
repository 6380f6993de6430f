"""A task for the training loop that compiles at once, which other processes run too."""

import os
import signal
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training_helpers import OPTIMIZATION

from amskv_jax.training.config import Optimization, Run
from amskv_jax.training.loop import Task
from amskv_jax.training.state import apply_gradients, create_state


@dataclass(frozen=True)
class Settings:
    run: Run
    optimization: Optimization = OPTIMIZATION
    fail_at: int = -1
    interrupt_at: int = -1


def line_task(settings):
    """Fit the slope of a noisy line by gradient descent."""

    def create():
        return create_state({"kernel": jnp.zeros(3)}, settings.optimization, settings.run, {})

    def step(state, batch):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state.step), (3,))

        def loss(params):
            return jnp.mean((batch - (params["kernel"] + 0.1 * noise)[None]) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        value = jnp.where(state.step == settings.fail_at, jnp.nan, value)
        state, figures = apply_gradients(state, gradients, settings.optimization, settings.run)
        return state, {"loss": value, "per_scale": state.params["kernel"], **figures}

    def batches(first, count):
        if first == settings.interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)
        shape = count, settings.run.batch_size, 3
        return np.random.default_rng(first).normal(size=shape).astype(np.float32)

    def evaluate(params):
        return {"kernel_norm": optax.tree.norm(params)}

    shared = replace(settings, fail_at=-1, interrupt_at=-1)
    return Task("line", settings.run, shared, create, step, batches, evaluate)
