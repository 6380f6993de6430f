"""Settings of the trainers: frozen, plain, written into a run's directory as JSON."""

from dataclasses import dataclass
from typing import Literal

from amskv_jax.errors import UsageError
from amskv_jax.models.var.config import VARConfig, VQVAEConfig


@dataclass(frozen=True)
class Optimization:
    """An optimiser with clipped gradients, a linear warm-up, a cosine decay and averaged weights.

    Attributes:
      learning_rate: highest rate, reached at the end of the warm-up.
      warmup_steps: steps of the warm-up, from 0.
      final_share: rate of the last step over the highest one.
      method: "adamw"; or "sgd", with Nesterov's momentum.
      beta1: decay of the mean of the gradients; the momentum.
      beta2: decay of the mean of their squares; of no account for "sgd".
      weight_decay: of kernels alone; biases, norms, embeddings and the codebook are exempt. "adamw"
        shrinks weights by this share of the learning rate, "sgd" adds it to the gradients.
      clip_norm: largest norm of all gradients together.
      ema_decay: decay of the averaged weights; lower during the first steps.
    """

    learning_rate: float
    warmup_steps: int
    final_share: float = 0.01
    method: Literal["adamw", "sgd"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.999


@dataclass(frozen=True)
class Run:
    """Length and pace of a training run.

    Attributes:
      steps: optimiser steps in all.
      batch_size: pictures per step, on all devices together.
      steps_per_call: steps that one compiled call makes; the log has a line per call.
      checkpoint_every: steps between checkpoints, which are written at the end of a call.
      seed: of the initial weights, the order of the pictures, and all noise.
      dtype: of the computation; the weights are always float32.

    Raises:
      UsageError: if a number is below 1.
    """

    steps: int
    batch_size: int
    steps_per_call: int = 50
    checkpoint_every: int = 1000
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "steps_per_call", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class TokenizerTraining:
    """How a VQVAE is trained.

    The loss is ``l1 |x - y| + l2 (x - y)^2`` of the pictures in [-1, 1], plus the mean over scales
    of ``(f_hat - sg(f))^2 + commitment (sg(f_hat) - f)^2``, f_hat being the latent f as the tokens
    up to that scale describe it, and sg a barrier to gradients.

    Attributes:
      model: shape of the VQVAE.
      optimization: see there.
      run: see there.
      l1: weight of the absolute error.
      l2: weight of the squared error.
      commitment: weight of the encoder's part of the quantiser's loss.
      reseed_every: steps between searches for codebook entries that are out of use; these are
        replaced by vectors the quantiser had to approximate in that step.
      reseed_until: first step after which the codebook is left alone.
    """

    model: VQVAEConfig
    optimization: Optimization
    run: Run
    l1: float = 1.0
    l2: float = 1.0
    commitment: float = 0.25
    reseed_every: int = 100
    reseed_until: int = 2000


@dataclass(frozen=True)
class TransformerTraining:
    """How a VAR is trained on the tokens of a trained VQVAE.

    Attributes:
      model: shape of the transformer.
      tokenizer: shape of the VQVAE.
      optimization: see there.
      run: see there.
      label_dropout: share of labels replaced by "no class", which guidance needs.
      copies: versions of every picture among the tokens, every other one mirrored.
      token_noise: how far the history that the transformer sees strays from the nearest tokens, see
        ``tokens.noisy_tokens``; 0 is plain teacher forcing.
    """

    model: VARConfig
    tokenizer: VQVAEConfig
    optimization: Optimization
    run: Run
    label_dropout: float = 0.1
    copies: int = 2
    token_noise: float = 0.0
