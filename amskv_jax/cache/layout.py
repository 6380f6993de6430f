"""The scale-indexed key/value cache of a whole model, laid out before tracing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from amskv_jax.cache.heads import HeadSlots
from amskv_jax.cache.online import OnlineSlots
from amskv_jax.cache.selecting import SelectingSlots
from amskv_jax.cache.split import SplitHeadSlots
from amskv_jax.cache.static import StaticSlots
from amskv_jax.cache.store import Slots, Store
from amskv_jax.errors import AmskvError
from amskv_jax.plan.mixed import MixedRow
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import HeadRow, Row, StaticRow
from amskv_jax.plan.runtime_rows import OnlineRow, SelectingRow
from amskv_jax.schedule import ScaleSchedule

SLOTS: dict[type, Callable[[Any, ScaleSchedule, Store], Slots]] = {
    StaticRow: StaticSlots.of,
    SelectingRow: SelectingSlots.of,
    HeadRow: HeadSlots.of,
    MixedRow: HeadSlots.of,
    OnlineRow: OnlineSlots.of,
}
"""Kind of row -> how its slots are assigned."""

SPLIT_SLOTS: dict[type, Callable[[Any, ScaleSchedule, Store, int], Slots]] = {
    HeadRow: SplitHeadSlots.of,
    MixedRow: SplitHeadSlots.of,
}
"""Kinds of rows which are not the same for all heads -> how slots are assigned where several
devices share the heads."""


def slots_of(row: Row, schedule: ScaleSchedule, store: Store, shards: int = 1) -> Slots:
    """Assign slots to a row of any kind, whose heads ``shards`` devices share.

    Raises:
      AmskvError: if the kind is unknown.
    """
    if type(row) not in SLOTS:
        raise AmskvError(
            f"no slots are known for a row of the kind {type(row).__name__}: "
            f"expected {', '.join(kind.__name__ for kind in SLOTS)}"
        )
    if shards > 1 and type(row) in SPLIT_SLOTS:
        return SPLIT_SLOTS[type(row)](row, schedule, store, shards)
    return SLOTS[type(row)](row, schedule, store)


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a whole model: one set of buffers per distinct row of the plan.

    Attributes:
      groups: the distinct rows' slots, in order of first appearance.
      group_of: for every layer, the index of its group.
      index_in_group: for every layer, its index in the group's buffers.
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
        rows = list(dict.fromkeys(plan.rows))
        group_of = tuple(rows.index(row) for row in plan.rows)
        index = tuple(group_of[:layer].count(group) for layer, group in enumerate(group_of))
        slots = tuple(slots_of(row, plan.schedule, store, shards) for row in rows)
        return cls(slots, group_of, index)

    def init(self, rows: int, num_heads: int, head_dim: int) -> tuple[Any, ...]:
        """Return empty buffers for ``rows`` batch rows, one entry per group."""
        return tuple(
            group.init(self.group_of.count(index), rows, num_heads, head_dim)
            for index, group in enumerate(self.groups)
        )
