"""Slots of layers whose heads keep different tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from amskv_jax.attention import QKV, Implementation
from amskv_jax.cache.static import StaticSlots
from amskv_jax.cache.store import KVCache, Store
from amskv_jax.plan.rows import HeadRow
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class HeadSlots:
    """Slots of a layer whose heads keep different tokens: one cache per set of equal heads.

    Attributes:
      groups: the slots of every set of heads.
      heads: the heads of every set.
    """

    groups: tuple[StaticSlots, ...]
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, row: HeadRow, schedule: ScaleSchedule, store: Store) -> "HeadSlots":
        """Assign slots to everything the row keeps."""
        groups = tuple(StaticSlots.of(part, schedule, store) for part in row.groups)
        return cls(groups, tuple(row.groups.values()))

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> tuple[KVCache, ...]:
        """Return empty buffers, one entry per set of heads."""
        return tuple(
            group.init(layers, rows, len(heads), head_dim)
            for group, heads in zip(self.groups, self.heads, strict=True)
        )

    def attend(
        self,
        cache: tuple[KVCache, ...],
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Attend with every set of heads to its own cache; see ``StaticSlots.attend``."""
        query, key, value = qkv
        outputs, caches = [], []
        for group, heads, part in zip(self.groups, map(np.array, self.heads), cache, strict=True):
            own = query[:, :, heads], key[:, :, heads], value[:, :, heads]
            output, updated = group.attend(part, layer, step, own, scale, implementation)
            outputs.append(output)
            caches.append(updated)
        order = np.argsort(np.concatenate(self.heads))
        return jnp.concatenate(outputs, axis=2)[:, :, order], tuple(caches)
