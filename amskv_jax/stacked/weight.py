"""Which products read a layer's kernel where it lies, and what stands for it until then.

A loop over layers has their weights stacked. XLA copies a layer's out of the stack before cuBLAS
reads it, so that weights travel three times, which is most of the time of a step of few tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from amskv_jax.hopper import has_mosaic
from amskv_jax.stacked.int8 import Int8Weight
from amskv_jax.stacked.sizes import GRANULE, SIZES

MOST_TOKENS = SIZES[-1]
"""Tokens of all rows up to which the kernel is used. With 2 to 32 it takes 0.44 to 0.49 of the time
of copying and cuBLAS, with 128 0.51 to 0.54 (H100, widths of 1920 to 2304). More would gain less,
and each size of each product takes half a second to compile."""
MOST_ROWS = 16
"""Batch rows up to which it is used: more have hardly a step of so few tokens."""


@struct.dataclass
class StackedWeight:
    """The kernels of all layers, and the one that is meant.

    Attributes:
      stack: [layers, in, out] bfloat16.
      layer: int32 scalar; None as long as none is chosen.
    """

    stack: jax.Array
    layer: jax.Array | None = None

    def product(self, x: jax.Array, bias: jax.Array, gelu: bool) -> jax.Array:
        """Return the product with the layer's kernel, plus the bias, and of that GELU if wanted.

        Sums, bias and the tanh-approximated GELU are in float32, and are rounded once.

        Args:
          x: [..., in] bfloat16.
          bias: [out] bfloat16.
          gelu: whether GELU follows.

        Returns:
          [..., out] bfloat16.
        """
        # Half a second, and of no use to most.
        from amskv_jax.stacked.kernel import product_of_layer  # noqa: PLC0415

        assert self.layer is not None, "a layer is chosen"
        flat = x.reshape(-1, x.shape[-1])
        y = product_of_layer(flat, self.stack, self.layer, bias, gelu=gelu)
        return y.reshape(*x.shape[:-1], -1)

    def copied(self) -> jax.Array:
        """Return the layer's kernel [in, out], copied out of the stack."""
        assert self.layer is not None, "a layer is chosen"
        kernel: jax.Array = lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)
        return kernel

    def pays(self, x: jax.Array) -> bool:
        """Return whether ``product`` serves x [rows, ..., in], and is worth its compilation."""
        tokens = x.size // x.shape[-1]
        few = len(x) <= MOST_ROWS and tokens <= MOST_TOKENS
        return few and x.dtype == self.stack.dtype


def in_place(weights: Any) -> Any:
    """Return stacked weights, with a ``StackedWeight`` for every kernel that may be read in place.

    These are the bfloat16 ones of sizes that the product's tiles divide, on the GPUs that it is
    written for; on others the weights stay as they are.

    Args:
      weights: parameters of blocks; kernels are at paths that end with "kernel", [layers, in, out].
    """
    if not has_mosaic():
        return weights

    def stacked(path: tuple[Any, ...], leaf: Any) -> Any:
        fits = (
            leaf.ndim == 3
            and leaf.dtype == jnp.bfloat16
            and not any(side % GRANULE for side in leaf.shape[1:])
        )
        is_kernel = jax.tree_util.keystr(path[-1:], simple=True) == "kernel"
        return StackedWeight(leaf) if fits and is_kernel else leaf

    return jax.tree_util.tree_map_with_path(stacked, weights)


def layer_of(weights: Any, layer: jax.Array) -> Any:
    """Return one layer's weights of stacked ones; what may be read in place is not copied."""

    def own(leaf: Any) -> Any:
        if _is_stacked(leaf):
            return leaf.replace(layer=layer)
        return lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

    return jax.tree.map(own, weights, is_leaf=_is_stacked)


def _is_stacked(leaf: Any) -> bool:
    return isinstance(leaf, StackedWeight | Int8Weight)
