"""The walk of one layer through the scales by which AMS-KV decides what the cache holds."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from amskv_jax.schedule import ScaleSchedule


class Walk(NamedTuple):
    """What a layer's cache does over all scales.

    Attributes:
      held: the scale ids in the cache when each step attends.
      overflows: the scales, but the first, which found no room in the capacity of the time.
      needs: every (tokens, capacity) that was compared on the way.
    """

    held: list[list[int]]
    overflows: list[int]
    needs: list[tuple[int, int]]

    def next_capacity(self, capacity: int) -> int | None:
        """Return the smallest larger ``capacity`` at which the walk would go another way."""
        return min((n for n, limit in self.needs if limit == capacity and n > limit), default=None)


def adaptive_walk(
    schedule: ScaleSchedule, c_min: int, c_max: int, condensed: int, expand_at: int | None = None
) -> Walk:
    """Walk one layer through the scales (Algorithm 1 of AMS-KV, arXiv 2511.16047).

    The last scale is read by nobody, so it is not part of the walk.

    Args:
      schedule: the scales.
      c_min: capacity in tokens at first.
      c_max: capacity once the layer has proved demanding.
      condensed: scales below this id are never evicted.
      expand_at: the scale whose arrival raises the capacity; None if the layer is never demanding.
    """
    capacity, cached = c_min, list[int]()
    walk = Walk([[]], [], [])

    def fits(tokens: int) -> bool:
        walk.needs.append((tokens, capacity))
        return tokens <= capacity

    for scale, size in enumerate(schedule.tokens[:-1]):
        used = sum(schedule.tokens[j] for j in cached)
        if not fits(used + size) and scale >= 1:
            walk.overflows.append(scale)
        if scale == expand_at:
            capacity = c_max
        locked = sum(schedule.tokens[j] for j in cached if j < condensed)
        if fits(locked + size):
            while not fits(used + size):
                oldest = next(j for j in cached if j >= condensed)
                cached.remove(oldest)
                used -= schedule.tokens[oldest]
            cached.append(scale)
        walk.held.append(list(cached))
    return walk


def distinct_capacities(walk: Callable[[int], Walk], start: int) -> Iterator[int]:
    """Yield the smallest capacities, from ``start`` on, which lead to different walks."""
    capacity: int | None = start
    while capacity is not None:
        yield capacity
        capacity = walk(capacity).next_capacity(capacity)
