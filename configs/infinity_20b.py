"""Infinity-20B, text to image (arXiv 2412.04431).

Depth, width and heads are those of the public code; no weights are published, and the tokenizer, so
the bits of a token, is taken to be that of 2B.
"""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.t5 import FLAN_T5_XL

CONFIG = ModelConfig(
    name="infinity-20b",
    description="text to image, 1024 pixels, 19 B parameters",
    model=InfinityModel(
        transformer=InfinityConfig(
            depth=58,
            width=4608,
            num_heads=36,
        ),
        tokenizer=BSQConfig(),
        text_encoder=FLAN_T5_XL,
    ),
)
