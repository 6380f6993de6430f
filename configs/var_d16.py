"""VAR-d16, 256 pixels (arXiv 2404.02905)."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel

CONFIG = ModelConfig(
    name="var-d16",
    description="ImageNet classes, 256 pixels, 310 M parameters",
    model=VARModel(
        transformer=VARConfig(depth=16, width=1024, num_heads=16),
        tokenizer=VQVAEConfig(),
    ),
)
