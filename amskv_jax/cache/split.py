"""Slots of layers whose heads keep different tokens, where devices share the heads.

All devices run one program, yet what their heads keep differs from device to device. So a layer's
buffers are as large as the largest need, and each device lays out its own heads in them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax

from amskv_jax.attention import QKV, Implementation
from amskv_jax.cache.heads import HeadSlots
from amskv_jax.cache.static import StaticSlots
from amskv_jax.cache.store import KVCache, Store
from amskv_jax.mesh import MODEL
from amskv_jax.plan.mixed import MixedRow
from amskv_jax.plan.rows import HeadRow
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class SplitHeadSlots:
    """Slots of a layer's heads on all devices that share them.

    Attributes:
      devices: the slots of every device's heads, in the order of the mesh.
    """

    devices: tuple[HeadSlots, ...]

    @classmethod
    def of(
        cls, row: HeadRow | MixedRow, schedule: ScaleSchedule, store: Store, shards: int
    ) -> "SplitHeadSlots | HeadSlots":
        """Assign slots to everything the row keeps; if all devices' heads are alike, as ever."""
        heads = np.arange(len(row.parts[0].row.heads))
        rows = [row.share(part) for part in np.split(heads, shards)]
        slots = tuple(HeadSlots.of(part, schedule, store) for part in rows)
        return slots[0] if len(set(slots)) == 1 else cls(slots)

    @property
    def largest(self) -> tuple[StaticSlots, ...]:
        """Per format of numbers, the slots of the device that needs most, over all its heads."""
        formats = zip(*(slots.flats for slots in self.devices), strict=True)
        return tuple(max(flats, key=lambda flat: flat.capacity) for flats in formats)

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> tuple[KVCache, ...]:
        """Return empty buffers of one device, as ``HeadSlots.init``."""
        return tuple(flat.init(layers, rows, 1, head_dim) for flat in self.largest)

    def attend(
        self,
        cache: tuple[KVCache, ...],
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Attend with this device's heads; see ``store.Slots``."""

        def run(slots: HeadSlots) -> Callable[..., tuple[jax.Array, tuple[KVCache, ...]]]:
            def attend(
                cache: tuple[KVCache, ...], layer: jax.Array, qkv: QKV
            ) -> tuple[jax.Array, tuple[KVCache, ...]]:
                return slots.attend(cache, layer, step, qkv, scale, implementation)

            return attend

        branches = [run(slots) for slots in self.devices]
        own: tuple[jax.Array, tuple[KVCache, ...]] = lax.switch(
            lax.axis_index(MODEL), branches, cache, layer, qkv
        )
        return own
