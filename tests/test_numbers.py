"""Formats of cached numbers: against a quantiser in NumPy, in bytes, and moved between slots."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from amskv_jax.errors import UsageError
from amskv_jax.numbers import NUMBERS, numbers_of
from amskv_jax.plan.runtime_rows import SelectingRow
from amskv_jax.plan.selectors import HeavyHitters
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.testing import drive


def rounded(vectors):
    """What whole numbers up to 127 with one bfloat16 scale per vector leave of them, in NumPy."""
    scale = np.abs(vectors).max(-1, keepdims=True) / np.float32(127)
    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    scale[scale == 0] = 1
    return np.clip(np.rint(vectors / scale), -127, 127) * scale


def test_int8_codes_are_those_of_a_slow_quantiser():
    vectors = np.random.default_rng(0).standard_normal((3, 5, 2, 16)).astype(np.float32)
    vectors[0, 0] = 0
    vectors[1] *= 1e-6
    numbers = NUMBERS["int8"]
    found = jax.jit(lambda x: numbers.decode(numbers.encode(x), jnp.float32))(vectors)
    np.testing.assert_allclose(found, rounded(vectors), rtol=1e-6)


def test_float8_keeps_three_bits_after_the_first():
    vectors = np.random.default_rng(0).standard_normal((7, 16)).astype(np.float32)
    numbers = NUMBERS["float8_e4m3fn"]
    found = numbers.decode(numbers.encode(jnp.asarray(vectors)), jnp.float32)
    large = np.abs(vectors) > np.abs(vectors).max(-1, keepdims=True) / 64
    assert (np.abs(found - vectors)[large] <= np.abs(vectors)[large] * 0.07).all()


@pytest.mark.parametrize("name", NUMBERS)
def test_bytes_are_those_of_the_codes(name):
    numbers = NUMBERS[name]
    for size in (8, 13, 16, 64, 128):
        codes = jax.eval_shape(numbers.encode, jax.ShapeDtypeStruct((1, size), jnp.float32))
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(codes)]
        assert sum(sizes) == numbers.bytes(size)


@pytest.mark.parametrize("name", NUMBERS)
def test_vectors_of_any_size_come_back(name):
    numbers = NUMBERS[name]
    vectors = np.random.default_rng(0).choice([-1.5, 1.5], (2, 13)).astype(np.float32)
    found = numbers.decode(numbers.encode(jnp.asarray(vectors)), jnp.float32)
    np.testing.assert_allclose(found, vectors, rtol=2**-7)


def test_unknown_formats_are_refused():
    with pytest.raises(UsageError, match=r"cached as 'int5': expected float32, .*int4"):
        numbers_of("int5")


def test_tokens_that_move_are_coded_once():
    """After all steps a selecting layer holds the codes of what was written first."""
    row = SelectingRow((0, 1, 4, 4), HeavyHitters(recent=1))
    schedule = ScaleSchedule.square((1, 2, 3, 4))
    row.check(schedule, "the layer")
    record = drive(row, schedule, 0.3, numbers=NUMBERS["int4"])
    cache = record.cache[-1].tokens.keys
    codes, scales = (np.asarray(leaf) for leaf in jax.tree.leaves(cache))
    keys = np.concatenate(record.key[:-1], axis=1)
    leaves = jax.tree.leaves(NUMBERS["int4"].encode(jnp.asarray(keys)))
    expected, expected_scales = (np.asarray(leaf) for leaf in leaves)
    for row_number in range(codes.shape[0]):
        for head in range(codes.shape[2]):
            for slot in range(4):
                same = (expected[row_number, :, head] == codes[row_number, slot, head]).all(-1)
                same &= (expected_scales == scales[row_number, slot, head])[row_number, :, head, 0]
                assert same.any()
