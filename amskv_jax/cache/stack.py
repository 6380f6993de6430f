"""Running the blocks of a transformer over stacked weights and the cache, by ``lax.scan``."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jax import lax

from amskv_jax.attention import QKV, Attention, Implementation
from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.store import Slots
from amskv_jax.packed_weight import widened

MAX_SCANS = 4
"""Runs of equal layers up to this number are scanned one by one. More would make the compiled
program long, so all layers are then scanned at once and each picks its group's attention with a
switch."""

Block = Callable[[Any, jax.Array, Attention], tuple[jax.Array, Any]]
"""Maps one layer's weights, its input and an attention to its output and the attention's carry."""


class Observer(Protocol):
    """Looks at the attention of every layer during generation; hashable, pure.

    What it returns must have the same shapes for all layers that are scanned together.

    Attributes:
      per_row: whether the first axis of what it returns are the batch's rows; if not, it returns
        the same on all devices of a mesh.
    """

    per_row: ClassVar[bool]

    def __call__(
        self, slots: Slots, cache: Any, layer: jax.Array, step: int, qkv: QKV, scale: float
    ) -> Any:
        """Return arrays to be stacked over layers, from the cache before it is updated.

        Arguments are those of ``Slots.attend``.
        """
        ...


def apply_blocks(
    block: Block,
    weights: Any,
    x: jax.Array,
    caches: tuple[Any, ...],
    layout: CacheLayout,
    step: int,
    *,
    scale: float,
    implementation: Implementation,
    observe: Observer | None = None,
) -> tuple[jax.Array, tuple[Any, ...], list[Any]]:
    """Run all blocks on the tokens of one scale.

    Args:
      block: the block.
      weights: pytree whose leaves have a leading layer axis; a layer is read inside the scan, as
        slicing groups of layers out beforehand would copy them. Packed ones are widened there, so
        that no more than a layer of them is there in full.
      x: input of the first block, [rows, T, width].
      caches: one entry per group of ``layout``.
      layout: the cache's layout.
      step: the step, static.
      scale: factor of the attention logits.
      implementation: attention back end.
      observe: see ``Observer``.

    Returns:
      The output of the last block, the updated caches, and what ``observe`` returned, one entry per
      scan with leaves stacked over its layers.
    """
    observed = []
    for start, stop in _scans(layout.group_of):
        members = sorted(set(layout.group_of[start:stop]))

        def body(carry: Any, position: QKV, members: list[int] = members) -> tuple[Any, Any]:
            x, local = carry
            layer, branch, index = position

            def attention(
                query: jax.Array, key: jax.Array, value: jax.Array
            ) -> tuple[jax.Array, Any]:
                qkv = query, key, value

                def visit(member: int) -> Callable[..., Any]:
                    slots = layout.groups[members[member]]

                    def run(local: Any, index: jax.Array, qkv: Any) -> Any:
                        seen = None
                        if observe is not None:
                            seen = observe(slots, local[member], index, step, qkv, scale)
                        output, cache = slots.attend(
                            local[member], index, step, qkv, scale, implementation
                        )
                        return output, (*local[:member], cache, *local[member + 1 :]), seen

                    return run

                branches = [visit(member) for member in range(len(members))]
                output, updated, seen = lax.switch(branch, branches, local, index, qkv)
                return output, (updated, seen)

            own = widened(
                jax.tree.map(
                    lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), weights
                )
            )
            x, (local, seen) = block(own, x, attention)
            return (x, local), seen

        positions = np.array(
            [
                (layer, members.index(layout.group_of[layer]), layout.index_in_group[layer])
                for layer in range(start, stop)
            ],
            np.int32,
        ).T
        (x, local), seen = lax.scan(body, (x, tuple(caches[g] for g in members)), tuple(positions))
        observed.append(seen)
        updates = dict(zip(members, local, strict=True))
        caches = tuple(updates.get(group, cache) for group, cache in enumerate(caches))
    return x, caches, observed


def _scans(group_of: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the layer ranges that are scanned together."""
    starts = [0, *(i for i in range(1, len(group_of)) if group_of[i] != group_of[i - 1])]
    if len(starts) > MAX_SCANS:
        starts = [0]
    return list(zip(starts, [*starts[1:], len(group_of)], strict=True))
