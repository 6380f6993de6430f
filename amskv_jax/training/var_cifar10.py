"""How the embedded model was trained."""

from amskv_jax.configs.var_cifar10 import MODEL
from amskv_jax.training.config import Optimization, Run, TokenizerTraining, TransformerTraining

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
