"""Sequences of numbers as tables that a program looks up while it runs: what differs is data.

Layers, and devices that share the heads, differ in which slots they read and write. One program
serves them all if these numbers are looked up by a *place*: a layer of a device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Run = tuple[int, int]
"""Consecutive whole numbers: the first one, and how many there are."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of whole numbers, of which every place has one or several.

    Numbers that count on are kept as their first one, so that no large table is in the program.

    Attributes:
      starts: [places, ..., stretches] int32: where in its sequence each stretch of consecutive
        numbers starts; ``length`` where there is none.
      jumps: likewise, by how much its numbers exceed those which would come there had the stretch
        before it gone on.
      length: of every sequence; one that has fewer numbers counts on.
    """

    starts: np.ndarray
    jumps: np.ndarray
    length: int

    @classmethod
    def of(
        cls, sequences: Iterable[Iterable[Run]], shape: Sequence[int], length: int
    ) -> "Sequences":
        """Return the tables of sequences.

        Args:
          sequences: the runs of every sequence, one after the other.
          shape: [places, ...], in which they are given.
          length: of every sequence, or more.
        """
        found = []
        for runs in sequences:
            starts, shifts, count = [0], [0], 0
            for first, numbers in runs:
                if first - count != shifts[-1]:
                    starts.append(count)
                    shifts.append(first - count)
                count += numbers
            found.append((starts, np.diff(shifts, prepend=0)))
        most = max(len(starts) for starts, _ in found)
        tables = np.zeros((2, len(found), most), np.int32)
        tables[0] = length
        for row, stretches in enumerate(found):
            tables[:, row, : len(stretches[0])] = stretches
        starts, jumps = tables.reshape(2, *shape, most)
        return cls(starts, jumps, length)

    def at(self, place: jax.Array | int) -> jax.Array:
        """Return the sequences of a place, [..., length] int32."""
        starts, jumps = (looked_up(table, place) for table in (self.starts, self.jumps))
        shape = *starts.shape[:-1], self.length
        position = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        passed = position[..., None] >= starts[..., None, :]
        return position + jnp.where(passed, jumps[..., None, :], 0).sum(-1, dtype=jnp.int32)


def looked_up(table: np.ndarray, place: jax.Array | int) -> jax.Array:
    """Return what a table [places, ...] has for one of them."""
    return lax.dynamic_index_in_dim(jnp.asarray(table), place, keepdims=False)
