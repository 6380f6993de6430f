"""What the tests of evaluation and study share: small models, statistics and a network for them."""

import numpy as np

from amskv_jax.evaluation.features import FeatureNetwork
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.plan.stats import LayerStats
from amskv_jax.schedule import VAR_256, ScaleSchedule

SCHEDULE = ScaleSchedule.square((1, 2, 3))
TRANSFORMER = VARConfig(2, 32, 2, SCHEDULE, num_classes=3, vocab_size=16, latent_channels=8)
TOKENIZER = VQVAEConfig(SCHEDULE, 16, 8, 32, (1, 1, 1), 1)
LARGE = VARConfig(6, 128, 2, VAR_256, num_classes=10)
MODEL = VARModel(TRANSFORMER, TOKENIZER)
"""Compiles quickly."""


def make_stats(config, seed=0):
    """Statistics of a model that attends at random."""
    generator = np.random.default_rng(seed)
    layers, heads, scales = config.depth, config.num_heads, config.schedule.num_scales
    similarity = -2 - generator.random((layers, scales)) + np.arange(layers)[:, None] / layers
    similarity[:, 0] = np.nan
    density = np.tril(generator.random((layers, heads, scales, scales)))
    return LayerStats(
        config.schedule,
        similarity,
        similarity,
        density / density.sum(-1, keepdims=True),
        np.sort(generator.random((layers, scales, 5)), axis=-1),
        fingerprint="weights",
    )


def mean_colour(pixels):
    features = pixels.mean((1, 2)).astype(np.float32)
    return features, features


MEAN_COLOUR = FeatureNetwork("colour", "none", 3, 3, mean_colour)
"""A feature network: three features, as logits too."""
