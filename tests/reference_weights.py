"""Goldens, and the recipe weights (see `golden/recipe.py`) of models of any shape."""

import importlib.util
from pathlib import Path

from amskv_jax.convert.api import architecture_of, to_params

GOLDEN = Path(__file__).parent / "golden"


def load_recipe():
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_state(config):
    """The reference's state dict, buffers included, of the model with this configuration."""
    architecture = architecture_of(type(config))
    manifest = {key: {"shape": shape} for key, shape in architecture.shapes(config).items()}
    return load_recipe().make_state(manifest) | architecture.buffers(config)


def recipe_params(config):
    """The "params" collection of the model with this configuration (VARConfig, VQVAEConfig)."""
    return to_params(recipe_state(config), config)


vqvae_params = recipe_params  # the earlier name, for scripts that still import it
