"""How exactly matrix products are computed."""

import jax
import jax.numpy as jnp
from jax import lax

FLOAT8 = "float8"
"""Name of the choice to compute some products of the blocks in float8, see ``float8``."""


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """Return full float32 products for float32, the hardware's default for half precision.

    GPUs and TPUs would otherwise shorten float32 operands, and greedy tokens would differ.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def activation_dtype(dtype: str) -> str:
    """Return the type of activations, cache and other weights where products are in ``dtype``.

    It is ``dtype`` itself, and bfloat16 for "float8".
    """
    return "bfloat16" if dtype == FLOAT8 else dtype
