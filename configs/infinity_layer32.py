"""An Infinity of the paper's study of sizes, layer32 (arXiv 2412.04431)."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.infinity.schedules import schedule_of
from amskv_jax.models.t5 import FLAN_T5_XL

CONFIG = ModelConfig(
    name="infinity-layer32",
    description="text to image, 256 pixels",
    model=InfinityModel(
        transformer=InfinityConfig(
            depth=32,
            width=2080,
            num_heads=20,
            bits=16,
            block_chunks=4,
            schedule=schedule_of(size="0.06M"),
        ),
        tokenizer=BSQConfig(codebook_dim=16),
        text_encoder=FLAN_T5_XL,
    ),
)
