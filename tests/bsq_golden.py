"""Tokenizers of Infinity with recipe weights, and the goldens they are compared with."""

import json
from functools import partial

import jax
import numpy as np
from reference_weights import GOLDEN, load_recipe

from amskv_jax.convert import bsq
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.vae import BSQVAE
from amskv_jax.schedule import ScaleSchedule

FOLDER = GOLDEN / "infinity"
GENERATED = [
    f"infinity_tiny{configuration}"
    for configuration in (
        ".gen_logits",
        "_sharp.gen_logits",
        "_sharp.gen_leak",
        "_wide.gen_logits",
        "_wide.gen_leak",
        "_patchify.gen_logits",
        "_patchify.gen_leak",
    )
]


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def facts(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def schedule_of(grids):
    return ScaleSchedule(tuple((height, width) for _, height, width in grids))


def module_of(name, **options):
    """The tokenizer of a golden file, and the transformer's schedule in it."""
    about = facts(name)
    if name.startswith("bsq_vae"):
        shape, grids = about["vae"], about["model_scale_schedule"]
        patchify = about["model_scale_schedule"] != about["vae_scale_schedule"]
    else:
        shape = about["model"]["vae"] | {"codebook_dim": about["model"]["codebook_dim"]}
        grids = about["scale_schedule"]
        patchify = bool(about["model"]["apply_spatial_patchify"])
    config = BSQConfig(
        codebook_dim=shape["codebook_dim"],
        channels=shape["base_ch"],
        channel_multipliers={16: (1, 2, 4, 4, 4), 8: (1, 2, 4, 4)}[shape["patch_size"]],
        num_res_blocks=shape["num_res_blocks"],
        patchify=patchify,
    )
    return BSQVAE(config, schedule_of(grids), **options)


def recipe_state(config):
    """The reference's weights, without buffers."""
    shapes = bsq.shapes(config)
    return load_recipe().make_state({key: {"shape": shape} for key, shape in shapes.items()})


def recipe_params(config):
    return bsq.BSQ.to_params(recipe_state(config), config)


def call(module, params, method, *args):
    """Run one method of a module under jit."""
    return jax.jit(partial(module.apply, method=method))({"params": params}, *args)


def channels_last(x):
    """PyTorch's [B, C, H, W] -> [B, H, W, C]."""
    return np.moveaxis(x.astype(np.float32), 1, -1)


def golden_picture(height, width, phase):
    """The picture of the tokenizer files, [3, H, W] float64, by the formula in their README."""
    y, x = (np.arange(height) / height)[:, None], (np.arange(width) / width)[None, :]
    t = 2 * np.pi
    return np.stack(
        [
            0.5 * np.sin(t * (3 * x + (c + 1) * y) + phase)
            + 0.3 * np.cos(4 * t * (c + 2) * x * y)
            + 0.2 * np.sin(t * (17 * x - 13 * y) + c + 2 * phase)
            for c in range(3)
        ]
    )
