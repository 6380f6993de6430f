"""Attention to rows of different lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from amskv_jax import attention
from amskv_jax.attention import attend


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (3, 5, 2, 8), (3, 7, 2, 8), (3, 7, 2, 8)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("queries_at_once", [15, 5, 2])
def test_rows_see_as_many_keys_as_their_length_says(qkv, monkeypatch, queries_at_once):
    monkeypatch.setattr(attention, "CPU_LOGITS_BYTES", queries_at_once * 2 * 7 * 4)
    query, key, value = qkv
    lengths = jnp.array([1, 4, 7])
    found = attend(query, key, value, 0.3, lengths=lengths)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = attend(query[one], key[one, :length], value[one, :length], 0.3)
        np.testing.assert_allclose(found[one], alone, atol=1e-6)
    padded = key.at[0, 1:].set(1e6), value.at[0, 1:].set(-1e6)
    np.testing.assert_array_equal(attend(query, *padded, 0.3, lengths=lengths)[0], found[0])
