"""Buffers of keys and values: how their numbers are kept, and how they are updated in place.

Slots decide where a token lies and which tokens stay; a store decides how numbers are kept. What
lies between reading and writing are codes (``numbers.Numbers``), so that a token which moves is
never coded twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import DTypeLike

from amskv_jax.attention import (
    QKV,
    Cached,
    Implementation,
    attend,
    attend_to_cache,
    mass_on_cache,
    reads_cache,
)
from amskv_jax.fused_attention.blocks import Spans
from amskv_jax.numbers import Numbers, Plain

LayerIndex = jax.Array | int
"""One of the layers of buffers: int32 scalar, or known when the program is traced."""


@struct.dataclass
class KVCache:
    """Codes of keys and values; leaves [layers, rows, capacity, heads, something] in buffers.

    Parts of one layer that were read, or are about to be written, lack the axis of layers, and
    have their own number of tokens in place of the capacity.
    """

    keys: Any
    values: Any


@dataclass(frozen=True)
class Store:
    """Reads and writes buffers.

    Attributes:
      numbers: how numbers are kept.
    """

    numbers: Numbers

    def init(self, *shape: int) -> KVCache:
        """Return empty buffers for keys and values of a shape [..., head_dim]."""
        return KVCache(keys=empty(self.numbers, *shape), values=empty(self.numbers, *shape))

    def encode(self, key: jax.Array, value: jax.Array) -> KVCache:
        """Return the codes of keys and values [..., head_dim]."""
        # Or else XLA merges the norm that keys come from with the passes of a format, into kernels
        # which leave much in memory.
        key = lax.optimization_barrier(key)
        return KVCache(keys=self.numbers.encode(key), values=self.numbers.encode(value))

    def decode(self, part: KVCache, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Return keys and values [..., head_dim] of codes."""
        keys, values = (self.numbers.decode(codes, dtype) for codes in (part.keys, part.values))
        return keys, values

    def attend(
        self,
        cache: KVCache,
        layer: LayerIndex,
        spans: Spans,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attend to what some slots of a layer hold, and to a step's own tokens.

        Args:
          cache: the buffers.
          layer: which of their layers.
          spans: of slots that are read, static.
          qkv: of the own tokens.
          scale: factor of the logits.
          implementation: see ``attention.attend``.

        Returns:
          The output [rows, T, heads, head_dim], and the logarithm of the sum of exponentials of
          every query's logits, [rows, T, heads] float32, where the back end tells it.
        """
        keys = sum(length for _, length in spans) + qkv.key.shape[1]
        if reads_cache(qkv.query, keys, implementation):
            return attend_to_cache(qkv, self._cached(cache, layer, spans, qkv), scale)
        parts = [read(cache, layer, *span) for span in spans]
        joined_keys, joined_values = self.with_own(parts, qkv.key, qkv.value)
        return attend(qkv.query, joined_keys, joined_values, scale, implementation), None

    def mass(
        self,
        cache: KVCache,
        layer: LayerIndex,
        spans: Spans,
        qkv: QKV,
        sums: jax.Array,
        scale: float,
    ) -> jax.Array:
        """Return the attention probability that every token receives, summed over the queries.

        Args are those of ``attend``, and what it returned besides the output.

        Returns:
          [rows, heads, S] float32, cached tokens and then own ones.
        """
        return mass_on_cache(qkv, self._cached(cache, layer, spans, qkv), sums, scale)

    def _cached(self, cache: KVCache, layer: LayerIndex, spans: Spans, qkv: QKV) -> Cached:
        """Return what attention reads: the buffers, or what their codes decode to."""
        _, key, value, _ = qkv
        if self.numbers == Plain(str(key.dtype)):
            return Cached(cache.keys, cache.values, jnp.asarray(layer, jnp.int32), spans)
        parts = [self.decode(read(cache, layer, *span), key.dtype) for span in spans]
        if not parts:
            return Cached(key[None], value[None], jnp.int32(0), ())
        keys, values = (joined(kind)[None] for kind in zip(*parts, strict=True))
        return Cached(keys, values, jnp.int32(0), ((0, keys.shape[2]),))

    def with_own(
        self, parts: Sequence[KVCache], key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return what a step attends to: cached parts, then its own keys and values."""
        cached = [self.decode(part, key.dtype) for part in parts]
        keys, values = zip(*cached, (key, value), strict=True)
        return joined(keys), joined(values)


def joined(parts: Sequence[jax.Array]) -> jax.Array:
    """Return parts [rows, T_i, heads, head_dim] one after the other along T.

    On a GPU they are joined as rows of numbers: along an axis of tokens, of which there are often
    odd numbers, XLA moves one number at a time there. On a CPU that would cost memory.
    """
    if jax.default_backend() == "cpu":
        return jnp.concatenate(parts, axis=1)
    rows, _, *shape = parts[0].shape
    flat = jnp.concatenate([part.reshape(rows, -1) for part in parts], axis=1)
    return flat.reshape(rows, -1, *shape)


def empty(numbers: Numbers, *shape: int) -> Any:
    """Return an empty buffer for the codes of vectors of a shape [..., head_dim]."""
    codes = jax.eval_shape(numbers.encode, jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), codes)


