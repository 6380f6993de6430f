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

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
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
      packed: their numbers' codes, uint8 [..., bytes]: see ``pack``.
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
        """See ``numbers.Numbers``."""
        vectors = vectors.astype(jnp.float32)
        largest = jnp.abs(vectors).max(-1, keepdims=True)
        vectors = vectors / jnp.where(largest > 0, largest, 1)  # whose squares are finite
        energy = _sum(vectors * vectors)
        steps, levels = self._nearest(vectors, energy)
        along = _sum(vectors * levels)
        least = along / _sum(levels * levels)
        scale = jnp.minimum(energy / jnp.where(along > 0, along, 1), LONGEST * least)
        packed = pack(steps.astype(jnp.uint8), self.bits)
        return Codes(packed, (largest * scale).astype(jnp.bfloat16), vectors.shape[-1])

    def decode(self, codes: Codes, dtype: DTypeLike) -> jax.Array:
        """See ``numbers.Numbers``."""
        steps = unpack(codes.packed, self.bits, codes.size).astype(jnp.float32)
        return (self._level(steps) * codes.scale.astype(jnp.float32)).astype(dtype)

    def _level(self, steps: jax.Array) -> jax.Array:
        """Return the levels, from the lowest on, by their numbers as float32."""
        a, b = CURVES[self.bits]
        t = steps - (2**self.bits - 1) / 2
        return t * (a + b * t * t)

    def _nearest(self, vectors: jax.Array, energy: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return those levels whose direction is closest, as their numbers (float32) and as such.

        Args:
          vectors: [..., size] float32, the largest number of each being one, or all zero.
          energy: their sum of squares, [..., 1].
        """
        half, (a, b), (factor, power) = 2 ** (self.bits - 1), CURVES[self.bits], STARTS[self.bits]
        bounds = [a * t + b * (t**3 + 0.75 * t) for t in range(1, half)]  # between two levels each
        rms = jnp.sqrt(energy / vectors.shape[-1])
        start = factor * jnp.where(rms > 0, rms, 1) ** (1 - power)
        sizes = jnp.abs(vectors)  # levels are the same on both sides of zero

        def attempt(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
            scaled = sizes / scale
            steps = jnp.full_like(scaled, half)
            for bound in bounds:
                steps += scaled > bound
            found = self._level(steps)
            return steps, _sum(sizes * found) * jax.lax.rsqrt(_sum(found * found))

        steps, cosine = attempt(start * TRIALS[0])
        for trial in TRIALS[1:] if bounds else ():
            other, own = attempt(start * trial)
            steps = jnp.where(own > cosine, other, steps)
            cosine = jnp.maximum(own, cosine)
        steps = jnp.where(vectors > 0, steps, 2 * half - 1 - steps)
        return steps, self._level(steps)


def pack(numbers: jax.Array, bits: int) -> jax.Array:
    """Pack whole numbers into bytes.

    Planes of 4, 2 or 1 bits, whose widths sum up to ``bits``, lie one after the other, the lowest
    bits last. The n bytes of a plane hold numbers i, n + i, 2 n + i and so on together in byte i.

    Args:
      numbers: [..., size] uint8, below 2^bits.
      bits: 1 to 8.

    Returns:
      [..., bytes] uint8.
    """
    planes, above = [], bits
    for width in _planes(bits):
        above -= width
        plane = (numbers >> above) & (2**width - 1)
        plane = jnp.pad(plane, [(0, 0)] * (plane.ndim - 1) + [(0, -plane.shape[-1] % (8 // width))])
        parts = jnp.split(plane, 8 // width, axis=-1)
        shifted = [part << (width * place) for place, part in enumerate(parts)]
        planes.append(sum(shifted[1:], shifted[0]))
    return jnp.concatenate(planes, axis=-1)


def unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
    """Undo ``pack``, of vectors of ``size`` numbers."""
    numbers, above, start = None, bits, 0
    for width in _planes(bits):
        above -= width
        count = -(-size * width // 8)
        own = packed[..., start : start + count]
        start += count
        parts = [(own >> (width * place)) & (2**width - 1) for place in range(8 // width)]
        plane = jnp.concatenate(parts, axis=-1)[..., :size] << above
        numbers = plane if numbers is None else numbers | plane
    assert numbers is not None, "there is a plane"
    return numbers


def _planes(bits: int) -> list[int]:
    """Return the widths of the planes of so many bits, powers of two which sum up to them."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def _sum(values: jax.Array) -> jax.Array:
    return values.sum(-1, keepdims=True)
