"""Weights which stay in 8 bits until they are used, a layer at a time."""

from typing import Any

import jax
import numpy as np
from flax import struct


@struct.dataclass
class PackedWeight:
    """Weights as whole numbers times a scale per output channel; on a device or on the host.

    Attributes:
      codes: [..., in, out] int8.
      scale: [..., 1, out] float32.
      dtype: name of the type in which they are used.
    """

    codes: jax.Array | np.ndarray
    scale: jax.Array | np.ndarray
    dtype: str = struct.field(pytree_node=False, default="float32")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights."""
        return self.codes.shape

    def widened(self) -> Any:
        """Return the weights [..., in, out] in ``dtype``: rounded from the float32 product."""
        return (self.codes.astype(np.float32) * self.scale).astype(jax.numpy.dtype(self.dtype))


def widened(tree: Any) -> Any:
    """Return a tree with arrays in place of its packed weights; all else is left as it is."""
    return jax.tree.map(
        lambda leaf: leaf.widened() if is_packed(leaf) else leaf, tree, is_leaf=is_packed
    )


def is_packed(leaf: Any) -> bool:
    """Return whether something is a packed weight."""
    return isinstance(leaf, PackedWeight)
