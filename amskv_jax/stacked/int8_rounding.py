"""Rounding to whole numbers of 8 bits."""

import jax
import jax.numpy as jnp

LARGEST = 127
"""The largest number: -128 is not used."""


def int8_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return activations [T, in] as int8, and what each token is to be multiplied with, float32."""
    return rounded_to_int8(x, axis=1)


def rounded_to_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return int8 numbers, and the scales by which the largest along an axis is ``LARGEST``."""
    x = x.astype(jnp.float32)
    most = jnp.abs(x).max(axis)
    most = jnp.where(most > 0, most, LARGEST)
    rounded = jnp.round(x * jnp.expand_dims(LARGEST / most, axis)).astype(jnp.int8)
    return rounded, most / LARGEST
