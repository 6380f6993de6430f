"""Formats of cached numbers: against a quantiser in NumPy, in bytes, and through every policy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from made_stats import random_stats

from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.store import Store
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.errors import UsageError
from amskv_jax.generate import picture_keys
from amskv_jax.numbers import NUMBERS, numbers_of
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.runtime_rows import SelectingRow
from amskv_jax.plan.selectors import HeavyHitters
from amskv_jax.policies import AMSKV, H2O, Full, Heads, ScaleKV
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.testing import SCHEDULE, TINY_VAR, drive, sample

BITS = {"int8": 8}
POLICIES = [Full(), AMSKV(2, 5, 1), H2O(4), ScaleKV(4, window=1), Heads(4, protected=1)]


def quantized(vectors, bits):
    """What symmetric quantisation with one bfloat16 scale per vector leaves of them, in NumPy."""
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(vectors).max(-1, keepdims=True) / np.float32(largest)
    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    scale[scale == 0] = 1
    return np.clip(np.rint(vectors / scale), -largest, largest) * scale


@pytest.mark.parametrize("name", BITS)
def test_codes_are_those_of_a_slow_quantiser(name):
    vectors = np.random.default_rng(0).standard_normal((3, 5, 2, 16)).astype(np.float32)
    vectors[0, 0] = 0
    vectors[1] *= 1e-6
    found = jax.jit(lambda x: NUMBERS[name].decode(NUMBERS[name].encode(x), jnp.float32))(vectors)
    np.testing.assert_allclose(found, quantized(vectors, BITS[name]), rtol=1e-6)


def test_float8_keeps_three_bits_after_the_first():
    vectors = np.random.default_rng(0).standard_normal((7, 16)).astype(np.float32)
    numbers = NUMBERS["float8_e4m3fn"]
    found = numbers.decode(numbers.encode(jnp.asarray(vectors)), jnp.float32)
    large = np.abs(vectors) > np.abs(vectors).max(-1, keepdims=True) / 64
    assert (np.abs(found - vectors)[large] <= np.abs(vectors)[large] * 0.07).all()


@pytest.mark.parametrize("name", NUMBERS)
def test_bytes_are_those_of_the_codes(name):
    numbers = NUMBERS[name]
    codes = numbers.encode(jnp.ones((1, 64)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(codes)) == numbers.bytes(64)


def test_unknown_formats_are_refused():
    with pytest.raises(UsageError, match=r"cached as 'int5': expected float32, .*int4"):
        numbers_of("int5")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_policy_draws_with_every_format_in_the_announced_bytes(policy, name):
    shape = TINY_VAR.cache_shape(SCHEDULE)
    plan = policy.plan(shape, random_stats(0, SCHEDULE, shape.num_layers, shape.num_heads))
    caches = CacheLayout.of(plan, Store(NUMBERS[name])).init(4, shape.num_heads, shape.head_dim)
    geometry = CacheGeometry.of(shape, 2, name)
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(caches) if leaf.dtype != bool)
    assert allocated == MemoryReport.of(plan, geometry).plan

    params, labels = random_params(TINY_VAR, seed=1), np.array([1, 2], np.int32)
    with jax.disable_jit():
        samples = sample(
            TINY_VAR,
            plan,
            params,
            labels,
            picture_keys(jax.random.key(0), 2),
            cache_dtype=name,
            trace=True,
        )
    assert np.isfinite(samples.logits).all()


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
