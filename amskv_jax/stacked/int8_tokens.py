"""Rounding few activations to whole numbers of 8 bits, into an array with room for more.

Written in Pallas' Triton dialect, which starts in a fraction of a second. XLA would round in two
passes, and fill the rest of the array byte by byte, which took longer than the product.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from amskv_jax.stacked.int8_rounding import LARGEST

TOKENS = 4
"""Tokens that a thread block takes one after the other."""


@partial(jax.jit, static_argnames="size")
def padded_int8_tokens(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Do what ``int8_rounding.int8_tokens`` does, and leave what is beyond the tokens as it is.

    Args:
      x: [T, in].
      size: of the result, T or more.

    Returns:
      Numbers [size, in] int8, and what each token is to be multiplied with, [size] float32.
    """
    tokens, width = x.shape
    lanes = pl.next_power_of_2(width)

    def round_kernel(x_ref: Any, numbers_ref: Any, scale_ref: Any) -> None:
        first = pl.program_id(0) * TOKENS
        channels = jnp.arange(lanes)
        inside = channels < width

        def round_token(i: Any, carry: None) -> None:
            token = first + i
            place = token, channels
            loaded: Any = pltriton.load(x_ref.at[place], mask=inside, other=0.0)
            own = loaded.astype(jnp.float32)
            most = jnp.abs(own).max()
            most = jnp.where(most > 0, most, 1.0 * LARGEST)
            rounded = jnp.floor(own * (LARGEST / most) + 0.5)  # the dialect has no ``round``
            pltriton.store(numbers_ref.at[place], rounded.astype(jnp.int8), mask=inside)
            scale_ref[token] = most / LARGEST

        lax.fori_loop(0, jnp.minimum(TOKENS, tokens - first), round_token, None)

    numbers, scale = pl.pallas_call(
        round_kernel,
        grid=(pl.cdiv(tokens, TOKENS),),
        out_shape=(
            jax.ShapeDtypeStruct((size, width), jnp.int8),
            jax.ShapeDtypeStruct((size,), jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=jax.default_backend() == "cpu",
    )(x)
    return numbers, scale
