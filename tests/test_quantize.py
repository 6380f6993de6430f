"""Codes of few bits: against a quantiser in NumPy, against theory, and of awkward vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amskv_jax.numbers.quantize import (
    CURVES,
    LONGEST,
    NEAREST,
    STARTS,
    TRIALS,
    Levels,
    pack,
    unpack,
)

BITS = (1, 2, 3, 4)
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Least squared error of 2^bits levels for a Gaussian number (Max 1960, table I)."""


@jax.jit
def _found(vectors):
    coded = [Levels(bits).decode(Levels(bits).encode(vectors), jnp.float32) for bits in BITS]
    return dict(zip(BITS, coded, strict=True))


def found(vectors, bits):
    return np.asarray(_found(vectors)[bits], np.float64)


def gaussian(count, size, seed=0):
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


def place(x, bits):
    """Where the levels say that numbers from 0 to the highest of them are, in levels from zero."""
    powers = 2 * np.arange(len(NEAREST[bits])) + 1
    return (np.array(NEAREST[bits]) * np.asarray(x, np.float64)[..., None] ** powers).sum(-1)


@pytest.mark.parametrize("bits", BITS)
def test_levels_that_are_taken_are_nearest(bits):
    """But for numbers within 0.0023 of a level's distance of the middle between two."""
    (a, b), half = CURVES[bits], 2 ** (bits - 1)
    middles = np.arange(1, half)
    found = place(a * middles + b * (middles**3 + 0.75 * middles), bits)
    np.testing.assert_allclose(found, middles, atol=0.0023 if bits == 4 else 1e-6)
    highest = a * (half - 0.5) + b * (half - 0.5) ** 3
    numbers = place(np.linspace(0, highest, 1000), bits)
    assert (np.diff(numbers) >= 0).all()
    assert half - 1 <= numbers[-1] < half


def slowly(vector, bits):
    """What codes leave of one vector: number by number, in float64."""
    a, b = CURVES[bits]
    highest = a * (2 ** (bits - 1) - 0.5) + b * (2 ** (bits - 1) - 0.5) ** 3

    def level(x):
        t = np.floor(place(min(abs(x), highest), bits)) + 0.5
        return np.copysign(a * t + b * t**3, x)

    factor, power = STARTS[bits]
    rms = np.sqrt(np.mean(vector**2))
    start = factor * rms * (np.abs(vector).max() / rms) ** power
    best, direction = -1.0, None
    for trial in TRIALS:
        chosen = np.array([level(x / (start * trial)) for x in vector])
        unit = chosen / np.linalg.norm(chosen)
        if unit @ vector > best:
            best, direction = unit @ vector, unit
    cosine = best / np.linalg.norm(vector)
    return direction * np.linalg.norm(vector) * min(1 / cosine, LONGEST * cosine)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_a_slow_quantiser(bits):
    vectors = gaussian(24, 48)
    vectors[0, 3] = 30.0
    vectors[1] *= 1e-6
    vectors[2] = np.abs(vectors[2]) + 2
    expected = np.array([slowly(vector.astype(np.float64), bits) for vector in vectors])
    np.testing.assert_allclose(found(vectors, bits), expected, rtol=2**-8)  # of bfloat16 scales


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_directions_of_gaussian_vectors_are_closer_than_by_the_best_levels_of_one_number(
    bits, size
):
    vectors = gaussian(1000, size)
    coded = found(vectors, bits)
    lengths = np.linalg.norm(coded, axis=-1) * np.linalg.norm(vectors, axis=-1)
    sine = 1 - ((coded * vectors).sum(-1) / lengths) ** 2
    assert 4.0**-bits < sine.mean() < LLOYD_MAX[bits], "above the bound of rate and distortion"
    # Less is gained the longer the vectors: in the limit, one scale suits all.
    assert size == 128 or sine.mean() < LLOYD_MAX[bits] * {1: 1, 2: 0.97, 3: 0.9, 4: 0.8}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_products_with_the_true_direction_are_right(bits):
    """What is lost points across a vector, but for the rounding of the scale and its bound."""
    vectors = gaussian(1000, 64)
    coded = found(vectors, bits)
    products, energy = (coded * vectors).sum(-1), (vectors**2).sum(-1)
    cosine = products / np.sqrt(energy * (coded**2).sum(-1))
    bounded = LONGEST * cosine**2 < 1
    assert bounded.mean() < 0.01
    expected = np.where(bounded, LONGEST * cosine**2, 1)
    np.testing.assert_allclose(products / energy, expected, atol=2**-8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1, 1, width=32).map(lambda x: x**5), min_size=16, max_size=16),
    st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_no_vector_is_worse_coded_than_dropped(numbers, length):
    """Spikes are the hard ones: no scale suits them in one bit."""
    vector = np.array(numbers) * length
    if np.abs(vector).max() < length * 1e-10:
        vector[0] = length
    vector = vector.astype(np.float32)
    for bits in BITS:
        error = found(vector[None], bits)[0] - vector
        assert (error**2).sum() <= 1.02 * (vector.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize("bits", BITS)
def test_extreme_vectors_stay_finite(bits):
    vectors = np.zeros((4, 64), np.float32)
    vectors[1, 5] = 1e30
    vectors[2] = 3e30
    vectors[3, ::2] = 1e-30
    coded = found(vectors, bits)
    assert np.isfinite(coded).all()
    assert not coded[0].any(), "nothing stays nothing"
    np.testing.assert_allclose(coded[2], vectors[2], rtol=2**-8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
def test_numbers_are_packed_as_documented(bits):
    """Plane by plane, byte by byte, with whole numbers of Python."""
    for size in (1, 7, 13, 64):
        numbers = np.random.default_rng(size).integers(0, 2**bits, (2, size))
        packed = np.asarray(pack(jnp.asarray(numbers, jnp.uint8), bits))
        for own, row in zip(
            packed.astype(packed.dtype.newbyteorder("<")).view(np.uint8),
            numbers.tolist(),
            strict=True,
        ):
            expected, above = [], bits
            for width in [w for w in (8, 4, 2, 1) if w & bits]:
                above -= width
                places = 8 // width
                plane = [0] * -(-size // places)
                for index, number in enumerate(row):
                    part = (number >> above) % 2**width
                    plane[index // places] += part << width * (index % places)
                expected += plane
            assert own.tolist() == expected
        assert packed.itemsize * packed.shape[-1] == sum(
            -(-size * w // 8) for w in (8, 4, 2, 1) if w & bits
        )
        np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits, size), numbers)


@pytest.mark.parametrize(("bits", "expected"), [(1, 10), (2, 18), (3, 26), (4, 34)])
def test_bytes_at_heads_of_64_channels(bits, expected):
    assert Levels(bits).bytes(64) == expected


def test_scales_are_kept_in_bfloat16_and_vectors_in_the_dtype_asked_for():
    codes = Levels(3).encode(jnp.ones((5, 2, 13), jnp.bfloat16))
    assert (codes.scale.dtype, codes.scale.shape) == (jnp.bfloat16, (5, 2, 1))
    decoded = Levels(3).decode(codes, jnp.bfloat16)
    assert (decoded.dtype, decoded.shape) == (jnp.bfloat16, (5, 2, 13))