def read(cache: Any, layer: LayerIndex, slot: int, length: int, axis: int = 1) -> Any:
    """Return ``length`` slots from ``slot`` on of one layer, along ``axis`` of every leaf."""

    def part(buffer: jax.Array) -> jax.Array:
        start: list[Any] = [layer, *[0] * (buffer.ndim - 1)]
        sizes = [1, *buffer.shape[1:]]
        start[1 + axis], sizes[1 + axis] = slot, length
        return lax.dynamic_slice(buffer, start, sizes)[0]

    return jax.tree.map(part, cache)


def write(cache: Any, layer: LayerIndex, slot: int, part: Any, axis: int = 1) -> Any:
    """Return buffers with ``part`` in the slots from ``slot`` on of one layer."""

    def update(buffer: jax.Array, own: jax.Array) -> jax.Array:
        start: list[Any] = [layer, *[0] * (buffer.ndim - 1)]
        start[1 + axis] = slot
        if len(buffer) == 1 and not isinstance(layer, int):
            # XLA drops the index of an only layer, and with it the order that ``after`` gives.
            own = jnp.where(layer > 0, jnp.zeros_like(own), own)
        return lax.dynamic_update_slice(buffer, own[None].astype(buffer.dtype), start)

    return jax.tree.map(update, cache, part)


def tokens(part: KVCache, start: int, stop: int) -> KVCache:
    """Return some tokens of a part."""
    return jax.tree.map(lambda leaf: lax.slice_in_dim(leaf, start, stop, axis=1), part)


def take(parts: Sequence[KVCache], chosen: jax.Array) -> KVCache:
    """Return the tokens that every head has chosen of several parts, one after the other.

    Args:
      parts: leaves [rows, T_i, heads, something].
      chosen: [rows, heads, count] int32, below the sum of all T_i.
    """
    index = jnp.moveaxis(chosen, 2, 1)[..., None]

    def gather(*leaves: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.concatenate(leaves, axis=1), index, axis=1)

    return jax.tree.map(gather, *parts)


def after(output: jax.Array, layer: LayerIndex, cache: Any) -> Any:
    """Return ``layer``, but so that it is known no earlier than ``output``; see ``later``.

    Args:
      output: [rows, T, heads, head_dim], computed from what was read.
      layer: a layer of the buffers; an int where no loop goes over layers, whose order needs no
        data if the buffers have but this one.
      cache: the buffers.
    """
    layers = len(jax.tree.leaves(cache)[0])
    if layers == 1 and isinstance(layer, int):
        return layer
    return later(output, layer, layers - 1)


def later(output: jax.Array, index: LayerIndex, most: int) -> jax.Array:
    """Return ``index``, but so that it is known no earlier than ``output``.

    A loop that reads a buffer and then writes to it does so in place only if XLA knows that reading
    comes first. Otherwise it copies the whole buffer, all layers of it, in every round. Data fixes
    the order: a write at an index which follows from what was read must come later. (An
    ``optimization_barrier`` does not help: it is gone before copies are decided upon.)

    Args:
      output: [rows, T, heads, head_dim], computed from what was read.
      index: where to write, of any shape.
      most: the largest that it may be.
    """
    bit = (output[0, 0, 0, 0] > 0).astype(jnp.int32)
    return jnp.minimum(index, most + bit)


class Slots(Protocol):
    """Where the tokens of a group of layers lie; frozen, hashable, made before tracing."""

    def init(self, layers: int, rows: int, num_heads: int, head_dim: int) -> Any:
        """Return empty buffers for this many layers and batch rows."""
        ...

    def attend(
        self,
        cache: Any,
        layer: jax.Array,
        step: int,
        qkv: QKV,
        scale: float,
        implementation: Implementation,
    ) -> tuple[jax.Array, Any]:
        """Attend to the cache and to the step's own tokens, then store what later steps need.

        Args:
          cache: the buffers.
          layer: which of the buffers' layers this is: int32 scalar, or an int where no loop goes
            over layers.
          step: the step, static.
          qkv: of the step's own tokens.
          scale: factor of the logits.
          implementation: see ``attention.attend``.

        Returns:
          The attention's output [rows, T, heads, head_dim], and the updated buffers.
        """
        ...
