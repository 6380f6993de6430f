"""VAR-d30, 256 pixels (arXiv 2404.02905)."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel

CONFIG = ModelConfig(
    name="var-d30",
    description="ImageNet classes, 256 pixels, 2010 M parameters",
    model=VARModel(
        transformer=VARConfig(depth=30, width=1920, num_heads=30),
        tokenizer=VQVAEConfig(),
    ),
)
