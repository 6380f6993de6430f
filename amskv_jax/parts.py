"""Taking a batch in parts, one after the other, where all at once would need too much memory."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def in_parts(function: Callable[..., Any], parts: int, *trees: Any) -> Any:
    """Return ``function(*trees)``, computed for ``parts`` equal parts of the batch in turn.

    Args:
      function: what it returns for a picture, or batch row, depends on that one alone.
      parts: how many; divides the leading axis of every leaf.
      *trees: arrays whose leading axes are pictures or batch rows; None stays None.
    """
    if parts == 1:
        return function(*trees)

    def apart(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(parts, len(leaf) // parts, *leaf.shape[1:])

    mapped = lax.map(lambda some: function(*some), jax.tree.map(apart, trees))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), mapped)
