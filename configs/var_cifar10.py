"""The embedded default model: CIFAR-10, 32 pixels, with VAR's 680 tokens in ten scales."""

from amskv_jax.configs import ModelConfig
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.training.config import Optimization, Run, TokenizerTraining, TransformerTraining

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

TOKENIZER_TRAINING = TokenizerTraining(
    model=MODEL.tokenizer,
    optimization=Optimization(learning_rate=1e-3, warmup_steps=200, weight_decay=1e-4),
    run=Run(steps=3600, batch_size=256),
    reseed_until=2100,
)

TRANSFORMER_TRAINING = TransformerTraining(
    model=MODEL.transformer,
    tokenizer=MODEL.tokenizer,
    optimization=Optimization(learning_rate=1e-3, warmup_steps=500),
    run=Run(steps=6000, batch_size=512),
    copies=8,
    token_noise=0.1,
)
