"""Checkpoints of tiny Infinity models, converted from files as they are published."""

import json

import infinity_golden
import numpy as np
from reference_weights import recipe_state
from safetensors.numpy import save_file
from t5_weights import NARROW, t5_state
from text_tokenizers import save_tokenizer

from amskv_jax.convert import convert
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel

TRANSFORMER = InfinityConfig(2, 64, 2, bits=8, text_channels=NARROW.width, block_chunks=2)
TOKENIZER = BSQConfig(8, 32, (1, 1, 1, 1, 1), 1)
MODEL = InfinityModel(TRANSFORMER, TOKENIZER, NARROW)
"""One that takes prompts of 512 tokens. Its pictures have 16 pixels per token, as all have."""


def save_transformer(path, config, scale_mul=(4.0, 0.1)):
    """Write the reference's file of a transformer with recipe weights."""
    save_file(infinity_golden.recipe_state(config, scale_mul), path)
    return path


def save_tokenizer_weights(path, config):
    """Write the reference's file of a BSQ-VAE with recipe weights."""
    save_file(recipe_state(config), path)
    return path


def save_text_encoder(folder):
    """Write a folder of the hub with ``NARROW`` and its ``tokenizer.json``."""
    folder.mkdir()
    save_file(t5_state(NARROW), folder / "model.safetensors")
    settings = {
        "d_ff": NARROW.hidden,
        "d_kv": NARROW.head_dim,
        "d_model": NARROW.width,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": NARROW.norm_epsilon,
        "num_heads": NARROW.num_heads,
        "num_layers": NARROW.depth,
        "relative_attention_max_distance": NARROW.max_distance,
        "relative_attention_num_buckets": NARROW.num_buckets,
        "vocab_size": NARROW.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_tokenizer(folder / "tokenizer.json")
    return folder


def save_sources(folder):
    """Write the reference's files of ``MODEL``; return them by part."""
    return {
        "transformer": save_transformer(folder / "infinity_tiny.safetensors", TRANSFORMER, (40, 1)),
        "tokenizer": save_tokenizer_weights(folder / "vae_tiny.safetensors", TOKENIZER),
        "text_encoder": save_text_encoder(folder / "t5-tiny"),
    }


def golden_checkpoint(description, folder):
    """Convert the model which the description of a golden file tells; it has no text encoder."""
    model = description["model"]
    vae = model["vae"]
    levels = {16: (1, 2, 4, 4, 4), 8: (1, 2, 4, 4)}[vae["patch_size"]]
    tokenizer = BSQConfig(
        model["codebook_dim"],
        vae["base_ch"],
        levels,
        vae["num_res_blocks"],
        patchify=bool(model["apply_spatial_patchify"]),
    )
    config = infinity_golden.config_of(model)
    scale_mul = tuple(model.get("scale_mul", (4.0, 0.1)))
    folder.mkdir()
    sources = {
        "transformer": save_transformer(folder / "transformer.safetensors", config, scale_mul),
        "tokenizer": save_tokenizer_weights(folder / "tokenizer.safetensors", tokenizer),
    }
    convert("infinity", sources, folder / "checkpoint")
    return folder / "checkpoint"


def save_golden_features(path, golden):
    """Write the text features in the arrays of a golden file as ``--text-features`` reads them."""
    names = {
        "text_features": "features",
        "text_lens": "lengths",
        "neg_features": "negative_features",
        "neg_lens": "negative_lengths",
    }
    np.savez(path, **{ours: golden[theirs] for theirs, ours in names.items() if theirs in golden})
    return path
