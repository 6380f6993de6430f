"""The bitwise quantiser: its verbs, its layouts, its complaints."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bsq_golden import call, recipe_params
from checks import message
from hypothesis import given, settings
from hypothesis import strategies as st

from amskv_jax.errors import AmskvError
from amskv_jax.models.infinity.bsq import from_grids, patchify, to_grids, unpatchify
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.vae import BSQVAE
from amskv_jax.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule(((1, 1), (1, 2), (2, 3), (3, 5)))
PLAIN = BSQConfig(codebook_dim=6, channels=32, channel_multipliers=(1, 2), num_res_blocks=1)
PATCHED = BSQConfig(
    codebook_dim=3, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, patchify=True
)
CONFIGS = pytest.mark.parametrize("config", [PLAIN, PATCHED], ids=["plain", "patchify"])


def random_codes(config, batch=2, scales=4):
    shape = (batch, SCHEDULE.offsets[scales], config.token_bits)
    return np.random.RandomState(0).randint(0, 2, shape).astype(np.uint8)


@CONFIGS
def test_shapes(config):
    module = BSQVAE(config, SCHEDULE)
    height, width = config.picture_size(SCHEDULE)
    pictures = jax.random.uniform(jax.random.key(1), (2, height, width, 3), minval=-1)

    def everything(module, pictures):
        latent = module.encode_features(pictures)
        codes, f_hat = module.quantize(latent)
        inputs = module.teacher_inputs(codes)
        return latent, f_hat, inputs, codes, module.decode(f_hat), module(pictures)

    results = call(module, recipe_params(config), everything, pictures)
    latent, f_hat, inputs, codes, decoded, reconstruction = results
    latent_shape = (6, 10, 3) if config.patchify else (3, 5, 6)
    assert module.latent_shape == latent_shape
    chex.assert_shape([latent, f_hat], (2, *latent_shape))
    chex.assert_shape(inputs, (2, SCHEDULE.total - 1, config.token_bits))
    chex.assert_shape(codes, (2, SCHEDULE.total, config.token_bits))
    chex.assert_shape([decoded, reconstruction], pictures.shape)
    chex.assert_type([latent, f_hat, inputs, decoded], jnp.float32)
    np.testing.assert_array_equal(decoded, reconstruction)
    assert np.abs(decoded).max() <= 1


@CONFIGS
def test_verbs_of_drawing_give_what_teacher_forcing_gives(config):
    tokenizer = BSQVAE(config, SCHEDULE).bind({})
    codes = random_codes(config)
    latent, inputs = jnp.zeros((2, *tokenizer.latent_shape)), []
    for scale in range(SCHEDULE.num_scales):
        entries = tokenizer.embed(codes[:, SCHEDULE.slice(scale)])
        latent = tokenizer.accumulate(latent, entries, scale)
        if scale + 1 < SCHEDULE.num_scales:
            inputs.append(tokenizer.next_input(latent, scale))
    np.testing.assert_array_equal(tokenizer.tokens_to_latent(codes), latent)
    np.testing.assert_array_equal(tokenizer.teacher_inputs(codes), np.concatenate(inputs, axis=1))


@CONFIGS
def test_last_scale_is_added_as_it_is(config):
    tokenizer = BSQVAE(config, SCHEDULE).bind({})
    entries = jax.random.normal(jax.random.key(0), (2, 15, config.token_bits))
    zeros = jnp.zeros((2, *tokenizer.latent_shape))
    latent = tokenizer.accumulate(zeros, entries, 3)
    expected = unpatchify(entries.reshape(2, 3, 5, -1), config.positions_per_side)
    np.testing.assert_array_equal(latent, expected)


@CONFIGS
def test_entries_have_unit_length_and_mixtures_lie_between(config):
    tokenizer = BSQVAE(config, SCHEDULE).bind({})
    codes = random_codes(config)
    entries = tokenizer.embed(codes)
    positions = np.asarray(entries).reshape(2, -1, config.codebook_dim)
    np.testing.assert_allclose(np.linalg.norm(positions, axis=-1), 1, rtol=1e-6)
    certain = jax.nn.one_hot(codes, 2)
    np.testing.assert_allclose(tokenizer.embed_mixture(certain), entries, atol=1e-7)
    undecided = jnp.full(certain.shape, 0.5)
    np.testing.assert_array_equal(tokenizer.embed_mixture(undecided), 0 * entries)
    mixed = tokenizer.embed_mixture(0.75 * certain + 0.25 * (1 - certain))
    np.testing.assert_allclose(mixed, entries / 2, atol=1e-6)


@CONFIGS
def test_codes_of_a_latent_that_codes_make_are_stable(config):
    """Quantising is greedy, so f_hat comes closer to the latent than the scales before did."""
    tokenizer = BSQVAE(config, SCHEDULE).bind({})
    latent = 2 * jax.random.normal(jax.random.key(5), (2, *tokenizer.latent_shape))
    codes, f_hat = tokenizer.quantize(latent)
    np.testing.assert_allclose(tokenizer.tokens_to_latent(codes), f_hat, atol=1e-6)
    last = tokenizer.embed(codes[:, SCHEDULE.slice(3)])
    before = f_hat - tokenizer.accumulate(jnp.zeros_like(f_hat), last, 3)
    assert jnp.abs(latent - f_hat).mean() < jnp.abs(latent - before).mean()


def test_zero_is_bit_zero():
    tokenizer = BSQVAE(PLAIN, ScaleSchedule(((1, 1),))).bind({})
    codes, _ = tokenizer.quantize(jnp.array([0.0, -0.0, 1e-30, -1e-30, 1, -1]).reshape(1, 1, 1, 6))
    assert codes[0, 0].tolist() == [0, 0, 1, 0, 1, 0]


def test_one_scale_needs_no_inputs():
    module = BSQVAE(PLAIN, ScaleSchedule(((3, 5),)))
    inputs = module.bind({}).teacher_inputs(jnp.zeros((2, 15, 6), jnp.uint8))
    chex.assert_shape(inputs, (2, 0, 6))


def test_order_of_a_patch():
    """Channel c of position (dy, dx) is channel 4 c + 2 dy + dx of the token."""
    maps = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = patchify(maps, 2)
    chex.assert_shape(tokens, (2, 2, 3, 12))
    for c in range(3):
        for dy in range(2):
            for dx in range(2):
                np.testing.assert_array_equal(
                    tokens[..., 4 * c + 2 * dy + dx], maps[:, dy::2, dx::2, c]
                )


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.sampled_from((1, 2)))
def test_patchify_is_undone(height, width, channels, side):
    maps = np.random.RandomState(0).rand(2, side * height, side * width, channels)
    np.testing.assert_array_equal(unpatchify(patchify(maps, side), side), maps)


@CONFIGS
@pytest.mark.parametrize("scales", [1, 3, 4])
def test_layouts_of_codes(config, scales):
    codes = random_codes(config, scales=scales)
    own = to_grids(codes, config, SCHEDULE)
    chex.assert_type(own, np.uint8)
    positions = config.grids(SCHEDULE).offsets[scales]
    chex.assert_shape(own, (2, positions, config.codebook_dim))
    np.testing.assert_array_equal(from_grids(own, config, SCHEDULE), codes)
    if not config.patchify:
        np.testing.assert_array_equal(own, codes)


@pytest.mark.parametrize("shape", [(2, 4, 12), (2, 9, 3), (9, 12), (2, 0, 12)])
def test_codes_of_another_schedule_are_refused(shape):
    text = message(to_grids, np.zeros(shape, np.uint8), PATCHED, SCHEDULE)
    assert str(shape) in text
    assert "[pictures, n, 12] where n is one of 1, 3, 9, 24" in text


def test_codes_on_other_grids_are_refused():
    text = message(from_grids, np.zeros((1, 3, 3), np.uint8), PATCHED, SCHEDULE)
    assert "[pictures, n, 3] where n is one of 4, 12, 36, 96" in text
    assert "2, 2x4, 4x6, 6x10" in text


@CONFIGS
def test_bfloat16_concerns_only_encoder_and_decoder(config):
    height, width = config.picture_size(SCHEDULE)
    pictures = jax.random.uniform(jax.random.key(1), (2, height, width, 3), minval=-1)
    latent = jax.random.normal(jax.random.key(4), (2, *config.latent_shape(SCHEDULE)))

    def everything(module, pictures, latent):
        images = module.encode_features(pictures), module.decode(latent)
        return images, module.quantize(latent)

    params = recipe_params(config)
    full, half = (
        call(BSQVAE(config, SCHEDULE, dtype), params, everything, pictures, latent)
        for dtype in ("float32", "bfloat16")
    )
    for result, expected in zip(half[0], full[0], strict=True):
        chex.assert_type(result, jnp.float32)
        assert 0 < np.abs(result - expected).max() < 0.1 * np.abs(expected).max()
    chex.assert_trees_all_equal(half[1], full[1])


@pytest.mark.parametrize(
    ("method", "args", "text"),
    [
        ("encode_features", (jnp.zeros((1, 10, 6, 3)),), r"\(10, 6, 3\).*\(6, 10, 3\)"),
        ("quantize", (jnp.zeros((1, 3, 4, 6)),), r"latent.*\(3, 4, 6\).*\(3, 5, 6\)"),
        ("teacher_inputs", (jnp.zeros((1, 23, 6), jnp.int32),), r"codes.*\(23, 6\).*\(24, 6\)"),
        ("accumulate", (jnp.zeros((1, 3, 5, 6)), jnp.zeros((1, 2, 6)), 2), r"scale 2.*\(6, 6\)"),
    ],
)
def test_misshaped_input_is_named(method, args, text):
    with pytest.raises(AmskvError, match=text):
        BSQVAE(PLAIN, SCHEDULE).apply({"params": {}}, *args, method=method)


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"codebook_dim": 0}, "codebook_dim is 0"), ({"channels": 40}, "40 x 1 channels")],
)
def test_impossible_shapes_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        BSQConfig(**fields)
