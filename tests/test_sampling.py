"""Guidance, filters and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from reference_weights import GOLDEN

from amskv_jax.errors import UsageError
from amskv_jax.models.guidance import UNGUIDED, Guidance
from amskv_jax.sampling import TokenSampling, draw, filter_logits, smooth_mixture


def cases():
    with np.load(GOLDEN / "var" / "filters.npz", allow_pickle=False) as data:
        golden = dict(data)

    z = (np.random.RandomState(7).standard_normal((2, 5, 64)) * 3).astype(np.float32)
    for name, settings_name, logits in (
        ("plain", "settings", z),
        ("tied", "settings_tied", np.round(z * 2) / 2),
    ):
        for index, (top_k, top_p) in enumerate(golden[settings_name]):
            yield pytest.param(
                logits, int(top_k), float(top_p), golden[f"{name}_{index}"], id=f"{name}-{index}"
            )


@pytest.mark.parametrize(("logits", "top_k", "top_p", "expected"), list(cases()))
def test_filters_agree_with_the_reference(logits, top_k, top_p, expected):
    found = jax.nn.softmax(filter_logits(jnp.asarray(logits), top_k, top_p))
    np.testing.assert_array_equal(np.asarray(found) > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(
    npst.arrays(np.float32, (3, 12), elements=st.integers(-4, 4).map(float)),
    st.integers(0, 14),
    st.floats(0, 1),
)
@settings(deadline=None, max_examples=50)
def test_filters_keep_the_largest_and_only_remove(logits, top_k, top_p):
    kept = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), top_k, top_p)))
    smallest = np.where(kept, logits, np.inf).min(-1)
    largest = logits == logits.max(-1, keepdims=True)  # of equal ones, not all need to stay
    assert (kept & largest).any(-1).all()
    assert (kept | (logits <= smallest[:, None])).all()
    if top_p == 0 and 0 < top_k <= 12:
        np.testing.assert_array_equal(kept, logits >= np.sort(logits)[:, [-top_k]])


def test_guidance_mixes_the_rows_of_a_picture():
    logits = jax.random.normal(jax.random.key(0), (4, 3, 5))  # c0, u0, c1, u1
    guided = Guidance().mix_logits(logits, jnp.float32(3.0))
    np.testing.assert_allclose(guided, 3 * logits[::2] - 2 * logits[1::2], atol=1e-6)
    np.testing.assert_array_equal(Guidance().mix_logits(logits, jnp.float32(1.0)), logits[::2])
    np.testing.assert_array_equal(UNGUIDED.mix_logits(logits, jnp.float32(3.0)), logits)
    layers = Guidance(False, (1,))
    np.testing.assert_array_equal(layers.mix_logits(logits, jnp.float32(3.0)), logits[::2])
    mixed = layers.mix_rows(logits, jnp.float32(3.0), jnp.array(True))
    np.testing.assert_allclose(mixed, np.repeat(guided, 2, axis=0), atol=1e-6)
    for strength, mixes in ((1.0, True), (3.0, False)):
        same = layers.mix_rows(logits, jnp.float32(strength), jnp.array(mixes))
        np.testing.assert_array_equal(same, logits)


def test_greedy_takes_the_first_of_equal_logits():
    logits = jnp.array([[[0.0, 3.0, 3.0]]])
    keys = jax.random.split(jax.random.key(0), 1)
    assert draw(keys, logits, TokenSampling(top_k=1)).tolist() == [[1]]


def test_draws_follow_the_probabilities():
    probabilities = np.array([0.1, 0.2, 0.7])
    logits = jnp.log(jnp.broadcast_to(probabilities, (4, 5000, 3)))
    tokens = draw(jax.random.split(jax.random.key(1), 4), logits, TokenSampling())
    frequencies = np.bincount(np.asarray(tokens).ravel(), minlength=3) / 20000
    np.testing.assert_allclose(frequencies, probabilities, atol=0.015)


def test_smooth_mixtures_are_weights_that_sharpen():
    keys = jax.random.split(jax.random.key(2), 2)
    logits = jax.random.normal(jax.random.key(3), (2, 50, 16))
    blunt, sharp = (smooth_mixture(keys, logits, progress) for progress in (0.0, 1.0))
    np.testing.assert_allclose(blunt.sum(-1), 1.0, atol=1e-6)
    assert blunt.max(-1).mean() < sharp.max(-1).mean()


@pytest.mark.parametrize("options", [{"top_k": -1}, {"top_p": 1.1}, {"top_p": -0.1}])
def test_options_are_checked(options):
    with pytest.raises(UsageError, match="must"):
        TokenSampling(**options)
