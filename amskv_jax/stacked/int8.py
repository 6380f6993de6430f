"""Products of whole numbers of 8 bits, with a scale for every token and every output channel.

A floating-point number of 8 bits keeps three after its first, whatever its size. Whole numbers keep
seven of the largest number of a token, which norms leave not much larger than the others: a tenth
of the loss (docs/performance.md).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import DTypeLike

from amskv_jax.hopper import has_mosaic
from amskv_jax.precision import to_float8
from amskv_jax.stacked.int8_rounding import int8_tokens, rounded_to_int8
from amskv_jax.stacked.sizes import INT8_SUMMED, INT8_WRITTEN


@struct.dataclass
class Int8Weight:
    """The kernels of all layers in whole numbers of 8 bits, and the one that is meant.

    Attributes:
      transposed: [layers, out, in] int8.
      channel_scale: what they are to be multiplied with, [layers, out] float32.
      layer: int32 scalar; None as long as none is chosen.
    """

    transposed: jax.Array
    channel_scale: jax.Array
    layer: jax.Array | None = None

    def product(self, x: jax.Array, bias: jax.Array, *, gelu: bool, dtype: DTypeLike) -> jax.Array:
        """Return the product with the layer's kernel, plus the bias, and of that GELU if wanted.

        Sums are exact; scales, bias and the tanh-approximated GELU are in float32, rounded once.

        Args:
          x: [..., in], rounded here.
          bias: [out].
          gelu: whether GELU follows.
          dtype: of the result; numbers that float8_e4m3fn does not reach become its largest.

        Returns:
          [..., out].
        """
        assert self.layer is not None, "a layer is chosen"
        tokens = x.reshape(-1, x.shape[-1])
        if self._fits():
            # Half a second, and of no use to most.
            from amskv_jax.stacked.int8_kernel import int8_product  # noqa: PLC0415

            y = int8_product(
                tokens,
                self.transposed,
                self.channel_scale,
                self.layer,
                bias.astype(jnp.bfloat16),
                gelu=gelu,
                dtype=jnp.dtype(dtype),
            )
        else:
            y = self._product(tokens, bias, gelu)
            y = to_float8(y) if dtype == jnp.float8_e4m3fn else y.astype(dtype)
        return y.reshape(*x.shape[:-1], -1)

    def _fits(self) -> bool:
        """Return whether the kernel's tiles divide the weights, and the device can run it."""
        _, outputs, inputs = self.transposed.shape
        return inputs % INT8_SUMMED == 0 and outputs % INT8_WRITTEN == 0 and has_mosaic()

    def _product(self, x: jax.Array, bias: jax.Array, gelu: bool) -> jax.Array:
        """Do what ``product`` does, in float32; the device chooses in which type numbers lie."""

        def own(stack: jax.Array) -> Any:
            return lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)

        rounded, token_scale = int8_tokens(x)
        # Both types hold the numbers; CPUs are slow in the shorter one.
        numbers = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        y = lax.dot_general(
            rounded.astype(numbers),
            own(self.transposed).astype(numbers),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        y = y * token_scale[:, None] * own(self.channel_scale)[None]
        y += bias[None].astype(jnp.float32)
        return jax.nn.gelu(y, approximate=True) if gelu else y


@jax.jit
def int8_weight(kernel: jax.Array) -> Int8Weight:
    """Return kernels [layers, in, out] or, shared by devices in equal parts, [..., in, parts, out].

    Of the latter the numbers are [..., parts, out, in], and the scales [..., parts, out].
    """
    numbers, scale = rounded_to_int8(kernel, axis=1)
    return Int8Weight(jnp.moveaxis(numbers, 1, -1), scale)
