"""Infinity-8B, text to image, tokens of 2 x 2 positions (arXiv 2412.04431)."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.t5 import FLAN_T5_XL

CONFIG = ModelConfig(
    name="infinity-8b",
    description="text to image, 1024 pixels, 8.2 B parameters",
    model=InfinityModel(
        transformer=InfinityConfig(
            depth=40,
            width=3584,
            num_heads=28,
            bits=56,
            block_chunks=8,
        ),
        tokenizer=BSQConfig(codebook_dim=14, channel_multipliers=(1, 2, 4, 4), patchify=True),
        text_encoder=FLAN_T5_XL,
    ),
)
