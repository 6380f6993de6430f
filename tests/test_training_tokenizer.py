from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_weights import vqvae_params
from training_helpers import (
    OPTIMIZATION,
    RUN,
    SCHEDULE,
    TOKENIZER,
    TOKENIZER_TRAINING,
    comparable,
    optimized_programs,
    smooth_pictures,
)

from amskv_jax.errors import AmskvError
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.training.config import TokenizerTraining
from amskv_jax.training.tokenizer import objective, train_tokenizer
from amskv_jax.training.tokens import TokenSet, noisy_tokens, tokenize


def test_gradients_pass_the_quantiser_straight_through():
    # One scale and no convolution phi: then f_hat is the nearest codebook entry of every position.
    model = replace(TOKENIZER, schedule=ScaleSchedule(((2, 2),)), phi_ratio=0.0)
    config = TokenizerTraining(model, OPTIMIZATION, RUN, l1=0.5, l2=2.0, commitment=0.3)
    params, module = vqvae_params(model), VQVAE(model)
    pictures = jax.random.uniform(jax.random.key(0), (2, 2, 2, 3), minval=-1)

    @jax.jit
    def both(params):
        found = jax.grad(lambda params: objective(config, params, pictures)[0])(params)

        def encode(params):
            return module.apply({"params": params}, pictures, method="encode_features")

        def reconstruction(params, f_hat):
            def decode(module):
                return module.decoder(module.post_quant_conv(f_hat))

            error = module.apply({"params": params}, method=decode) - pictures
            return 0.5 * jnp.abs(error).mean() + 2 * jnp.square(error).mean()

        latent, encoder_vjp = jax.vjp(encode, params)
        tokens, f_hat = module.apply({"params": params}, latent, method="quantize")
        decoder, at_f_hat = jax.grad(reconstruction, argnums=(0, 1))(params, f_hat)
        (encoder,) = encoder_vjp(at_f_hat + 0.3 * 2 * (latent - f_hat) / latent.size)
        return found, encoder, decoder, latent, tokens

    found, encoder, decoder, latent, tokens = jax.tree.map(np.asarray, both(params))
    chex.assert_tree_all_finite(found)
    for part, expected in [
        ("encoder", encoder),
        ("quant_conv", encoder),
        ("decoder", decoder),
        ("post_quant_conv", decoder),
    ]:
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(found[part])) > 0.1
        chex.assert_trees_all_close(found[part], expected[part], rtol=1e-3, atol=1e-3)

    codebook = np.asarray(params["quantizer"]["codebook"])
    vectors = latent.reshape(-1, 8)
    nearest = np.square(vectors[:, None] - codebook).sum(-1).argmin(-1)
    np.testing.assert_array_equal(tokens.reshape(-1), nearest)
    by_hand = np.zeros_like(codebook)
    np.add.at(by_hand, nearest, 2 * (codebook[nearest] - vectors) / latent.size)
    np.testing.assert_allclose(found["quantizer"]["codebook"], by_hand, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def trained_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    pictures = smooth_pictures()
    with optimized_programs():
        params = train_tokenizer(TOKENIZER_TRAINING, pictures, directory, validation=pictures)
    return TOKENIZER_TRAINING, params, directory


def test_tokenizer_learns_a_handful_of_pictures(trained_tokenizer):
    _, params, directory = trained_tokenizer
    chex.assert_tree_all_finite(params)
    first, *_, last, evaluation = comparable(directory)
    assert last["loss"] < 0.7 * first["loss"]
    assert last["psnr"] > first["psnr"] + 2
    assert len(last["error_per_scale"]) == len(last["usage_per_scale"]) == 3
    assert last["usage"] > 0.5  # of 32 entries; without new seeds most stay out of use
    assert evaluation["validation_psnr"] == pytest.approx(last["psnr"], abs=3)


def test_finished_tokenizer_is_returned_at_once(trained_tokenizer):
    config, params, directory = trained_tokenizer
    again = train_tokenizer(config, smooth_pictures(), directory)
    chex.assert_trees_all_equal(again, params)


def test_tokenizer_refuses_pictures_of_another_size(tmp_path):
    model = replace(TOKENIZER, schedule=ScaleSchedule.square((1, 2)))
    with pytest.raises(AmskvError, match=r"4x4 pixels.*the model's 2x2"):
        train_tokenizer(TokenizerTraining(model, OPTIMIZATION, RUN), smooth_pictures(), tmp_path)


# Tokens.


def test_tokens_of_pictures_and_their_mirror_images(trained_tokenizer):
    _, params, _ = trained_tokenizer
    pictures = smooth_pictures()
    pictures.pixels[:, :, :2] //= 2  # so that mirroring matters
    tokens = tokenize(TOKENIZER, params, pictures, copies=2, batch_size=3)
    chex.assert_shape(tokens.target, (2, 6, SCHEDULE.total))
    chex.assert_type(tokens.target, np.uint8)
    assert tokens.history is tokens.target
    assert (tokens.target[0] != tokens.target[1]).any()
    mirrored = replace(pictures, pixels=pictures.pixels[:, :, ::-1])
    again = tokenize(TOKENIZER, params, mirrored, copies=1, batch_size=3)
    np.testing.assert_array_equal(again.target[0], tokens.target[1])


def test_token_file(tmp_path):
    target = np.arange(12, dtype=np.uint16).reshape(1, 3, 4)
    tokens = TokenSet(target, target + 1, np.array([0, 1, 0], np.int32), ("a", "b"))
    tokens.save(tmp_path / "tokens.npz")
    loaded = TokenSet.load(tmp_path / "tokens.npz")
    chex.assert_trees_all_equal(vars(loaded), vars(tokens))
    assert (len(loaded), loaded.copies) == (3, 1)


def test_targets_describe_what_a_noisy_history_left_over():
    params, module = vqvae_params(TOKENIZER), VQVAE(TOKENIZER)
    codebook = params["quantizer"]["codebook"]
    latent = jax.random.normal(jax.random.key(1), (3, 4, 4, 8))
    strength = jnp.array([0.0, 0.3, 0.3])

    @jax.jit
    def noisy(key):
        def run(module):
            target, history = noisy_tokens(module, codebook, latent, strength, key)
            quantised, _ = module.quantize(latent)
            stages = module.tokens_to_latent(history, every_scale=True)
            # The last scale alone sees the full grid, so its targets are easy to check.
            rest = (latent - stages[-2]).reshape(3, 16, 8)
            return target, history, quantised, rest

        return module.apply({"params": params}, method=run)

    target, history, quantised, rest = jax.tree.map(np.asarray, noisy(jax.random.key(2)))
    np.testing.assert_array_equal(target[0], quantised[0])
    np.testing.assert_array_equal(history[0], quantised[0])
    assert (target[:, 0] == quantised[:, 0]).all()
    assert 0.02 < (history[1:] != target[1:]).mean() < 0.9
    nearest = np.square(rest[..., None, :] - np.asarray(codebook)).sum(-1).argmin(-1)
    np.testing.assert_array_equal(target[:, 5:], nearest)
