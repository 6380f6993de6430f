"""The kernel that sums what attention every key receives: in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import assert_no_races, interpreted, many_threads

CASES = [
    # rows, heads, head_dim, spans, tokens, capacity, races
    (2, 2, 64, ((0, 63),), 36, 70, False),
    (1, 3, 64, ((3, 50), (60, 75)), 300, 140, True),  # queries in two parts
    (2, 1, 128, (), 100, 40, False),  # nothing cached
]


@interpreted
@many_threads
@pytest.mark.parametrize("case", CASES)
def test_kernel_sums_probabilities_of_cached_and_own_keys(case):
    from jax.experimental.pallas import mosaic_gpu

    from amskv_jax.fused_attention.mass import fused_mass

    rows, heads, head_dim, spans, tokens, capacity, races = case
    own = (rows, tokens, heads, head_dim)
    query, keys, key = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for seed, shape in enumerate([own, (3, rows, capacity, heads, head_dim), own])
    )
    used = [slot for first, length in spans for slot in range(first, first + length)]
    keys = keys.at[:, :, np.setdiff1d(np.arange(capacity), used)].set(50.0)  # stale ones
    joined = np.concatenate([np.asarray(keys[1], np.float32)[:, used], key], 1)
    logits = 0.2 * np.einsum("rthd,rshd->rhts", np.asarray(query, np.float32), joined)
    sums = np.log(np.exp(logits).sum(-1))
    found = fused_mass(
        *(query, keys, jnp.int32(1), key, jnp.asarray(sums.swapaxes(1, 2))),
        spans=spans,
        scale=0.2,
        interpret=mosaic_gpu.InterpretGPUParams(detect_races=races),
    )
    if races:
        assert_no_races()
    np.testing.assert_allclose(found, np.exp(logits - sums[..., None]).sum(2), rtol=1e-5)
