import gzip
import json
import math
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference_weights import GOLDEN, load_recipe, recipe_params

from amskv_jax.convert.vqvae import TABLE
from amskv_jax.errors import AmskvError
from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.models.var.quantizer import phi_indices
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.schedule import VAR_256, VAR_512, ScaleSchedule

TINY = VQVAEConfig(vocab_size=64, channels=32)
SMALL = VQVAEConfig(
    schedule=ScaleSchedule(((1, 1), (1, 2), (2, 3), (3, 5))),
    vocab_size=16,
    latent_channels=8,
    channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    num_phi=1,
)


def load(name):
    with np.load(GOLDEN / f"var/{name}.npz") as file:
        return dict(file)


def channels_last(x):
    """PyTorch's [..., C, H, W] -> [..., H, W, C]."""
    return np.moveaxis(x.astype(np.float32), -3, -1)


def call(module, params, method, *args, **options):
    """Run one method of a module under jit."""
    run = partial(module.apply, method=method, **options)
    return jax.jit(run)({"params": params}, *args)


@pytest.fixture(scope="module")
def tiny_params():
    return recipe_params(TINY)  # no shape depends on the schedule


@pytest.fixture(
    scope="module", params=[("vqvae", VAR_256), ("vqvae_512", VAR_512)], ids=["256", "512"]
)
def reference(request, tiny_params):
    """The golden arrays, and ours for the same picture."""
    name, schedule = request.param
    golden = load(name)
    module = VQVAE(replace(TINY, schedule=schedule))
    apply = partial(call, module, tiny_params)

    def encode(module, pictures):
        return module.encoder(pictures), module.encode_features(pictures)

    def quantize(module, *latents):
        return [module.quantize(latent, every_scale=True) for latent in latents]

    def decode(module, tokens):
        stages = module.tokens_to_latent(tokens, every_scale=True)
        shown = stages[:, 0] if "recon_stages_strided" in golden else stages[-1]
        return stages, module.decode(shown)

    height, _ = module.config.picture_size
    ours = {}
    ours["features"], ours["latent"] = apply(
        encode, load_recipe().test_image(height).transpose(0, 2, 3, 1)
    )
    (ours["tokens"], _), (ours["tokens_alone"], ours["stages"]) = apply(
        quantize, ours["latent"], channels_last(golden["quant_conv_out"])
    )
    ours["stages_of_tokens"], ours["pictures"] = apply(decode, golden["tokens"])
    return golden, jax.tree.map(np.asarray, ours)


def test_encoder_agrees(reference):
    golden, ours = reference
    np.testing.assert_allclose(ours["features"], channels_last(golden["encoder_out"]), atol=1e-4)
    np.testing.assert_allclose(ours["latent"], channels_last(golden["quant_conv_out"]), atol=1e-4)


def test_tokens_are_equal(reference):
    golden, ours = reference
    chex.assert_type(ours["tokens"], jnp.int32)
    np.testing.assert_array_equal(ours["tokens"], golden["tokens"])
    np.testing.assert_array_equal(ours["tokens_alone"], golden["tokens"])


@pytest.mark.parametrize("stages", ["stages", "stages_of_tokens"])
def test_latent_after_every_scale_agrees(reference, stages):
    golden, ours = reference
    np.testing.assert_allclose(ours[stages][-1], channels_last(golden["fhat_last"]), atol=1e-5)
    if "fhat" in golden:  # stored in float16
        np.testing.assert_allclose(ours[stages], channels_last(golden["fhat"]), atol=4e-3)


def test_reconstruction_agrees(reference):
    golden, ours = reference
    pictures = ours["pictures"]
    chex.assert_type(pictures, jnp.float32)
    if "recon_stages_strided" in golden:
        stages = channels_last(golden["recon_stages_strided"])[:, 0]
        np.testing.assert_allclose(pictures[:, ::4, ::4], stages, atol=1e-3)
        np.testing.assert_allclose(pictures[-1], channels_last(golden["recon"])[0], atol=1e-3)
    else:
        strided = channels_last(golden["recon_strided"])
        np.testing.assert_allclose(pictures[:, ::2, ::2], strided, atol=1e-3)
    mean_and_deviation = pictures[-1].mean(), pictures[-1].std()
    np.testing.assert_allclose(mean_and_deviation, golden["recon_stats"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "schedule"), [("var_tiny", VAR_256), ("var_tiny_512", VAR_512)], ids=["256", "512"]
)
def test_teacher_inputs_agree(name, schedule, tiny_params):
    golden = load(name)
    module = VQVAE(replace(TINY, schedule=schedule))
    inputs = call(module, tiny_params, "teacher_inputs", golden["tf_tokens"])
    chex.assert_shape(inputs, (2, schedule.total - 1, 32))
    positions = golden.get("var_input_positions", slice(None))
    np.testing.assert_allclose(inputs[:, positions], golden["tf_var_input"], atol=1e-5)


def test_phi_indices_follow_the_reference():
    golden = load("interp")
    for size in ("256", "512"):
        assert phi_indices(10, 4) == tuple(golden[f"phi_index_{size}"])
    assert phi_indices(10, 1) == (0,) * 10
    assert phi_indices(10, 10) == tuple(range(10))
    assert phi_indices(6, 3) == (0, 0, 1, 1, 2, 2)
    assert phi_indices(1, 4) == (0,)


