"""A model for tests and first steps: it compiles in seconds and draws 64-pixel pictures."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4))

CONFIG = ModelConfig(
    name="var-tiny",
    description="for tests and first steps: 10 classes, 64 pixels",
    model=VARModel(
        transformer=VARConfig(
            depth=2, width=128, num_heads=2, schedule=SCHEDULE, num_classes=10, vocab_size=64
        ),
        tokenizer=VQVAEConfig(schedule=SCHEDULE, vocab_size=64, channels=32),
    ),
)
