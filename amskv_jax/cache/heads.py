"""Slots of layers whose heads keep different tokens: flat buffers for all heads of all layers.

A step gathers the tokens of every head, pads them to the head that holds most, of all layers, and
attends once, with a length for each: where own tokens must be joined to them, and heads of a layer
hold different numbers, heads are folded into the batch. Layers differ in tables alone, and so do
devices which share the heads: one program serves all of them (``head_tables``).

A slot holds key and value together, so that they are gathered, coded and written as one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from amskv_jax.attention import (
    QKV,
    Cached,
    Implementation,
    attend,
    attend_to_cache,
    reads_cache,
)
from amskv_jax.cache.head_tables import HeadTables, Reading
from amskv_jax.cache.sequences import looked_up
from amskv_jax.cache.store import LayerIndex, Store, empty, joined, later
from amskv_jax.mesh import MODEL
from amskv_jax.numbers import Numbers, Plain, numbers_of
from amskv_jax.plan.mixed import MixedRow
from amskv_jax.plan.rows import HeadRow
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True, eq=False)
class HeadSlots:
    """The slots of all heads of all layers.

    Attributes:
      tables: where their tokens lie.
      numbers: per buffer, how its numbers are kept.
    """

    tables: HeadTables
    numbers: tuple[Numbers, ...]

    @classmethod
    def of(
        cls,
        rows: Sequence[HeadRow | MixedRow],
        schedule: ScaleSchedule,
        store: Store,
        devices: int = 1,
    ) -> "HeadSlots":
        """Assign slots to everything that layers keep.

        Args:
          rows: of the layers.
          schedule: the scales.
          store: serves parts of rows that name no format.
          devices: that share the heads.
        """
        tables = HeadTables.of(rows, schedule, store, devices)
        numbers = (store.numbers if name is None else numbers_of(name) for name in tables.formats)
        return cls(tables, tuple(numbers))

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> tuple[Any, ...]:
        """Return empty buffers, leaves [slots, rows, 2, something] of whole numbers.

        They hold the bits of codes of keys and values: see ``_bits``.
        """
        assert layers == self.tables.layers, "these are the buffers of all layers"
        buffers = zip(self.numbers, self.tables.capacities, strict=True)
        return tuple(
            _bits(empty(numbers, capacity, rows, 2, head_dim)) for numbers, capacity in buffers
        )

    def attend(
        self,
        cache: tuple[Any, ...],
        layer: LayerIndex,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """See ``store.Slots``."""
        reading, place = self.tables.reading[step], self._place(cache, layer)
        keys = reading.longest + qkv.key.shape[1]
        if reads_cache(qkv.query, keys, implementation):
            output = self._attend_apart(cache, place, reading, qkv, scale)
        else:
            output = self._attend_joined(cache, place, reading, qkv, scale, implementation)
        return output, self._written(cache, place, step, qkv, output)

    def _attend_apart(
        self,
        cache: tuple[Any, ...],
        place: "_Place",
        reading: Reading,
        qkv: QKV,
        scale: float,
    ) -> jax.Array:
        """Attend to what heads hold and to own tokens, which are not joined."""
        key = qkv.key
        rows, _, heads, head_dim = key.shape
        lengths = None
        if not reading.equal:
            own = looked_up(reading.lengths, place.row)
            lengths = jnp.broadcast_to(own[None], (rows, heads))
        held = jnp.zeros((rows, 0, heads, 2, head_dim), key.dtype)
        if reading.longest:
            held = self._held(cache, place, reading, key, reading.slots.at(place.row).T)
        spans = ((0, reading.longest),) if reading.longest else ()
        cached = Cached(held[None, ..., 0, :], held[None, ..., 1, :], jnp.int32(0), spans)
        return attend_to_cache(qkv, cached, scale, lengths)[0]

    def _attend_joined(
        self,
        cache: tuple[Any, ...],
        place: "_Place",
        reading: Reading,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> jax.Array:
        """Attend to what heads hold and to own tokens, joined and padded to the longest."""
        rows, length, heads, _ = qkv.query.shape
        lengths = None
        if not reading.equal:
            lengths = looked_up(reading.lengths, place.row) + length
            lengths = jnp.full(rows, lengths[0]) if reading.even else jnp.tile(lengths, rows)
        query, key, value = qkv[:3] if reading.even else map(_folded, qkv[:3])
        if reading.longest:
            slots = reading.slots.at(place.row)
            slots = slots.T if reading.even else slots
            held = self._held(cache, place, reading, key, slots)
            held = held.reshape(len(key), -1, key.shape[2], 2, key.shape[3])
            # The own tokens come first, so that padding comes last.
            key, value = (
                joined([own, held[..., index, :]]) for index, own in enumerate((key, value))
            )
        output = attend(query, key, value, scale, implementation, lengths)
        if not reading.even:
            output = jnp.swapaxes(output.reshape(rows, heads, length, -1), 1, 2)
        return output

    def _place(self, cache: tuple[Any, ...], layer: LayerIndex) -> "_Place":
        """Return the place of a layer, of one part of the batch if this is taken in parts."""
        sizes = [len(jax.tree.leaves(buffer)[0]) for buffer in cache]
        parts = max(sizes) // max(self.tables.capacities) if any(sizes) else 1
        layer, part = (layer, 0) if parts == 1 else (layer // parts, layer % parts)
        device = lax.axis_index(MODEL) if self.tables.devices > 1 else 0
        return _Place(device * self.tables.layers + layer, part, parts)

    def _held(
        self,
        cache: tuple[Any, ...],
        place: "_Place",
        reading: Reading,
        like: jax.Array,
        slots: jax.Array,
    ) -> jax.Array:
        """Return keys and values of tokens, from the buffers in which they are.

        Args:
          cache: the buffers.
          place: the layer.
          reading: of the step.
          like: an array of the type that is wanted.
          slots: of the tokens, [a, b] int32.

        Returns:
          [rows, a, b, 2, head_dim].
        """
        capacities = self.tables.capacities
        found: jax.Array | None = None
        for index in reading.buffers:
            kinds = jax.eval_shape(self.numbers[index].encode, like)
            before = sum(capacities[:index])
            own = place.of_part(jnp.clip(slots - before, 0, capacities[index] - 1))
            codes = jax.tree.map(partial(_gather, own), cache[index], kinds)
            codes = _in_memory(self.numbers[index], codes)
            decoded = self.numbers[index].decode(codes, like.dtype)
            if found is not None:
                decoded = jnp.where((slots >= before)[None, ..., None, None], decoded, found)
            found = decoded
        assert found is not None, "something is read"
        return found

    def _written(
        self, cache: tuple[Any, ...], place: "_Place", step: int, qkv: QKV, output: jax.Array
    ) -> tuple[Any, ...]:
        """Return the buffers with what later steps need of a step's own tokens; no other is coded.

        Args:
          cache: the buffers.
          place: the layer.
          step: the step, static.
          qkv: of its own tokens, as they are.
          output: of its attention, after which the buffers may be written.
        """
        written, (_, key, value, _) = list(cache), qkv
        for index, writing in enumerate(self.tables.writing[step]):
            if writing is None:
                continue
            most = self.tables.capacities[index] + writing.slots.length
            slots = place.of_part(later(output, writing.slots.at(place.row), most))
            chosen, length = writing.tokens.at(place.row), key.shape[1]
            numbers, own = self.numbers[index], []
            for vectors in (key, value):
                found = vectors.at[:, chosen % length, chosen // length].get(mode="clip")
                found = _in_memory(numbers, jnp.swapaxes(found, 0, 1))
                own.append(_bits(numbers.encode(found)))
            pairs = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=2), *own)
            scatter = partial(_scatter, slots)
            written[index] = jax.tree.map(scatter, cache[index], _in_memory(numbers, pairs))
        return tuple(written)


class _Place(NamedTuple):
    """Where a layer is in tables, and its part of the batch in buffers.

    Attributes:
      row: of the tables, see ``HeadTables``.
      part: of ``parts``, each of which has its own share of every slot; see ``parts.apart``.
      parts: in which the batch is taken.
    """

    row: LayerIndex
    part: LayerIndex
    parts: int

    def of_part(self, slots: jax.Array) -> jax.Array:
        """Return where the part's shares of slots are."""
        return slots if self.parts == 1 else slots * self.parts + self.part


