"""Products in float8_e4m3fn: with which scales, and on which devices.

Weights are rounded once, when they are loaded, times a power of two per layer; activations where
they are used, as they are. No finer scale is more exact: a floating-point number keeps its relative
precision over fifteen binary orders of magnitude, and norms, attention and GELU make numbers of the
order of one. So no pass over the activations looks for their largest, and nothing is left to be
multiplied onto the result: XLA makes one cuBLASLt call of product, bias and GELU.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from amskv_jax.errors import AmskvError
from amskv_jax.hopper import VERSIONS, has_mosaic
from amskv_jax.precision import FLOAT8, LARGEST_FLOAT8, to_float8

CAPABILITY = 8.9
"""Compute capability from which NVIDIA GPUs multiply float8 numbers: Ada, Hopper and later."""


@struct.dataclass
class Float8Weight:
    """A kernel in float8, transposed: the contracted channels come last, as cuBLASLt wants them.

    Attributes:
      transposed: [..., out, in] float8_e4m3fn.
      scale: what they are to be multiplied with, a power of two for every layer, [...] bfloat16.
    """

    transposed: jax.Array
    scale: jax.Array


@jax.jit
def float8_weight(kernel: jax.Array) -> Float8Weight:
    """Return a kernel [..., in, out] or, shared by devices in equal parts, [..., in, parts, out].

    Of the latter the numbers are [..., parts, out, in].
    """
    layers = kernel.shape[0]
    most = jnp.abs(kernel.reshape(layers, -1)).max(-1).astype(jnp.float32)
    exponent = jnp.floor(jnp.log2(LARGEST_FLOAT8 / jnp.where(most > 0, most, LARGEST_FLOAT8)))
    scale = jnp.exp2(exponent).astype(kernel.dtype)
    scaled = kernel * jnp.expand_dims(scale, tuple(range(1, kernel.ndim)))
    return Float8Weight(
        jnp.moveaxis(scaled.astype(jnp.float8_e4m3fn), 1, -1),
        jnp.exp2(-exponent).astype(jnp.bfloat16),
    )


def float8_product(x: jax.Array, weight: Float8Weight) -> jax.Array:
    """Return the product of x [..., in] and a layer's weight, [..., out] bfloat16.

    The operands are those of a bfloat16 product, all of which float8 can hold: where a device has
    no float8 units, or XLA does not know the pattern, the result is the same.
    """
    x = to_float8(x)
    numbers = weight.transposed.astype(jnp.bfloat16) * weight.scale
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x.astype(jnp.bfloat16), numbers, dimensions)


def check_float8(dtype: str) -> None:
    """Raise an AmskvError if the default device can't compute fast what ``dtype`` says of products.

    These are float8 products, for which it needs the units, and for some choices products in whole
    numbers, for which it needs the kernel.
    """
    if dtype not in FLOAT8:
        return
    device: Any = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    found = f"{device.device_kind} ({device.platform})"
    if device.platform == "gpu" and re.fullmatch(r"\d+\.\d+", capability):
        found = f"{device.device_kind}, of compute capability {capability},"
        if float(capability) >= CAPABILITY:
            _check_kernel(dtype, found)
            return
    raise AmskvError(
        f"{found} has no float8 products: expected an NVIDIA GPU of compute capability "
        f"{CAPABILITY} or more, such as H100. Draw with --dtype bfloat16"
    )


def _check_kernel(dtype: str, found: str) -> None:
    """Raise an AmskvError if ``dtype`` has products in whole numbers, and no kernel for them."""
    if "int8" in FLOAT8[dtype].values() and not has_mosaic():
        raise AmskvError(
            f"--dtype {dtype} needs a GPU of compute capability 9.0, such as H100, and "
            f"JAX {'.'.join(map(str, VERSIONS[0]))} or later; found {found} and JAX "
            f"{jax.__version__}. Draw with --dtype float8-fast or bfloat16"
        )
