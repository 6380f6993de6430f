"""Running the blocks of a transformer over stacked weights and the cache, by ``lax.scan``."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.attention import QKV, Attention, Implementation
from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.parts import apart, together
from amskv_jax.cache.store import Slots
from amskv_jax.packed_weight import widened
from amskv_jax.plan.retention import scans
from amskv_jax.stacked import layer_of

Take = Callable[[Any], Any]
"""Returns some of the batch rows of a tree of arrays [rows, ...]."""

Block = Callable[[Any, jax.Array, Attention, Take], tuple[jax.Array, Any]]
"""Maps one layer's weights, its input [some rows, T, width], an attention, and what takes these
rows of anything else, to its output and the attention's carry."""


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
    parts: int = 1,
) -> tuple[jax.Array, tuple[Any, ...], list[Any]]:
    """Run all blocks on the tokens of one scale.

    Args:
      block: the block.
      weights: pytree whose leaves have a leading layer axis; a layer is read inside the scan, as
        slicing groups of layers out beforehand would copy them. Packed ones are widened there, so
        that no more than a layer of them is there in full; stacked ones stay where they are.
      x: input of the first block, [rows, T, width].
      caches: one entry per group of ``layout``.
      layout: the cache's layout.
      step: the step, static.
      scale: factor of the attention logits.
      implementation: attention back end.
      observe: see ``Observer``; it sees all rows at once.
      parts: every block takes the batch rows in so many parts of equal size, one after the other,
        so that its activations are of one part alone. Layers which decide for all rows at once
        (``cache.online``) need 1.

    Returns:
      The output of the last block, the updated caches, and what ``observe`` returned, one entry per
      scan with leaves stacked over its layers.
    """
    assert parts == 1 or observe is None, "an observer sees all rows at once"
    caches = apart(caches, parts)
    observed = []
    for start, stop in scans(layout.group_of):
        members = sorted(set(layout.group_of[start:stop]))

        only = layout.index_in_group[start] if stop - start == 1 else None

        def body(
            carry: Any,
            position: tuple[jax.Array, jax.Array, jax.Array],
            members: list[int] = members,
            only: int | None = only,
        ) -> tuple[Any, Any]:
            x, local = carry
            layer, branch, index = position
            own_index: Any = index if only is None else only

            def attention(part: jax.Array, local: Any, qkv: QKV) -> tuple[jax.Array, Any]:
                place = own_index if parts == 1 else own_index * parts + part

                def visit(member: int, cache: Any) -> Any:
                    slots = layout.groups[members[member]]
                    seen = None
                    if observe is not None:
                        seen = observe(slots, cache, place, step, qkv, scale)
                    output, cache = slots.attend(cache, place, step, qkv, scale, implementation)
                    return cache, (output, seen)

                updated, (output, seen) = _one_of(visit, local, branch)
                return output, (updated, seen)

            own = widened(layer_of(weights, layer))

            def run_part(part: jax.Array, carry: Any) -> tuple[Any, Any]:
                x, local = carry
                size = len(x) // parts

                def take(tree: Any) -> Any:
                    if parts == 1:
                        return tree
                    return jax.tree.map(
                        lambda leaf: lax.dynamic_slice_in_dim(leaf, part * size, size), tree
                    )

                some, (local, seen) = block(
                    own, take(x), lambda qkv: attention(part, local, qkv), take
                )
                if parts > 1:
                    some = lax.dynamic_update_slice_in_dim(x, some, part * size, 0)
                return (some, local), seen

            if parts == 1:
                return run_part(jnp.int32(0), (x, local))
            return lax.fori_loop(0, parts, lambda *part: run_part(*part)[0], (x, local)), None

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
    return x, together(caches, parts), observed


def _one_of(
    visit: Callable[[int, Any], tuple[Any, Any]], caches: tuple[Any, ...], chosen: jax.Array
) -> tuple[tuple[Any, ...], Any]:
    """Visit the cache of the group that is chosen while the program runs.

    A loop of one round or none stands for each ``if``. XLA updates what a loop carries in place,
    but a conditional copies every buffer that one of its branches writes to, all layers of all
    groups, in every layer.

    Args:
      visit: maps a group's number and cache to the cache's new values and a result, whose shapes
        are the same for all groups.
      caches: of all groups.
      chosen: the group, int32 scalar.

    Returns:
      The caches of all groups, and the result.
    """
    if len(caches) == 1:
        cache, result = visit(0, caches[0])
        return (cache,), result
    shapes = jax.eval_shape(lambda cache: visit(0, cache)[1], caches[0])
    result = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    updated = []
    for group, before in enumerate(caches):
        rounds = (chosen == group).astype(jnp.int32)
        cache, result = lax.fori_loop(
            0, rounds, lambda _, carry, group=group: visit(group, carry[0]), (before, result)
        )
        updated.append(cache)
    return tuple(updated), result
