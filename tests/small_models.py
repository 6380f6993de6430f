"""Models that compile in a second or two, shared by the tests of files, pipelines and commands."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.square((1, 2, 3))
VAR_FIELDS = {"schedule": SCHEDULE, "num_classes": 10, "vocab_size": 64, "latent_channels": 16}
TRANSFORMER = VARConfig(3, 128, 2, **VAR_FIELDS)
VQVAE_FIELDS = {
    "schedule": SCHEDULE,
    "vocab_size": 64,
    "latent_channels": 16,
    "channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
}
TOKENIZER = VQVAEConfig(**VQVAE_FIELDS)
SMALL = ModelConfig("small", "10 classes, 6 pixels", TRANSFORMER, TOKENIZER)
