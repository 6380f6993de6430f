"""VAR-d36, 512 pixels, one adaptive-norm projection for all blocks (arXiv 2404.02905)."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.schedule import VAR_512

CONFIG = ModelConfig(
    name="var-d36",
    description="ImageNet classes, 512 pixels, 2354 M parameters",
    model=VARModel(
        transformer=VARConfig(
            depth=36, width=2304, num_heads=36, schedule=VAR_512, shared_aln=True
        ),
        tokenizer=VQVAEConfig(schedule=VAR_512),
    ),
)
