"""Training the VAR transformer on tokens made beforehand."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from amskv_jax.errors import AmskvError
from amskv_jax.models.var.quantizer import MultiScaleQuantizer
from amskv_jax.models.var.transformer import VAR
from amskv_jax.training.config import TransformerTraining
from amskv_jax.training.data import draw_pictures, spread
from amskv_jax.training.loop import Figures, Task, fit
from amskv_jax.training.state import TrainState, apply_gradients, create_state, initial_key
from amskv_jax.training.tokens import TokenSet

EVALUATED = 1024
"""Pictures, spread over all, that an evaluation looks at in batches of the training's size."""


def train_transformer(
    config: TransformerTraining,
    tokens: TokenSet,
    tokenizer: Any,
    directory: Path | str,
    *,
    validation: TokenSet | None = None,
    stop_after: float | None = None,
) -> Any:
    """Train a VAR, or go on with the run in ``directory``.

    The log holds loss and accuracy of the next-scale prediction, over all tokens and per scale.

    Args:
      config: all settings.
      tokens: of the pictures to train on.
      tokenizer: weights of the VQVAE that made them.
      directory: of the run, see ``loop``.
      validation: tokens on which the averaged weights are evaluated with every checkpoint.
      stop_after: see ``loop.fit``.

    Returns:
      The averaged weights of the VAR, float32.

    Raises:
      AmskvError: if tokens, tokenizer and model do not fit together; and what ``loop.fit`` raises.
    """
    for data in (tokens, validation):
        if data is not None:
            check_tokens(config, data)
    run, model = config.run, config.model
    loss = partial(objective, config, {"params": tokenizer["quantizer"]})

    def create() -> TrainState:
        shape = 1, model.schedule.total - model.schedule.tokens[0], model.latent_channels
        labels = jnp.zeros((1,), jnp.int32)
        params = VAR(model).init(initial_key(run.seed), labels, jnp.zeros(shape))["params"]
        return create_state(params, config.optimization, run, {})

    def batches(first: int, count: int) -> tuple[np.ndarray, ...]:
        shape = count, run.batch_size
        draw = draw_pictures(len(tokens), run.seed, first * run.batch_size, count * run.batch_size)
        copy = (draw.chance * tokens.copies).astype(int)
        return (
            tokens.labels[draw.rows].reshape(shape),
            tokens.target[copy, draw.rows].reshape(*shape, -1),
            tokens.history[copy, draw.rows].reshape(*shape, -1),
        )

    def step(state: TrainState, batch: tuple[jax.Array, ...]) -> tuple[TrainState, Figures]:
        labels, target, history = batch
        key = jax.random.fold_in(jax.random.key(run.seed), state.step)
        dropped = jax.random.bernoulli(key, config.label_dropout, labels.shape)
        labels = jnp.where(dropped, model.num_classes, labels)
        (_, figures), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params, labels, target, history
        )
        state, own = apply_gradients(state, gradients, config.optimization, run)
        return state, {**figures, **own}

    evaluate_batch = jax.jit(lambda params, *batch: loss(params, *batch)[1])

    def evaluate(ema: Any) -> Figures:
        assert validation is not None
        parts = []
        chosen = spread(len(validation), EVALUATED)
        for start in range(0, len(chosen), run.batch_size):
            rows = chosen[start : start + run.batch_size]
            batch = (
                validation.labels[rows],
                validation.target[0, rows],
                validation.history[0, rows],
            )
            parts.append(evaluate_batch(ema, *batch))
        return {
            f"validation_{name}": np.mean([part[name] for part in parts], axis=0)
            for name in parts[0]
        }

    task = Task(
        name="transformer",
        run=run,
        settings=config,
        create=create,
        step=step,
        batches=batches,
        evaluate=None if validation is None else evaluate,
    )
    return fit(task, directory, stop_after).ema


def objective(
    config: TransformerTraining,
    quantizer: Any,
    params: Any,
    labels: jax.Array,
    target: jax.Array,
    history: jax.Array,
) -> tuple[jax.Array, Figures]:
    """Return the mean cross-entropy per token, in nats, and figures for the log.

    Args:
      config: all settings.
      quantizer: variables of the tokenizer's quantiser.
      params: of the VAR.
      labels: [B] integers, ``num_classes`` for no class.
      target: [B, total] tokens to predict.
      history: [B, total] tokens that the transformer sees.
    """
    schedule = config.model.schedule
    target, history = target.astype(jnp.int32), history.astype(jnp.int32)
    features = MultiScaleQuantizer(config.tokenizer).apply(
        quantizer, history, method="teacher_inputs"
    )
    model: Any = VAR(config.model, config.run.dtype)  # Flax's type of `apply` says little
    logits = model.apply({"params": params}, labels, features)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target).mean(0)
    correct = (logits.argmax(-1) == target).mean(0)

    def per_scale(values: jax.Array) -> jax.Array:
        return jnp.stack([values[schedule.slice(i)].mean() for i in range(schedule.num_scales)])

    loss = entropy.mean()
    return loss, {
        "loss": loss,
        "accuracy": correct.mean(),
        "loss_per_scale": per_scale(entropy),
        "accuracy_per_scale": per_scale(correct),
    }


def check_tokens(config: TransformerTraining, tokens: TokenSet) -> None:
    """Raise AmskvError unless transformer, tokenizer and tokens fit together."""
    model, tokenizer = config.model, config.tokenizer
    pairs = {
        "scales": (tokenizer.schedule, model.schedule),
        "codebook entries": (tokenizer.vocab_size, model.vocab_size),
        "latent channels": (tokenizer.latent_channels, model.latent_channels),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise AmskvError(f"{what} of the tokenizer: {found}; of the transformer: {expected}")
    if tokens.target.shape[-1] != model.schedule.total:
        raise AmskvError(
            f"the pictures have {tokens.target.shape[-1]} tokens each, "
            f"the model's scales {model.schedule.total}: make the tokens again"
        )
    if len(tokens.classes) != model.num_classes:
        raise AmskvError(
            f"the tokens have {len(tokens.classes)} classes, the model {model.num_classes}: "
            "set num_classes of the model's config, or choose other data"
        )
