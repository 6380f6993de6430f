"""The smallest Infinity of the paper, layer12 (arXiv 2412.04431)."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.infinity.schedules import schedule_of
from amskv_jax.models.t5 import FLAN_T5_XL

CONFIG = ModelConfig(
    name="infinity-125m",
    description="text to image, 256 pixels, 0.2 B parameters",
    model=InfinityModel(
        transformer=InfinityConfig(
            depth=12,
            width=768,
            num_heads=8,
            bits=16,
            block_chunks=4,
            schedule=schedule_of(size="0.06M"),
        ),
        tokenizer=BSQConfig(codebook_dim=16),
        text_encoder=FLAN_T5_XL,
    ),
)
