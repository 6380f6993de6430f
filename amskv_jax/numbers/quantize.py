"""A few bits per number: the direction of a vector in few levels, and its length in 16 bits.

Plain rounding leaves vectors that are too long or too short, and errors of length cost more than
others: logits of attention are products of queries with keys that point the same way. So codes are
chosen by the direction alone, and the scale so that the vector's share along the true one is right,
as RaBitQ does (Gao and Long 2024, https://arxiv.org/abs/2405.12497). With the scale of least
squared error in its place, a cache in 4 bits costs var-cifar10 twice as much cross-entropy.

No rotation spreads numbers over their vector first, as in TurboQuant (Zandieh et al. 2025,
https://arxiv.org/abs/2504.19874): keys and values of var-cifar10 have no channels that stand out,
so that it gains nothing there, and it would be a product more in every attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.typing import DTypeLike

CURVES: dict[int, tuple[float, float]] = {
    1: (1.6, 0.0),
    2: (0.8878, 0.0604),
    3: (0.4873, 0.01568),
    4: (0.2633, 0.00238),
}
"""Bits -> (a, b): the levels are a t + b t^3 at t = ..., -0.5, 0.5, 1.5, ... Fitted to Gaussian
vectors of 64 numbers, each with the scale that suits it best, as Lloyd and Max fit levels to one
number: the levels' relative squared error is 0.36, 0.111, 0.029 and 0.0071."""

NEAREST: dict[int, tuple[float, ...]] = {
    1: (),
    2: (1.00654253,),
    3: (1.9930958, -0.1957645, 0.0213922),
    4: (3.7599375, -0.419607, 0.0868407, -0.011281, 0.0005903),
}
"""Bits -> (c, d, ...): the level nearest to x >= 0, up to the highest, is the one whose number,
from zero on, is floor(c x + d x^3 + ...). In 4 bits it differs where x is within 0.0023 of the
distance between two levels from their middle, in fewer nowhere. Comparing x with every middle would
take several times as long, or XLA writes what was larger than what to memory."""

STARTS: dict[int, tuple[float, float]] = {
    1: (1.0, 0.0),
    2: (0.77, 0.236),
    3: (0.402, 0.848),
    4: (0.32, 1.0),
}
"""Bits -> (c, p): where to look for a vector's scale, c * rms * (largest / rms)^p. Fitted likewise:
the more bits, the more it matters that the largest number is not cut off."""

TRIALS = (2**-0.125, 1.0, 2**0.125)
"""Which multiples of that are tried. More of them would gain less than one percent of the error."""

LONGEST = 2.0
"""Most by which a scale may exceed the one of least squared error. It does so by the inverse square
of the cosine between vector and levels, 1.6 for Gaussian numbers in one bit, less in more; without
a bound one number much larger than all others would blow these up."""


@struct.dataclass
class Codes:
    """Codes of vectors.

    Attributes:
      packed: their numbers' codes, [..., words]: see ``pack``.
      scale: factors of the levels, [..., 1] bfloat16.
      size: numbers in a vector.
    """

    packed: jax.Array
    scale: jax.Array
    size: int = struct.field(pytree_node=False)


