"""Training the VQVAE: straight-through multi-scale quantisation, a codebook kept in use."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.resize import resize
from amskv_jax.training.config import TokenizerTraining
from amskv_jax.training.data import Pictures, draw_pictures, spread
from amskv_jax.training.loop import Figures, Task, fit
from amskv_jax.training.state import TrainState, apply_gradients, create_state, initial_key

HITS_DECAY = 0.99
IN_USE = 0.08
"""An entry is in use if it is chosen at least this share of how often the average entry is."""
EVALUATED = 2048
"""Pictures that an evaluation looks at."""


def train_tokenizer(
    config: TokenizerTraining,
    pictures: Pictures,
    directory: Path | str,
    *,
    validation: Pictures | None = None,
    stop_after: float | None = None,
) -> Any:
    """Train a VQVAE, or go on with the run in ``directory``.

    The log holds the loss and its parts, the signal-to-noise ratio in dB of the reconstruction
    (``psnr``), and per scale the quantisation error (``error_per_scale``) and the share of the
    codebook in use (``usage_per_scale``).

    Args:
      config: all settings.
      pictures: to train on.
      directory: of the run, see ``loop``.
      validation: pictures whose reconstruction is evaluated with every checkpoint.
      stop_after: see ``loop.fit``.

    Returns:
      The averaged weights of the VQVAE, float32.

    Raises:
      AmskvError: if the pictures do not suit the model; and what ``loop.fit`` raises.
    """
    for data in (pictures, validation):
        if data is not None:
            data.check(config.model.picture_size)
    run = config.run

    def create() -> TrainState:
        empty = jnp.zeros((1, *config.model.picture_size, 3))
        params = VQVAE(config.model).init(initial_key(run.seed), empty)["params"]
        hits = jnp.zeros((config.model.schedule.num_scales, config.model.vocab_size))
        return create_state(params, config.optimization, run, {"hits": hits})

    def batches(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        size = run.batch_size
        draw = draw_pictures(len(pictures), run.seed, first * size, count * size)
        pixels = pictures.pixels[draw.rows]
        mirrored = draw.chance < 0.5
        return pixels.reshape(count, size, *pixels.shape[1:]), mirrored.reshape(count, size)

    @jax.jit
    def evaluate(params: Any, batch: jax.Array) -> Figures:
        _, (figures, _) = objective(config, params, batch)
        return {f"validation_{name}": figures[name] for name in ("loss", "psnr")}

    held_out = None
    if validation is not None:
        held_out = validation.pixels[spread(len(validation.pixels), EVALUATED)]
    task = Task(
        name="tokenizer",
        run=run,
        settings=config,
        create=create,
        step=partial(train_step, config),
        batches=batches,
        evaluate=None if held_out is None else lambda ema: evaluate(ema, unit_range(held_out)),
    )
    return fit(task, directory, stop_after).ema


def unit_range(pixels: jax.Array | np.ndarray) -> jax.Array:
    """Return uint8 pixels as the model sees them, float32 in [-1, 1]."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1


def train_step(
    config: TokenizerTraining, state: TrainState, batch: tuple[jax.Array, jax.Array]
) -> tuple[TrainState, Figures]:
    """Make one optimiser step on pictures, uint8 [B, H, W, 3], some of them mirrored, bool [B]."""
    pixels, mirrored = batch
    pictures = unit_range(jnp.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels))
    loss = partial(objective, config)
    (_, (figures, quantised)), gradients = jax.value_and_grad(loss, has_aux=True)(
        state.params, pictures
    )
    step = state.step
    state, own = apply_gradients(state, gradients, config.optimization, config.run)

    tokens, latent, stages = quantised
    hits = HITS_DECAY * state.extra["hits"] + (1 - HITS_DECAY) * _count(config.model, tokens)
    state = replace(state, extra={"hits": hits})
    mean_hits = hits.mean(-1, keepdims=True)
    usage = {
        "usage": (hits.sum(0) >= IN_USE * mean_hits.sum()).mean(),
        "usage_per_scale": (hits >= IN_USE * mean_hits).mean(-1),
    }
    due = (step % config.reseed_every == 0) & (step < config.reseed_until)
    key = jax.random.fold_in(jax.random.key(config.run.seed), step)
    state = lax.cond(due, lambda: _reseed(config.model, state, latent, stages, key), lambda: state)
    return state, {**figures, **own, **usage}


