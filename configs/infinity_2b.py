"""Infinity-2B, text to image (arXiv 2412.04431)."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.t5 import FLAN_T5_XL

CONFIG = ModelConfig(
    name="infinity-2b",
    description="text to image, 1024 pixels, 2.2 B parameters",
    model=InfinityModel(
        transformer=InfinityConfig(
            depth=32,
            width=2048,
            num_heads=16,
            block_chunks=8,
        ),
        tokenizer=BSQConfig(),
        text_encoder=FLAN_T5_XL,
    ),
)