@dataclass(frozen=True)
class Levels:
    """Numbers in 2^bits levels, times one bfloat16 scale per vector.

    Attributes:
      bits: per number, 1 to 4.
    """

    bits: int

    def bytes(self, size: int) -> int:
        """See ``numbers.Numbers``."""
        return sum(-(-size * width // 8) for width in _planes(self.bits)) + 2

    def encode(self, vectors: jax.Array) -> Codes:
        """See ``numbers.Numbers``.

        On a GPU memory is what takes time. So a pass leaves but a few numbers per vector, and the
        next computes again what it needs of the vectors' numbers.
        """
        numbers = vectors.astype(jnp.float32)
        largest = jnp.abs(numbers).max(-1, keepdims=True)
        largest = jnp.where(largest > 0, largest, 1)
        numbers = numbers * (1 / largest)  # whose squares are finite
        (energy,) = _sums(numbers * numbers)
        inverse, along, squares = self._best(jnp.abs(numbers), energy)
        scale = jnp.minimum(energy / jnp.where(along > 0, along, 1), LONGEST * along / squares)
        place = self._nearest(jnp.abs(numbers) * inverse)
        steps = jnp.where(numbers > 0, place, -place) + self._middle
        packed = pack(steps.astype(jnp.uint32), self.bits)
        return Codes(packed, (largest * scale).astype(jnp.bfloat16), vectors.shape[-1])

    def decode(self, codes: Codes, dtype: DTypeLike) -> jax.Array:
        """See ``numbers.Numbers``."""
        steps = unpack(codes.packed, self.bits, codes.size).astype(jnp.float32)
        return (self._level(steps - self._middle) * codes.scale.astype(jnp.float32)).astype(dtype)

    @property
    def _middle(self) -> float:
        """What is between the numbers of the two middle levels, which zero lies between."""
        return (2**self.bits - 1) / 2

    def _level(self, place: jax.Array) -> jax.Array:
        """Return the levels at places ..., -0.5, 0.5, 1.5, ..."""
        a, b = CURVES[self.bits]
        return place * (a + b * place * place)

    def _nearest(self, sizes: jax.Array) -> jax.Array:
        """Return the places, 0.5 and more, of the levels nearest to numbers of at least 0."""
        a, b = CURVES[self.bits]
        sizes = jnp.minimum(sizes, a * self._middle + b * self._middle**3)  # the highest level
        square, found = sizes * sizes, jnp.zeros_like(sizes)
        for coefficient in reversed(NEAREST[self.bits]):
            found = found * square + coefficient
        return jnp.floor(found * sizes) + 0.5

    def _best(self, sizes: jax.Array, energy: jax.Array) -> tuple[jax.Array, ...]:
        """Return the scale at which the direction of the levels is closest.

        Args:
          sizes: of the vectors' numbers, [..., size], the largest one, or all zero: levels are the
            same on both sides of zero.
          energy: their sum of squares, [..., 1].

        Returns:
          The inverse of the scale [..., 1], and at that scale the sums [..., 1] of sizes times
          levels, and of levels times themselves.
        """
        factor, power = STARTS[self.bits]
        rms = jnp.sqrt(energy / sizes.shape[-1])
        start = factor * jnp.where(rms > 0, rms, 1) ** (1 - power)
        trials = TRIALS if self.bits > 1 else TRIALS[:1]  # one bit's levels are the same at all
        inverse = [1 / (start * trial) for trial in trials]
        products = []
        for own in inverse:
            level = self._level(self._nearest(sizes * own))
            products += [sizes * level, level * level]
        sums = _sums(*products)
        found: list[tuple[jax.Array, ...]]
        found = list(zip(inverse, sums[::2], sums[1::2], strict=True))
        best = found[0]
        for other in found[1:]:
            closer = _cosine(*other[1:]) > _cosine(*best[1:])
            best = tuple(jnp.where(closer, *pair) for pair in zip(other, best, strict=True))
        return best


def pack(numbers: jax.Array, bits: int) -> jax.Array:
    """Pack whole numbers into words, of 32 bits if that leaves none of them half empty, else of 8.

    Planes of 4, 2 or 1 bits, whose widths sum up to ``bits``, lie one after the other, the lowest
    bits last. A word of a plane holds numbers that are next to each other, the first in its lowest
    bits.

    Args:
      numbers: [..., size] unsigned, below 2^bits.
      bits: 1 to 8.

    Returns:
      [..., words] uint32 or uint8.
    """
    word = _word(numbers.shape[-1], bits)
    planes, above = [], bits
    for width in _planes(bits):
        above -= width
        plane, places = (numbers.astype(word) >> above) & (2**width - 1), 8 * word.itemsize // width
        plane = jnp.pad(plane, [(0, 0)] * (plane.ndim - 1) + [(0, -plane.shape[-1] % places)])
        parts = [plane[..., place::places] << (width * place) for place in range(places)]
        planes.append(sum(parts[1:], parts[0]))
    return jnp.concatenate(planes, axis=-1)


def unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
    """Undo ``pack``, of vectors of ``size`` numbers."""
    word, start, above = _word(size, bits), 0, bits
    numbers = jnp.zeros((), word)
    for width in _planes(bits):
        above -= width
        places = np.arange(0, 8 * word.itemsize, width).astype(word)
        count = -(-size // len(places))
        own = packed[..., start : start + count, None]
        start += count
        plane = (own >> places.reshape([1] * (own.ndim - 1) + [-1])) & (2**width - 1)
        plane = plane.reshape(*packed.shape[:-1], count * len(places))[..., :size]
        numbers = numbers | plane << above
    return numbers


def _word(size: int, bits: int) -> np.dtype[Any]:
    """Return the type of the words that vectors are packed into."""
    whole = all(size * width % 32 == 0 for width in _planes(bits))
    return np.dtype(np.uint32 if whole else np.uint8)


def _planes(bits: int) -> list[int]:
    """Return the widths of the planes of so many bits, powers of two which sum up to them."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def _sums(*values: jax.Array) -> list[jax.Array]:
    """Return the sums [..., 1] of several [..., size], in one pass over what they come from."""

    def add(some: Sequence[jax.Array], others: Sequence[jax.Array]) -> list[jax.Array]:
        return [one + other for one, other in zip(some, others, strict=True)]

    zeros = [jnp.zeros((), one.dtype) for one in values]
    found = lax.reduce(list(values), zeros, add, [values[0].ndim - 1])
    return [one[..., None] for one in found]


def _cosine(along: jax.Array, squares: jax.Array) -> jax.Array:
    """Return what grows with the cosine between vectors and levels; see ``Levels._best``."""
    return along * lax.rsqrt(squares)
