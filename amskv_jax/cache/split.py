"""Slots of layers whose heads keep different tokens, where devices share the heads.

All devices run one program, yet what their heads keep differs from device to device. So a layer's
buffer is as large as the largest need, and each device lays out its own heads in it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax

from amskv_jax.attention import QKV, Implementation
from amskv_jax.cache.heads import HeadSlots
from amskv_jax.cache.store import KVCache, Store
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
        return max(slots.flat.capacity for slots in self.devices)

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
                return slots.attend(cache, layer, step, qkv, scale, implementation)

            return attend

        branches = [run(slots) for slots in self.devices]
        own: tuple[jax.Array, KVCache] = lax.switch(
            lax.axis_index(MODEL), branches, cache, layer, qkv
        )
        return own