def _in_memory(numbers: Numbers, tree: Any) -> Any:
    """Return codes, or what is about to be coded, so that XLA keeps them in memory.

    It would look up again where they are for every number that is computed of them, or compute them
    again for every one that is written.
    """
    return tree if isinstance(numbers, Plain) else lax.optimization_barrier(tree)


def _bits(codes: Any) -> Any:
    """Return codes with floating-point numbers as whole numbers of the same bits.

    In these, XLA gathers and scatters on every device; on CPUs it would convert whole buffers of
    shorter floating-point numbers to float32 and back.
    """

    def bits(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
        return lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")

    return jax.tree.map(bits, codes)


def _gather(slots: jax.Array, leaf: jax.Array, kind: jax.ShapeDtypeStruct) -> jax.Array:
    """Return slots [a, b] of a buffer [slots, rows, 2, n]: [rows, a, b, 2, n] in its dtype."""
    numbers = lax.GatherDimensionNumbers((0, 3, 4), (0,), (0,))
    sizes = 1, *leaf.shape[1:]
    found = lax.gather(leaf, slots[..., None], numbers, sizes, mode="promise_in_bounds")
    return lax.bitcast_convert_type(found, kind.dtype)


def _scatter(slots: jax.Array, leaf: jax.Array, codes: jax.Array) -> jax.Array:
    """Return a buffer [slots, rows, 2, n] with codes [a, rows, 2, n] in ascending slots [a]."""
    return leaf.at[slots].set(codes, mode="drop", unique_indices=True, indices_are_sorted=True)


def _folded(x: jax.Array) -> jax.Array:
    """Return tokens [rows, T, heads, ...] with heads as batch rows, [rows * heads, T, 1, ...]."""
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], 1, *x.shape[3:])
