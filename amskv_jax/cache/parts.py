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

    mapped = lax.map(
        lambda some: function(*some),
        jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), trees),
    )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), mapped)


def apart(caches: Any, parts: int) -> Any:
    """Return buffers [layers, rows, ...] with every part's rows as a layer of their own.

    What reads and writes one layer then reads and writes one part's, at ``layer * parts + part``.
    Nothing moves.
    """
    if parts == 1:
        return caches

    def view(leaf: jax.Array) -> jax.Array:
        layers, rows, *rest = leaf.shape
        return leaf.reshape(layers * parts, rows // parts, *rest)

    return jax.tree.map(view, caches)


def together(caches: Any, parts: int) -> Any:
    """Undo ``apart``."""
    if parts == 1:
        return caches

    def view(leaf: jax.Array) -> jax.Array:
        layers, rows, *rest = leaf.shape
        return leaf.reshape(layers // parts, rows * parts, *rest)

    return jax.tree.map(view, caches)
