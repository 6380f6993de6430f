"""Online AMS-KV: every layer's class is decided while the pictures are drawn, from their own keys.

This is the paper's algorithm as written. Shapes must not depend on data, so the buffers hold every
scale and a mask says what the layer still sees: it saves no memory, and shows what a plan made by
calibration should do.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from amskv_jax.attention import QKV, Implementation, attend
from amskv_jax.cache.store import KVCache, Store, after, read, write
from amskv_jax.mesh import DATA, MODEL, mean_over
from amskv_jax.plan.runtime_rows import OnlineRow
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.similarity import key_similarity

HIDDEN = -1e9
"""Added to the logits of hidden tokens before the attention's own factor: their weight is zero."""


@struct.dataclass
class OnlineCache:
    """Keys and values of all scales, and what the layers see of them.

    Attributes:
      tokens: the buffers, in the order of the sequence.
      visible: the scales which each layer's cache holds, [layers, S] bool.
      expanded: the layers which have proved demanding, [layers] bool.
    """

    tokens: KVCache
    visible: jax.Array
    expanded: jax.Array


class Decision(NamedTuple):
    """What a layer decides after a scale.

    Attributes:
      similarity: to the scale before, mean over the whole batch, float32 scalar; NaN at scale 0.
      visible: the scales which the cache holds from now on, [S] bool.
      expanded: whether the layer has proved demanding, bool scalar.
    """

    similarity: jax.Array
    visible: jax.Array
    expanded: jax.Array


@dataclass(frozen=True)
class OnlineSlots:
    """Buffers for all scales of layers that share a row.

    Attributes:
      store: how numbers are kept.
      schedule: the scales.
      row: the capacities.
    """

    store: Store
    schedule: ScaleSchedule
    row: OnlineRow

    @classmethod
    def of(cls, row: OnlineRow, schedule: ScaleSchedule, store: Store) -> "OnlineSlots":
        """Return the slots of a row."""
        return cls(store, schedule, row)

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> OnlineCache:
        """Return empty buffers."""
        return OnlineCache(
            tokens=self.store.init(layers, rows, self.row.capacity, num_heads, head_dim),
            visible=jnp.zeros((layers, self.schedule.num_scales), bool),
            expanded=jnp.zeros(layers, bool),
        )

    def attend(
        self,
        cache: OnlineCache,
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, OnlineCache]:
        """Attend to what is visible and to the step's own tokens, then decide what stays visible.

        Arguments and result are those of ``cache.StaticSlots.attend``; the back end is always XLA.
        """
        query, key, value, _ = qkv
        offset, size = self.schedule.offsets[step], self.schedule.tokens[step]
        keys, values = self.store.with_own([read(cache.tokens, layer, 0, offset)], key, value)
        # One more channel carries the mask through the product of queries and keys.
        seen = jnp.concatenate([cache.visible[layer, :step], jnp.ones(1, bool)])
        seen = jnp.repeat(
            seen,
            np.array(self.schedule.tokens[: step + 1]),
            total_repeat_length=offset + size,
        )
        mask = jnp.where(seen, 0, HIDDEN).astype(keys.dtype)[:, None, None]
        keys = jnp.concatenate([keys, jnp.broadcast_to(mask, (*keys.shape[:-1], 1))], axis=-1)
        query = jnp.concatenate([query, jnp.ones((*query.shape[:-1], 1), query.dtype)], axis=-1)
        output = attend(query, keys, values, scale, "xla")
        if step + 1 == self.schedule.num_scales:
            return output, cache
        decision = self.decide(cache, layer, step, key)
        layer, own = after(output, layer, cache.tokens), self.store.encode(key, value)
        return output, OnlineCache(
            tokens=write(cache.tokens, layer, offset, own),
            visible=cache.visible.at[layer].set(decision.visible),
            expanded=cache.expanded.at[layer].set(decision.expanded),
        )

    def decide(self, cache: OnlineCache, layer: jax.Array, step: int, key: jax.Array) -> Decision:
        """Return what the layer decides once the step's keys [rows, T, heads, head_dim] are known.

        One decision is taken for the whole batch, so pictures depend on their neighbours here, and
        the devices of a mesh on each other.
        """
        schedule, row = self.schedule, self.row
        size, tokens = schedule.tokens[step], np.array(schedule.tokens)
        visible, expanded = cache.visible[layer], cache.expanded[layer]
        used = (visible * tokens).sum()
        similarity = jnp.float32(jnp.nan)
        if step:
            part = read(cache.tokens, layer, schedule.offsets[step - 1], schedule.tokens[step - 1])
            # As the cache holds them both.
            previous = self.store.decode(part, jnp.float32)[0]
            own = self.store.decode(self.store.encode(key, key), jnp.float32)[0]
            grids = schedule.grids[step - 1], schedule.grids[step]
            similarity = mean_over(key_similarity(previous, own, *grids)[0].mean(), DATA, MODEL)
            capacity = jnp.where(expanded, row.c_max, row.c_min)
            expanded |= (used + size > capacity) & (similarity < row.theta)
        capacity = jnp.where(expanded, row.c_max, row.c_min)
        condensed = np.arange(len(tokens)) < row.condensed
        locked = (visible * condensed * tokens).sum()
        local = visible & ~condensed
        # Evicting the oldest first leaves those which fit together with all later ones.
        with_later = jnp.cumsum((local * tokens)[::-1])[::-1]
        stays = condensed | (locked + with_later + size <= capacity)
        kept = (visible & stays) | (np.arange(len(tokens)) == step)
        visible = jnp.where(locked + size <= capacity, kept, visible)
        return Decision(similarity, visible, expanded)


@dataclass(frozen=True)
class DecisionObserver:
    """Records the decisions of a plan of ``OnlineRow``; see ``stack.Observer``."""

    per_row: ClassVar[bool] = False

    def __call__(
        self,
        slots: Any,
        cache: OnlineCache,
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
    ) -> Decision:
        """Return what the layer decides after ``step``, the last one included."""
        assert isinstance(slots, OnlineSlots), "the plan is decided while drawing"
        return slots.decide(cache, layer, step, qkv[1])