def objective(
    config: TokenizerTraining, params: Any, pictures: jax.Array
) -> tuple[jax.Array, tuple[Figures, tuple[jax.Array, jax.Array, jax.Array]]]:
    """Return the loss, figures, and what the quantiser saw and did.

    The gradient of the reconstruction passes the quantiser unchanged, straight to the encoder; the
    codebook and its convolutions learn from the quantiser's own loss alone.

    Args:
      config: all settings.
      params: of the VQVAE.
      pictures: [B, H, W, 3] in [-1, 1].

    Returns:
      The loss and (figures, (tokens [B, total], latent [B, h, w, C], f_hat after every scale
      [S, B, h, w, C])).
    """

    def forward(module: VQVAE) -> tuple[jax.Array, ...]:
        latent = module.encode_features(pictures)
        tokens, stages = module.quantize(lax.stop_gradient(latent), every_scale=True)
        straight_through = latent + lax.stop_gradient(stages[-1] - latent)
        # Not `decode`: where it clips, no gradient would pass.
        output = module.decoder(module.post_quant_conv(straight_through))
        return output.astype(jnp.float32), tokens, latent, stages

    module: Any = VQVAE(config.model, config.run.dtype)  # Flax's type of `apply` says little
    output, tokens, latent, stages = module.apply({"params": params}, method=forward)
    fixed = lax.stop_gradient
    codebook = jnp.square(stages - fixed(latent)[None]).mean((1, 2, 3, 4))
    commitment = jnp.square(fixed(stages) - latent[None]).mean()
    absolute = jnp.abs(output - pictures).mean()
    squared = jnp.square(output - pictures).mean()
    loss = (
        config.l1 * absolute
        + config.l2 * squared
        + codebook.mean()
        + config.commitment * commitment
    )
    clipped = jnp.square(jnp.clip(output, -1, 1) - pictures).mean()
    figures = {
        "loss": loss,
        "absolute_error": absolute,
        "psnr": 10 * jnp.log10(4 / clipped),
        "error_per_scale": codebook,
        "latent_deviation": latent.std(),
    }
    return loss, (figures, fixed((tokens, latent, stages)))


def _count(model: VQVAEConfig, tokens: jax.Array) -> jax.Array:
    """Return how often every scale chose every codebook entry, float32 [S, V]."""
    scales = np.repeat(np.arange(model.schedule.num_scales), model.schedule.tokens)
    empty = jnp.zeros((model.schedule.num_scales, model.vocab_size))
    return empty.at[scales[None], tokens].add(1)


def _reseed(
    model: VQVAEConfig, state: TrainState, latent: jax.Array, stages: jax.Array, key: jax.Array
) -> TrainState:
    """Replace entries out of use by vectors that the quantiser had to approximate.

    Vectors are drawn from all scales alike, since the coarse scales, which have few tokens, need
    the longest entries.
    """
    schedule = model.schedule
    rest = jnp.concatenate([latent[None], latent[None] - stages[:-1]])
    per_scale = -(-model.vocab_size // schedule.num_scales)
    keys = jax.random.split(key, schedule.num_scales + 1)
    pool = []
    for scale, grid in enumerate(schedule.grids):
        vectors = resize(rest[scale], grid, "area").reshape(-1, model.latent_channels)
        pool.append(vectors[jax.random.randint(keys[scale], (per_scale,), 0, len(vectors))])
    fresh = jax.random.permutation(keys[-1], jnp.concatenate(pool))[: model.vocab_size]

    hits = state.extra["hits"]
    mean_hits = hits.mean(-1, keepdims=True)
    unused = hits.sum(0) < IN_USE * mean_hits.sum()

    def replaced(params: Any) -> Any:
        codebook = jnp.where(unused[:, None], fresh, params["quantizer"]["codebook"])
        return {**params, "quantizer": {**params["quantizer"], "codebook": codebook}}

    return replace(
        state,
        params=replaced(state.params),
        ema=replaced(state.ema),
        extra={"hits": jnp.where(unused, mean_hits, hits)},  # time to prove themselves
    )
