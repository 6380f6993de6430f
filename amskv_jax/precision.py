"""How exactly matrix products are computed."""

import jax
import jax.numpy as jnp
from jax import lax

FLOAT8: dict[str, tuple[str, ...]] = {
    "float8": ("mlp/down",),
    "float8-fast": ("attention/qkv", "mlp/up", "mlp/down"),
}
"""Choices of products in float8 (see ``float8``), and the layers of a block whose products are.

First the layers that together cost the embedded model at most 0.003 nats a token of held-out loss,
then all with much of a block's operations, at 0.007: see docs/performance.md. ``amskv score`` tells
what they cost any other model.
"""


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """Return full float32 products for float32, the hardware's default for half precision.

    GPUs and TPUs would otherwise shorten float32 operands, and greedy tokens would differ.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def activation_dtype(dtype: str) -> str:
    """Return the type of activations, cache and other weights where products are in ``dtype``.

    It is ``dtype`` itself, and bfloat16 for those of ``FLOAT8``.
    """
    return "bfloat16" if dtype in FLOAT8 else dtype
