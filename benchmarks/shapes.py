"""Which models are compared, and their shapes as the reference's side is told them."""

from typing import Any

from amskv_jax import configs
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.infinity.schedules import schedule_of
from amskv_jax.models.protocol import Model

OTHERS = {
    "infinity-tiny": InfinityModel(
        transformer=InfinityConfig(
            depth=2,
            width=64,
            num_heads=4,
            bits=16,
            schedule=schedule_of(size="0.06M"),
            text_channels=128,
            block_chunks=2,
        ),
        tokenizer=BSQConfig(codebook_dim=16, channels=32),
    ),
}
"""Models to try the comparison with, besides those of ``configs``."""


def model_of(name: str) -> Model:
    """Return a known model, or one of ``OTHERS``; raises UsageError if there is none."""
    return OTHERS[name] if name in OTHERS else configs.get(name).model


def shape_of(model: Any) -> dict[str, Any]:
    """Return the shape of a VAR or an Infinity as JSON: what reference_side.py builds."""
    transformer, tokenizer = model.transformer, model.tokenizer
    names = ["depth", "width", "num_heads", "mlp_ratio"]
    extra: dict[str, Any] = {}
    if model.kind == "var":
        names += ["shared_aln", "attn_l2_norm", "vocab_size", "latent_channels", "num_classes"]
        extra = {"tokenizer_channels": tokenizer.channels, "num_phi": tokenizer.num_phi}
    else:
        names += ["bits", "text_channels", "text_maxlen", "block_chunks"]
        extra = {"patchify": tokenizer.patchify}
    return {
        "kind": model.kind,
        "grids": [list(grid) for grid in model.schedule.grids],
        **{name: getattr(transformer, name) for name in names},
        **extra,
    }
