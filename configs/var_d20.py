"""VAR-d20, 256 pixels (arXiv 2404.02905)."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel

CONFIG = ModelConfig(
    name="var-d20",
    description="ImageNet classes, 256 pixels, 601 M parameters",
    model=VARModel(
        transformer=VARConfig(depth=20, width=1280, num_heads=20),
        tokenizer=VQVAEConfig(),
    ),
)
