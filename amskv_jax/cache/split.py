"""Slots of layers whose heads keep different tokens, where devices share the heads.

All devices run one program, yet the sets of equal heads differ from device to device. So a layer
has one pool of slots, as large as the largest need, and each device lays out its own sets in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.attention import QKV, Implementation
from amskv_jax.cache.heads import HeadSlots
from amskv_jax.cache.store import KVCache, Store, after, read, write
from amskv_jax.mesh import MODEL
from amskv_jax.plan.rows import HeadRow
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class SplitHeadSlots:
    """Slots of a layer's heads on all devices that share them.

    Attributes:
      store: how numbers are kept.
      devices: the slots of every device's heads, in the order of the mesh.
    """

    store: Store
    devices: tuple[HeadSlots, ...]

    @classmethod
    def of(
        cls, row: HeadRow, schedule: ScaleSchedule, store: Store, shards: int
    ) -> "SplitHeadSlots | HeadSlots":
        """Assign slots to everything the row keeps; if all devices' heads are alike, as ever."""
        parts = np.split(np.arange(len(row.heads)), shards)
        rows = [HeadRow(tuple(row.heads[head] for head in part)) for part in parts]
        slots = tuple(HeadSlots.of(part, schedule, store) for part in rows)
        return slots[0] if len(set(slots)) == 1 else cls(store, slots)

    @property
    def capacity(self) -> int:
        """Slots of one device, over all its heads."""
        return max(_ends(slots)[-1] for slots in self.devices)

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> KVCache:
        """Return empty buffers of one device, leaves [layers, rows, capacity, 1, something]."""
        return self.store.init(layers, rows, self.capacity, 1, head_dim)

    def attend(
        self,
        cache: KVCache,
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, KVCache]:
        """Attend with this device's heads; see ``store.Slots``."""

        def run(slots: HeadSlots) -> Callable[..., tuple[jax.Array, KVCache]]:
            def attend(cache: KVCache, layer: jax.Array, qkv: QKV) -> tuple[jax.Array, KVCache]:
                ends = _ends(slots)
                parts = tuple(
                    _unfold(read(cache, layer, start, end - start), len(heads))
                    for start, end, heads in zip(ends, ends[1:], slots.heads, strict=False)
                )
                first = jnp.int32(0)
                output, updated = slots.attend(parts, first, step, qkv, scale, implementation)
                layer = after(output, layer, cache)
                for group, start, part in zip(slots.groups, ends, updated, strict=False):
                    if group.writes[step]:
                        cache = write(cache, layer, start, _fold(part))
                return output, cache

            return attend

        branches = [run(slots) for slots in self.devices]
        own: tuple[jax.Array, KVCache] = lax.switch(
            lax.axis_index(MODEL), branches, cache, layer, qkv
        )
        return own


def _ends(slots: HeadSlots) -> tuple[int, ...]:
    """Return where in the pool every set of heads begins, and where the last ends."""
    sizes = [
        group.capacity * len(heads) for group, heads in zip(slots.groups, slots.heads, strict=True)
    ]
    return tuple(accumulate(sizes, initial=0))


def _unfold(part: Any, heads: int) -> Any:
    """Return leaves [rows, slots x heads, 1, n] as [1, rows, slots, heads, n]."""
    return jax.tree.map(lambda x: x.reshape(1, len(x), -1, heads, x.shape[-1]), part)


def _fold(part: Any) -> Any:
    """Undo ``_unfold``."""
    return jax.tree.map(lambda x: x.reshape(x.shape[1], -1, 1, x.shape[-1]), part)
