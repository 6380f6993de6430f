"""The embedded default model: CIFAR-10, 32 pixels, with VAR's 680 tokens in ten scales."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel

MODEL = VARModel(
    transformer=VARConfig(
        depth=12,
        width=384,
        num_heads=6,
        num_classes=10,
        vocab_size=1024,
        latent_channels=16,
        shared_aln=True,
    ),
    tokenizer=VQVAEConfig(
        vocab_size=1024, latent_channels=16, channels=64, channel_multipliers=(1, 2)
    ),
)

CONFIG = ModelConfig(
    name="var-cifar10",
    description="CIFAR-10 classes, 32 pixels, 23 M parameters",
    model=MODEL,
)
