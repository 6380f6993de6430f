"""How exactly matrix products are computed."""

import jax
import jax.numpy as jnp
from jax import lax

LARGEST_FLOAT8 = 448.0
"""The largest number of float8_e4m3fn."""
FLOAT8: dict[str, dict[str, str]] = {
    "float8": {"attention/qkv": "int8", "mlp/up": "int8", "mlp/down": "float8_e4m3fn"},
    "float8-fast": dict.fromkeys(("attention/qkv", "mlp/up", "mlp/down"), "float8_e4m3fn"),
}
"""Choices of products in 8 bits, and in which numbers they are, by layer of a block.

Both have all layers with much of a block's operations. The first costs the embedded model 0.0015
nats a token of held-out loss, and needs a kernel for Hopper GPUs; the second costs 0.007: see
docs/performance.md. ``amskv score`` tells what they cost any other model.
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


def to_float8(x: jax.Array) -> jax.Array:
    """Return numbers as float8_e4m3fn, which has no infinity: larger ones become its largest."""
    if x.dtype == jnp.float8_e4m3fn:
        return x
    return jnp.clip(x, -LARGEST_FLOAT8, LARGEST_FLOAT8).astype(jnp.float8_e4m3fn)
