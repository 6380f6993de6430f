"""Infinity's tokenizer against outputs of the reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bsq_golden import (
    GENERATED,
    arrays,
    call,
    channels_last,
    facts,
    golden_picture,
    module_of,
    recipe_params,
)

from amskv_jax.models.infinity.bsq import from_grids, to_grids
from amskv_jax.resize import resize

TOKENIZERS = ["bsq_vae_d16", "bsq_vae_d16_wide", "bsq_vae_d14_patchify"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def reference(request):
    """The module, the golden arrays, and ours for the same picture and for the golden codes."""
    name = request.param
    golden, about, module = arrays(name), facts(name), module_of(name)
    height, width = about["image_hw"]
    picture = golden_picture(height, width, about["phase"])
    rows, columns = (0, height // 3, height - 1), (0, width // 5, width - 1)
    probe = [picture[c, row, column] for c in range(3) for row in rows for column in columns]
    np.testing.assert_allclose(probe, golden["image_probe"], atol=1e-12)

    def encode(module, pictures):
        latent = module.encode_features(pictures)
        return {"latent": latent, "codes": module.quantize(latent)}

    def decode(module, codes):
        f_hat = module.tokens_to_latent(codes)
        pictures, raw = module.decode(f_hat), module.decoder(f_hat)
        return {
            "f_hat": f_hat,
            "pictures": pictures,
            "raw": raw,
            "inputs": module.teacher_inputs(codes),
        }

    params = recipe_params(module.config)
    pictures = np.moveaxis(picture, 0, -1)[None].astype(np.float32)
    ours = call(module, params, encode, pictures)
    ours |= call(module, params, decode, golden["gt_bits_model"])
    return module, golden, jax.tree.map(np.asarray, ours)


def test_encoder_agrees(reference):
    _, golden, ours = reference
    chex.assert_type(ours["latent"], jnp.float32)
    np.testing.assert_allclose(ours["latent"], channels_last(golden["h"]), atol=5e-5)


def test_bits_are_equal(reference):
    module, golden, ours = reference
    codes, f_hat = ours["codes"]
    chex.assert_type(codes, jnp.uint8)
    np.testing.assert_array_equal(codes, golden["gt_bits_model"])
    np.testing.assert_array_equal(to_grids(codes, module.config, module.schedule), golden["bits"])
    np.testing.assert_allclose(f_hat, channels_last(golden["summed_codes"]), atol=1e-5)


def test_layouts_of_the_files_turn_into_each_other(reference):
    module, golden, _ = reference
    codes = from_grids(golden["bits"], module.config, module.schedule)
    chex.assert_type(codes, np.uint8)
    np.testing.assert_array_equal(codes, golden["gt_bits_model"])


def test_latent_of_codes_agrees(reference):
    _, golden, ours = reference
    np.testing.assert_allclose(ours["f_hat"], channels_last(golden["summed_codes"]), atol=1e-5)


def test_pictures_agree(reference):
    _, golden, ours = reference
    chex.assert_type(ours["pictures"], jnp.float32)
    np.testing.assert_allclose(
        ours["pictures"][:, ::4, ::4], channels_last(golden["recon_sub"]), atol=5e-4
    )
    np.testing.assert_allclose(
        ours["raw"][:, ::4, ::4], channels_last(golden["recon_raw_sub"]), atol=5e-4
    )
    # Stored in float16, 5e-4 at 1.
    np.testing.assert_allclose(ours["pictures"], channels_last(golden["recon"]), atol=1e-3)


def test_teacher_inputs_agree(reference):
    module, golden, ours = reference
    chex.assert_shape(ours["inputs"], (1, module.schedule.total - 1, module.config.token_bits))
    np.testing.assert_allclose(ours["inputs"], golden["x_BLC_wo_prefix"], atol=1e-5)


def test_inputs_which_the_reference_pools_are_not_those_of_the_transformer(reference):
    """What its quantiser returns beside the codes is pooled by area, unlike x_BLC_wo_prefix."""
    module, golden, ours = reference
    tokenizer, codes, scale = module.bind({}), golden["gt_bits_model"], 3
    f_hat = jnp.zeros((1, *tokenizer.latent_shape))
    for earlier in range(scale):
        entries = tokenizer.embed(codes[:, module.schedule.slice(earlier)])
        f_hat = tokenizer.accumulate(f_hat, entries, earlier)
    grids = module.config.grids(module.schedule)

    def part(inputs, schedule):  # which start with the second scale
        own = schedule.slice(scale)
        return inputs[:, own.start - schedule.tokens[0] : own.stop - schedule.tokens[0]]

    pooled = part(golden["var_inputs_area"], grids)
    area = resize(f_hat, grids.grids[scale], "area").reshape(pooled.shape)
    np.testing.assert_allclose(area, pooled, atol=1e-5)
    sampled = part(ours["inputs"], module.schedule)
    np.testing.assert_allclose(tokenizer.next_input(f_hat, scale - 1), sampled, atol=1e-6)
    bilinear = resize(f_hat, grids.grids[scale], "bilinear").reshape(pooled.shape)
    assert np.abs(bilinear - pooled).max() > 0.01


@pytest.mark.parametrize("name", TOKENIZERS)
def test_values_of_bits_agree(name):
    golden, module = arrays(name), module_of(name)
    labels = golden["labels"]
    codes = np.moveaxis(golden["label_codes"], 1, -1)
    np.testing.assert_allclose(module.bind({}).embed(labels), codes, atol=1e-7)
    value = facts(name)["codebook_scale"]
    np.testing.assert_allclose(np.abs(module.bind({}).embed(labels)), value, rtol=1e-6)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_latents_agree(name):
    golden, module = arrays(name), module_of(name)
    codes = golden["bits"].copy()
    if "forced_bits_vae" in golden:
        forced = from_grids(golden["forced_bits_vae"], module.config, module.schedule)
        codes[:, : forced.shape[1]] = forced

    def run(module, codes):
        return module.tokens_to_latent(codes), module.teacher_inputs(codes)

    f_hat, inputs = call(module, {}, run, codes)
    np.testing.assert_allclose(f_hat, channels_last(golden["summed_codes"]), atol=1e-5)
    np.testing.assert_allclose(inputs, golden["word_embed_in"], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in GENERATED if name.endswith("gen_logits")])
def test_generated_pictures_agree(name):
    golden, module = arrays(name), module_of(name)
    f_hat = channels_last(golden["summed_codes"])
    pictures = np.asarray(call(module, recipe_params(module.config), "decode", f_hat))
    height, width = module.config.picture_size(module.schedule)
    chex.assert_shape(pictures, (2, height, width, 3))
    decoded = channels_last(golden["decoded_sub"])
    np.testing.assert_allclose(pictures[:, ::4, ::4], decoded, atol=5e-4)
    # Truncated, blue first.
    values = ((pictures[0] + 1) / 2 * 255).astype(np.uint8)[..., ::-1].astype(int)
    difference = np.abs(values - golden["image_u8"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 2e-3
