"""Infinity's goldens (see `golden/infinity/README.md`) and their recipe weights."""

import json
import math

import numpy as np
from reference_weights import GOLDEN, load_recipe

from amskv_jax.convert import infinity as convert
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.prompts import TextFeatures
from amskv_jax.models.infinity.schedules import schedule_of
from amskv_jax.schedule import ScaleSchedule

FOLDER = GOLDEN / "infinity"
TABLES = ("lvl_embed", "pos_start", "cfg_uncond")
TINY = "infinity_tiny", "infinity_tiny_sharp", "infinity_tiny_wide", "infinity_tiny_patchify"


def load(name):
    """The description and the arrays of a golden file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as data:
        return json.loads((FOLDER / f"{name}.json").read_text()), dict(data)


def config_of(model):
    """The configuration which the description of a golden file tells."""
    aspect, bits = str(model["h_div_w"]), model["codebook_dim"]
    return InfinityConfig(
        depth=model["depth"],
        width=model["embed_dim"],
        num_heads=model["num_heads"],
        bits=4 * bits if model["apply_spatial_patchify"] else bits,
        schedule=schedule_of(aspect, model["pn"]),
        text_channels=model["text_channels"],
        text_maxlen=model["text_maxlen"],
        block_chunks=model["block_chunks"],
    )


def recipe_value(key, shape, scale_mul=(4.0, 0.1)):
    """One parameter of the recipe."""
    recipe = load_recipe()
    z = recipe.unit_normal(key, shape)
    if key.endswith("scale_mul_1H11"):
        mean, deviation = scale_mul
        return np.float32(math.log(mean)) + np.float32(deviation) * z
    if any(name in key for name in TABLES) or ("mat_q" in key and len(shape) == 3):
        return np.float32(0.5) * z
    return recipe.make_param(key, shape)


def recipe_state(config, scale_mul=(4.0, 0.1)):
    """The reference's state dict, buffers included."""
    return {
        key: recipe_value(key, shape, scale_mul) for key, shape in convert.shapes(config).items()
    } | convert.buffers(config)


def recipe_params(config, scale_mul=(4.0, 0.1)):
    """The transformer's parameter tree."""
    return convert.INFINITY.to_params(recipe_state(config, scale_mul), config)


def schedule_in(description):
    """The schedule which a description tells."""
    return ScaleSchedule(tuple((h, w) for _, h, w in description["scale_schedule"]))


def texts_in(arrays):
    """The text features in the arrays of a golden file."""
    return TextFeatures(
        arrays["text_features"],
        arrays["text_lens"],
        arrays.get("neg_features"),
        arrays.get("neg_lens"),
    )


def picture_major(halves):
    """Rows in pairs of rows that come in halves, the conditional first."""
    return np.swapaxes(halves.reshape(2, -1, *halves.shape[1:]), 0, 1).reshape(halves.shape)
