"""Recipe weights (see `golden/recipe.py`) for a VQVAE of any shape, in the package's tree."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from amskv_jax.models.config import VQVAEConfig
from amskv_jax.models.vqvae import VQVAE

GOLDEN = Path(__file__).parent / "golden"


def load_recipe():
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vqvae_shapes(config: VQVAEConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters of the package's VQVAE as {path joined by slashes: shape}."""
    pictures = jax.ShapeDtypeStruct((1, *config.picture_size, 3), jnp.float32)
    variables = jax.eval_shape(VQVAE(config).init, jax.random.key(0), pictures)
    return flatten_dict(variables["params"], sep="/")


def reference_key(path: str) -> str:
    """Name in the reference's state dict; without the index for the stacked phi."""
    if path == "quantizer/codebook":
        return "quantize.embedding.weight"
    if path.startswith("quantizer/phi_"):
        return "quantize.quant_resi.qresi_ls.{}." + reference_key(
            path.removeprefix("quantizer/phi_")
        )
    rules = [
        (r"(down|up)_(\d+)/block_(\d+)", r"\1/\2/block/\3"),
        (r"(down|up)_(\d+)/attention_(\d+)", r"\1/\2/attn/\3"),
        (r"(down|up)_(\d+)/(downsample|upsample)", r"\1/\2/\3/conv"),
        (r"middle/", "mid/"),
        (r"mid/attention", "mid/attn"),
        (r"(attn[_/]\d+)/out/", r"\1/proj_out/"),
        (r"/shortcut/", "/nin_shortcut/"),
        (r"(kernel|scale)$", "weight"),
    ]
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path.replace("/", ".")


def vqvae_manifest(config: VQVAEConfig) -> dict[str, tuple[int, ...]]:
    """The reference's {key: PyTorch shape} of a VQVAE, without buffers."""
    manifest = {}
    for path, leaf in vqvae_shapes(config).items():
        key, shape = reference_key(path), leaf.shape
        stacked = "{}" in key
        for index in range(shape[0] if stacked else 1):
            one = shape[1:] if stacked else shape
            manifest[key.format(index)] = (one[3], one[2], *one[:2]) if len(one) == 4 else one
    return manifest


def vqvae_params(config: VQVAEConfig) -> dict:
    """Recipe weights as the "params" collection of `VQVAE`."""
    make_param = load_recipe().make_param

    def value(key: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) != 4:
            return make_param(key, shape)
        torch_shape = (shape[3], shape[2], *shape[:2])
        return make_param(key, torch_shape).transpose(2, 3, 1, 0)

    params = {}
    for path, leaf in vqvae_shapes(config).items():
        key, shape = reference_key(path), leaf.shape
        if "{}" in key:
            params[path] = np.stack([value(key.format(k), shape[1:]) for k in range(shape[0])])
        else:
            params[path] = value(key, shape)
    return unflatten_dict(params, sep="/")
