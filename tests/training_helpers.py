"""What the tests of training share: small models, small data, runs in other processes."""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from reference_weights import vqvae_params

from amskv_jax.files import read_json_lines
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.training.config import Optimization, Run, TokenizerTraining, TransformerTraining
from amskv_jax.training.data import Pictures
from amskv_jax.training.tokens import TokenSet
from amskv_jax.training.transformer import train_transformer

SCHEDULE = ScaleSchedule.square((1, 2, 4))
TOKENIZER = VQVAEConfig(
    schedule=SCHEDULE,
    vocab_size=32,
    latent_channels=8,
    channels=32,
    channel_multipliers=(1,),
    num_res_blocks=1,
)
TRANSFORMER = VARConfig(
    depth=2,
    width=32,
    num_heads=2,
    schedule=SCHEDULE,
    num_classes=3,
    vocab_size=32,
    latent_channels=8,
    shared_aln=True,
)
OPTIMIZATION = Optimization(learning_rate=3e-3, warmup_steps=2)
RUN = Run(steps=24, batch_size=4, steps_per_call=4, checkpoint_every=8, dtype="float32")
TOKENIZER_TRAINING = TokenizerTraining(
    TOKENIZER,
    OPTIMIZATION,
    replace(RUN, steps=32, steps_per_call=4, checkpoint_every=32),
    reseed_every=4,
    reseed_until=24,
)
TRANSFORMER_TRAINING = TransformerTraining(
    TRANSFORMER, TOKENIZER, Optimization(learning_rate=1e-2, warmup_steps=4), RUN
)
"""Tests that train with these share compiled programs."""


@contextmanager
def optimized_programs():
    """Compile well what is trained, as running it takes longer, unlike elsewhere (conftest.py)."""
    options = {"xla_backend_optimization_level": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", partial(jax.jit, compiler_options=options))
        yield


def comparable(directory):
    """The log without the times."""
    entries = read_json_lines(directory / "log.jsonl")
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in entries]


def run_python(code, *arguments, **environment):
    """Start another process, which finds the programs that were compiled here."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    folder = os.path.dirname(__file__)
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **environment})


def smooth_pictures(count=6):
    """Two-coloured gradients, which a small model learns soon."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (2, count, 1, 1, 3))
    ramp = np.linspace(0, 1, 4)[:, None, None]
    pixels = np.repeat(colours[0] * ramp + colours[1] * (1 - ramp), 4, axis=2).astype(np.uint8)
    return Pictures(pixels, np.arange(count, dtype=np.int32) % 3, ("a", "b", "c"))


def token_set():
    """Tokens that follow from the class, but for some."""
    rng = np.random.default_rng(0)
    labels = np.arange(30, dtype=np.int32) % 3
    typical = rng.integers(0, 32, (3, SCHEDULE.total))
    target = np.where(rng.random((2, 30, 21)) < 0.9, typical[labels], 5).astype(np.uint8)
    return TokenSet(target, target, labels, ("a", "b", "c"))


def transformer_run(directory, **options):
    tokenizer = {"quantizer": vqvae_params(TOKENIZER)["quantizer"]}
    return train_transformer(
        TRANSFORMER_TRAINING, token_set(), tokenizer, directory, validation=token_set(), **options
    )
