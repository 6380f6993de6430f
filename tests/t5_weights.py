"""T5 encoders with the weights of the goldens."""

import gzip
import json

from reference_weights import GOLDEN, load_recipe

from amskv_jax.convert import t5
from amskv_jax.models.t5 import T5Config

TINY = T5Config(depth=3, width=64, num_heads=4, head_dim=16, hidden=128, vocab_size=100)
"""The golden's. Its heads together have as many channels as its stream."""

NARROW = T5Config(
    depth=2,
    width=48,
    num_heads=3,
    head_dim=8,
    hidden=96,
    vocab_size=80,
    num_buckets=16,
    max_distance=40,
)
"""One whose heads have fewer channels than its stream, as those of flan-t5-small have more."""


def manifest(name):
    path = GOLDEN / f"t5/manifest_{name}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def t5_state(config):
    """The reference's state dict by the recipe, without the alias of the embedding."""
    recipe = load_recipe()
    half = ("shared.weight", "relative_attention_bias.weight")
    return {
        key: 0.5 * recipe.unit_normal(key, shape)
        if key.endswith(half)
        else recipe.make_param(key, shape)
        for key, shape in t5.shapes(config).items()
    }


def t5_params(config, dtype="float32"):
    """The "params" collection of the encoder with this configuration."""
    return t5.T5.to_params(t5_state(config), config, dtype)