@pytest.mark.parametrize("size", ["256", "512"])
def test_full_size_parameters_are_those_of_the_checkpoint(size):
    path = GOLDEN / f"var/manifest_vqvae_ch160_{size}.json.gz"
    entries = json.loads(gzip.decompress(path.read_bytes()))
    is_buffer = load_recipe().is_buffer
    entries = {key: tuple(e["shape"]) for key, e in entries.items() if not is_buffer(key)}

    config = VQVAEConfig(schedule={"256": VAR_256, "512": VAR_512}[size])
    pictures = jax.ShapeDtypeStruct((1, *config.picture_size, 3), jnp.float32)
    params = jax.eval_shape(VQVAE(config).init, jax.random.key(0), pictures)["params"]
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    assert shapes == TABLE.param_shapes(entries)
    assert sum(map(math.prod, shapes.values())) == 108_948_355


@pytest.fixture(scope="module")
def small():
    """A model of a schedule that is not square, with recipe weights, and pictures for it."""
    pictures = jax.random.uniform(jax.random.key(1), (2, 6, 10, 3), minval=-1)
    return VQVAE(SMALL), recipe_params(SMALL), pictures


def test_shapes_of_a_schedule_that_is_not_square(small):
    module, params, pictures = small

    def everything(module, pictures):
        latent = module.encode_features(pictures)
        tokens, f_hat = module.quantize(latent)
        stages = module.tokens_to_latent(tokens, every_scale=True)
        return latent, tokens, f_hat, stages, module.decode(f_hat), module(pictures)

    latent, tokens, f_hat, stages, decoded, reconstruction = call(
        module, params, everything, pictures
    )
    chex.assert_shape([latent, f_hat], (2, 3, 5, 8))
    chex.assert_shape(tokens, (2, 1 + 2 + 6 + 15))
    chex.assert_shape(stages, (4, 2, 3, 5, 8))
    chex.assert_shape(reconstruction, pictures.shape)
    chex.assert_trees_all_close(stages[-1], f_hat, atol=1e-5)
    chex.assert_trees_all_close(reconstruction, decoded, atol=1e-5)


def test_initialised_model_is_ready_for_training(small):
    module, _, pictures = small
    key = jax.random.key(0, impl="rbg")  # compiles faster than the default generator
    params = jax.jit(module.init)(key, pictures)["params"]
    chex.assert_tree_all_finite(params)
    assert 0 < np.abs(params["quantizer"]["codebook"]).max() <= 1 / SMALL.vocab_size
    kernel = params["quantizer"]["phi_kernel"]
    assert 0 < kernel.std() * np.sqrt(9 * SMALL.latent_channels) < 0.5
    latent = call(module, params, "encode_features", pictures)
    assert 0.1 < latent.std() < 10


def test_scale_by_scale_equals_whole_sequence(small):
    module, params, _ = small
    schedule = SMALL.schedule
    tokens = jax.random.randint(jax.random.key(2), (2, schedule.total), 0, SMALL.vocab_size)

    def generate(module, tokens):
        f_hat, inputs = jnp.zeros((2, 3, 5, 8)), []
        for scale in range(schedule.num_scales):
            codes = module.embed(tokens[:, schedule.slice(scale)])
            f_hat = module.accumulate(f_hat, codes, scale)
            if scale < schedule.num_scales - 1:
                inputs.append(module.next_input(f_hat, scale))
        return f_hat, jnp.concatenate(inputs, axis=1)

    def whole(module, tokens):
        return module.tokens_to_latent(tokens), module.teacher_inputs(tokens)

    result, expected = (call(module, params, method, tokens) for method in (generate, whole))
    chex.assert_shape(result[1], (2, schedule.total - 1, 8))
    chex.assert_trees_all_close(result, expected, atol=1e-5)


def test_one_scale_needs_no_teacher_inputs():
    module = VQVAE(replace(SMALL, schedule=ScaleSchedule(((3, 5),))))
    tokens = jnp.zeros((2, 15), jnp.int32)
    params = recipe_params(module.config)
    chex.assert_shape(call(module, params, "teacher_inputs", tokens), (2, 0, 8))


def test_codebook_and_phi_receive_gradients(small):
    module, params, _ = small
    latent = jax.random.normal(jax.random.key(3), (2, 3, 5, 8))

    @jax.jit
    @jax.grad
    def gradients(params):
        _, f_hat = module.apply({"params": params}, latent, method="quantize")
        return jnp.mean((f_hat - latent) ** 2)

    quantizer = gradients(params)["quantizer"]
    chex.assert_tree_all_finite(quantizer)
    assert all(np.abs(gradient).max() > 0 for gradient in quantizer.values())


def test_bfloat16_concerns_only_encoder_and_decoder(small):
    module, params, pictures = small
    latent = jax.random.normal(jax.random.key(4), (2, 3, 5, 8))

    def everything(module, pictures, latent):
        images = module.encode_features(pictures), module.decode(latent)
        return images, module.quantize(latent)

    full, half = (
        call(m, params, everything, pictures, latent) for m in (module, VQVAE(SMALL, "bfloat16"))
    )
    for result, expected in zip(half[0], full[0], strict=True):
        chex.assert_type(result, jnp.float32)
        assert 0 < np.abs(result - expected).max() < 0.1 * np.abs(expected).max()
    chex.assert_trees_all_equal(half[1], full[1])


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        ("encode_features", (jnp.zeros((1, 10, 6, 3)),), r"\(10, 6, 3\).*\(6, 10, 3\)"),
        ("quantize", (jnp.zeros((1, 3, 4, 8)),), r"latent.*\(3, 4, 8\).*\(3, 5, 8\)"),
        ("teacher_inputs", (jnp.zeros((1, 23), jnp.int32),), r"tokens.*\(23,\).*\(24,\)"),
        ("accumulate", (jnp.zeros((1, 3, 5, 8)), jnp.zeros((1, 2, 8)), 2), r"scale 2.*\(6, 8\)"),
    ],
)
def test_misshaped_input_is_named(small, method, args, message):
    module, params, _ = small
    with pytest.raises(AmskvError, match=message):
        module.apply({"params": params}, *args, method=method)
