"""The scale-indexed key/value cache of a whole model, laid out before tracing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from amskv_jax.cache.heads import HeadSlots
from amskv_jax.cache.online import OnlineSlots
from amskv_jax.cache.selecting import SelectingSlots
from amskv_jax.cache.static import StaticSlots
from amskv_jax.cache.store import Slots, Store
from amskv_jax.errors import AmskvError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import Row, StaticRow
from amskv_jax.plan.runtime_rows import OnlineRow, SelectingRow
from amskv_jax.schedule import ScaleSchedule

SLOTS: dict[type, Callable[[Any, ScaleSchedule, Store], Slots]] = {
    StaticRow: StaticSlots.of,
    SelectingRow: SelectingSlots.of,
    OnlineRow: OnlineSlots.of,
}
"""Kind of row -> how slots are assigned, for kinds of which only equal rows share buffers."""


def slots_of(rows: Sequence[Any], schedule: ScaleSchedule, store: Store, shards: int = 1) -> Slots:
    """Assign slots to a group of layers, whose heads ``shards`` devices share.

    Args:
      rows: of the layers: equal ones, or pooled ones; see ``rows.Row``.
      schedule: the scales.
      store: how numbers are kept.
      shards: how many devices there are.

    Raises:
      AmskvError: if the kind is unknown.
    """
    if rows[0].pooled:
        return HeadSlots.of(rows, schedule, store, shards)
    kind = type(rows[0])
    if kind not in SLOTS:
        raise AmskvError(
            f"no slots are known for a row of the kind {kind.__name__}: "
            f"expected {', '.join(known.__name__ for known in SLOTS)}"
        )
    return SLOTS[kind](rows[0], schedule, store)


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a whole model: one set of buffers per group of layers.

    Attributes:
      groups: the groups' slots.
      group_of: for every layer, the index of its group; see ``RetentionPlan``.
      index_in_group: for every layer, how many layers of its group come before it.
    """

    groups: tuple[Slots, ...]
    group_of: tuple[int, ...]
    index_in_group: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, plan: RetentionPlan, store: Store, shards: int = 1) -> "CacheLayout":
        """Return the layout of a plan whose numbers are kept by ``store``.

        Args:
          plan: what is kept.
          store: how.
          shards: how many devices share the heads; the layout is that of each.
        """
        group_of = plan.group_of
        index = tuple(group_of[:layer].count(group) for layer, group in enumerate(group_of))
        members: list[list[Row]] = [[] for _ in set(group_of)]
        for row, group in zip(plan.rows, group_of, strict=True):
            members[group].append(row)
        slots = tuple(slots_of(rows, plan.schedule, store, shards) for rows in members)
        return cls(slots, group_of, index)

    def init(self, rows: int, num_heads: int, head_dim: int) -> tuple[Any, ...]:
        """Return empty buffers for ``rows`` batch rows, one entry per group."""
        return tuple(
            group.init(self.group_of.count(index), rows, num_heads, head_dim)
            for index, group in enumerate(self.groups)
        )
