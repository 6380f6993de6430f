"""VAR-d24, 256 pixels (arXiv 2404.02905)."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel

CONFIG = ModelConfig(
    name="var-d24",
    description="ImageNet classes, 256 pixels, 1033 M parameters",
    model=VARModel(
        transformer=VARConfig(depth=24, width=1536, num_heads=24),
        tokenizer=VQVAEConfig(),
    ),
)
