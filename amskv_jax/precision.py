"""How exactly matrix products are computed."""

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """Return full float32 products for float32, the hardware's default for half precision.

    GPUs and TPUs would otherwise shorten float32 operands, and greedy tokens would differ.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
