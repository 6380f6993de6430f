"""Formats of cached numbers: how a vector of a key or a value is kept, and what it costs.

A format is registered by one entry in ``NUMBERS``; all kinds of slots, plans and memory reports
then know it. Vectors are coded one by one, each of one token and one head, so that their codes can
be moved, and no number is ever coded twice.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from amskv_jax.errors import UsageError
from amskv_jax.numbers.quantize import Levels
from amskv_jax.precision import LARGEST_FLOAT8, to_float8


class Numbers(Protocol):
    """A format; frozen and hashable."""

    def bytes(self, size: int) -> int:
        """Return the bytes of one vector of ``size`` numbers, scales included."""
        ...

    def encode(self, vectors: jax.Array) -> Any:
        """Return the codes of vectors [..., size]: a pytree whose leaves are [..., something]."""
        ...

    def decode(self, codes: Any, dtype: DTypeLike) -> jax.Array:
        """Return the vectors [..., size] of codes, in ``dtype``."""
        ...


@dataclass(frozen=True)
class Plain:
    """Floating-point numbers as they are.

    Attributes:
      dtype: their type.
    """

    dtype: str

    def bytes(self, size: int) -> int:
        """See ``Numbers``."""
        return size * jnp.dtype(self.dtype).itemsize

    def encode(self, vectors: jax.Array) -> jax.Array:
        """See ``Numbers``."""
        return vectors.astype(self.dtype)

    def decode(self, codes: jax.Array, dtype: DTypeLike) -> jax.Array:
        """See ``Numbers``."""
        return codes.astype(dtype)


@dataclass(frozen=True)
class Int8:
    """Whole numbers up to 127 times one bfloat16 scale per vector, by which its largest fits."""

    def bytes(self, size: int) -> int:
        """See ``Numbers``."""
        return size + 2

    def encode(self, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See ``Numbers``."""
        scale = _scale(vectors, 127)
        whole = jnp.rint(vectors.astype(jnp.float32) / scale.astype(jnp.float32))
        return jnp.clip(whole, -127, 127).astype(jnp.int8), scale

    def decode(self, codes: tuple[jax.Array, jax.Array], dtype: DTypeLike) -> jax.Array:
        """See ``Numbers``."""
        whole, scale = codes
        return (whole.astype(jnp.float32) * scale.astype(jnp.float32)).astype(dtype)


@dataclass(frozen=True)
class Float8:
    """float8_e4m3fn numbers times one bfloat16 scale per vector, by which its largest fits.

    They are only converted, never multiplied, which every device can, with or without float8 units.
    """

    def bytes(self, size: int) -> int:
        """See ``Numbers``."""
        return size + 2

    def encode(self, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See ``Numbers``."""
        scale = _scale(vectors, LARGEST_FLOAT8)
        scaled = vectors.astype(jnp.float32) / scale.astype(jnp.float32)
        return to_float8(scaled), scale

    def decode(self, codes: tuple[jax.Array, jax.Array], dtype: DTypeLike) -> jax.Array:
        """See ``Numbers``."""
        numbers, scale = codes
        return (numbers.astype(jnp.float32) * scale.astype(jnp.float32)).astype(dtype)


def _scale(vectors: jax.Array, largest: float) -> jax.Array:
    """Return the scale [..., 1] bfloat16 by which the largest number of each vector is coded."""
    most = jnp.abs(vectors.astype(jnp.float32)).max(-1, keepdims=True)
    scale = (most / largest).astype(jnp.bfloat16)
    return jnp.where(scale > 0, scale, 1)


NUMBERS: dict[str, Numbers] = {
    "float32": Plain("float32"),
    "bfloat16": Plain("bfloat16"),
    "float8_e4m3fn": Float8(),
    "int8": Int8(),
    "int4": Levels(4),
    "int3": Levels(3),
    "int2": Levels(2),
    "int1": Levels(1),
}
"""Name -> format."""


def numbers_of(name: str) -> Numbers:
    """Return the format of that name; raises UsageError if there is none."""
    if name not in NUMBERS:
        raise UsageError(f"numbers cannot be cached as {name!r}: expected {', '.join(NUMBERS)}")
    return NUMBERS[name]
