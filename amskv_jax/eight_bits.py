"""Which products are of numbers of 8 bits, and of which kind."""

from collections.abc import Callable
from typing import Any

import jax

from amskv_jax.float8 import float8_weight
from amskv_jax.precision import FLOAT8
from amskv_jax.stacked import int8_weight

GRANULE = 16
"""cuBLASLt takes float8 matrices whose sides are multiples of this."""
ROUNDINGS: dict[str, Callable[[jax.Array], Any]] = {
    "float8_e4m3fn": float8_weight,
    "int8": int8_weight,
}
"""Kinds of numbers -> what rounds the kernels of all layers to them."""


def rounding_of(path: str, shape: tuple[int, ...], dtype: str) -> Callable[[jax.Array], Any] | None:
    """Return what rounds a parameter's numbers to 8 bits where products are in ``dtype``.

    Args:
      path: "part/path" of the parameter.
      shape: of all layers.
      dtype: any; nothing is rounded so if it is not one of ``FLOAT8``.

    Returns:
      A function of the parameter, or None if it stays as it is.
    """
    kinds = {
        f"transformer/blocks/{layer}/kernel": kind for layer, kind in FLOAT8.get(dtype, {}).items()
    }
    if path not in kinds or any(side % GRANULE for side in shape[-2:]):
        return None
    return ROUNDINGS[kinds[path]]
