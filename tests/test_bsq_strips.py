"""Decoding in strips: the same pictures, without seams, in less memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bsq_golden import arrays, call, channels_last, module_of, recipe_params
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from amskv_jax.models.convolutions import Decoder, GroupNorm
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.vae import BSQVAE, STRIP_BYTES
from amskv_jax.models.strips import identity, in_strips, strip_length, sum_in_strips
from amskv_jax.schedule import ScaleSchedule

SMALL = BSQVAE(BSQConfig(16, 64, (1, 2), 1), ScaleSchedule.square((1, 16)), strip_bytes=None)


def test_pictures_of_the_reference_have_no_seams():
    """They agree much better than with the reference, whose tolerance is 5e-4."""
    name = "bsq_vae_d16_wide"  # 176 x 352 pixels: 352 x 64 channels x 4 bytes = 88 KiB a row
    golden, module = arrays(name), module_of(name, strip_bytes=None)
    params = recipe_params(module.config)
    f_hat = channels_last(golden["summed_codes"])
    whole = call(module, params, "decode", f_hat)
    strips = call(module.clone(strip_bytes=2**18), params, "decode", f_hat)
    np.testing.assert_allclose(strips, whole, atol=2e-5)
    np.testing.assert_allclose(strips[:, ::4, ::4], channels_last(golden["recon_sub"]), atol=5e-4)


@pytest.mark.parametrize("rows", [16, 8, 1])
def test_pictures_of_a_batch_have_no_seams(rows):
    params = recipe_params(SMALL.config)
    f_hat = jax.random.normal(jax.random.key(0), (2, 16, 16, 16))
    whole = call(SMALL, params, "decode", f_hat)
    strips = call(SMALL.clone(strip_bytes=rows * 32 * 64 * 4), params, "decode", f_hat)
    np.testing.assert_allclose(strips, whole, atol=2e-5)


def test_bfloat16_has_no_seams_either():
    """Its rounding moves pictures more than strips do, so errors against float32 are compared."""
    params = recipe_params(SMALL.config)
    f_hat = jax.random.normal(jax.random.key(0), (4, 16, 16, 16))
    exact = call(SMALL, params, "decode", f_hat)
    whole, strips = (
        np.abs(call(SMALL.clone(dtype="bfloat16", strip_bytes=b), params, "decode", f_hat) - exact)
        for b in (None, 8 * 32 * 64 * 2)
    )
    assert 0 < strips.mean() < 1.1 * whole.mean()
    borders = strips.reshape(4, -1, 8, 32, 3)[:, :, [0, -1]]  # a strip has 8 rows, or 4
    assert borders.mean() < 1.1 * strips.mean()


def test_strips_have_the_same_parameters():
    schedule = ScaleSchedule.square((1, 2))
    module = BSQVAE(BSQConfig(16, 32, (1, 2), 1), schedule)
    pictures = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    whole, strips = (
        jax.eval_shape(module.clone(strip_bytes=b).init, jax.random.key(0), pictures)
        for b in (None, 1)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(whole, strips)


def temporary_bytes(decoder, params, side):
    latent = jax.ShapeDtypeStruct((1, side, side, 16), jnp.float32)
    return jax.jit(decoder.apply).lower(params, latent).compile().memory_analysis()


def test_strips_take_less_memory():
    """As at 1024 pixels, with a sixteenth of the area and of the bound."""
    decoder = Decoder(32, (1, 2, 4), num_blocks=2, attention=False, dtype="float32")
    latent = jnp.zeros((1, 4, 4, 16))
    params = jax.eval_shape(decoder.init, jax.random.key(0), latent)
    whole = temporary_bytes(decoder, params, 64).temp_size_in_bytes
    strips = temporary_bytes(decoder.clone(strip_bytes=2**18), params, 64).temp_size_in_bytes
    largest = 256 * 256 * 32 * 4
    assert whole > 6 * largest
    # Two maps of 32 channels and one of 64, and a few strips.
    assert strips < 4.5 * largest


def test_small_pictures_are_not_cut():
    """So that what VAR's sizes compile to does not change."""
    config = BSQConfig()
    schedule = ScaleSchedule.square((1, 16))
    height, width = config.picture_size(schedule)
    row_bytes = 4 * width * config.channels * config.channel_multipliers[1]
    assert strip_length(height, row_bytes, STRIP_BYTES) == height
    assert strip_length(1024, 4 * row_bytes, STRIP_BYTES) == 64


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 1000), st.integers(1, 100_000))
def test_strips_cover_the_map_within_the_bound(height, row_bytes, bound):
    length = strip_length(height, row_bytes, bound)
    assert height % length == 0
    assert length * row_bytes <= bound or length == 1
    assert strip_length(height, row_bytes, None) == height


@pytest.mark.parametrize("enlarge", [1, 2])
@pytest.mark.parametrize("height", [1, 5, 6, 8])
def test_any_height_and_enlargement(height, enlarge):
    x = jax.random.normal(jax.random.key(height), (2, height, 3, 4))
    conv = nn.Conv(5, (3, 3))

    class Layer(nn.Module):
        strip_bytes: int | None

        @nn.compact
        def __call__(self, x):
            def step(conv, rows):
                return conv(rows.repeat(enlarge, axis=1).repeat(enlarge, axis=2))

            # Something that is not zero at zero, as the activation of a shifted norm.
            maps = [(x, lambda rows: rows + 1)]
            options = {"enlarge": enlarge, "strip_bytes": self.strip_bytes}
            return in_strips(nn.Conv(5, (3, 3), name="conv"), step, maps, 5, x.dtype, **options)

    params = {"params": {"conv": conv.init(jax.random.key(1), x)["params"]}}
    whole, strips = (jax.jit(Layer(b).apply)(params, x) for b in (None, enlarge**2 * 3 * 4 * 4 * 2))
    chex.assert_shape(strips, (2, enlarge * height, enlarge * 3, 5))
    np.testing.assert_allclose(strips, whole, atol=1e-6)


def test_statistics_are_those_of_the_whole_map():
    x = 100 + jax.random.normal(jax.random.key(0), (2, 6, 5, 64))
    x = x.at[:, 3:].mul(3)  # strips differ
    params = nn.GroupNorm(32).init(jax.random.key(1), x)
    scale = jax.random.normal(jax.random.key(2), (64,))
    params = {"params": params["params"] | {"scale": scale}}
    expected = nn.GroupNorm(32, epsilon=1e-6, use_fast_variance=False).apply(params, x)
    for strip_bytes in (None, 1):
        norm = GroupNorm(jnp.float32, strip_bytes)
        result = jax.jit(lambda params, x, norm=norm: norm.apply(params, x)(x))(params, x)
        np.testing.assert_allclose(result, expected, atol=1e-4)
    total = sum_in_strips(x, lambda rows: rows.sum((1, 2)), 1)
    np.testing.assert_allclose(total, x.sum((1, 2)), rtol=1e-5)
    assert identity(x) is x
