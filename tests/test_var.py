"""The VAR transformer and generation against the reference's numbers."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_stats import cache_shape
from reference_weights import GOLDEN, recipe_params

from amskv_jax.generate import picture_keys
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.models.var.transformer import VAR
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.policies import Full
from amskv_jax.schedule import VAR_256, VAR_512, ScaleSchedule
from amskv_jax.testing import sample, with_pictures

CONFIGS = {
    "var_tiny": VARConfig(2, 128, 2, VAR_256, 10, 64),
    "var_tiny_512": VARConfig(2, 128, 2, VAR_512, 10, 64, shared_aln=True),
    "var_tiny_nol2": VARConfig(2, 128, 2, VAR_256, 10, 64, attn_l2_norm=False),
}


def load(name):
    with np.load(GOLDEN / "var" / f"{name}.npz", allow_pickle=False) as data:
        return dict(data)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    tokenizer = VQVAEConfig(config.schedule, 64, 32, 32)
    params = {"transformer": recipe_params(config), "tokenizer": recipe_params(tokenizer)}
    return load(request.param), config, tokenizer, params


@pytest.fixture(scope="module")
def tiny():
    config, tokenizer = CONFIGS["var_tiny"], VQVAEConfig(VAR_256, 64, 32, 32)
    return (
        config,
        tokenizer,
        {"transformer": recipe_params(config), "tokenizer": recipe_params(tokenizer)},
    )


def greedy(config, tokenizer, params, plan, labels, **options):
    labels = jnp.asarray(labels, jnp.int32)
    keys = picture_keys(jax.random.key(0), len(labels))
    model = VARModel(config, tokenizer)
    samples = sample(model, plan, params, labels, keys, trace=True, **options)
    return with_pictures(model, plan, params, samples)


def test_parameter_tree_is_that_of_the_converter(model):
    _, config, _, params = model
    features = jnp.zeros((1, config.schedule.total - 1, config.latent_channels))
    shapes = jax.eval_shape(VAR(config).init, jax.random.key(0), jnp.zeros(1, int), features)
    chex.assert_trees_all_equal_shapes(shapes["params"], params["transformer"])


def test_teacher_forced_logits(model):
    golden, config, tokenizer, params = model
    if "tf_var_input" in golden and "positions" not in golden:
        inputs = golden["tf_var_input"]
    else:
        inputs = jax.jit(
            lambda tokens: VQVAE(tokenizer).apply(
                {"params": params["tokenizer"]}, tokens, method="teacher_inputs"
            )
        )(golden["tf_tokens"])
    logits = jax.jit(VAR(config).apply)({"params": params["transformer"]}, golden["labels"], inputs)
    chex.assert_shape(logits, (len(golden["labels"]), config.schedule.total, 64))
    logits = np.asarray(logits)[:, golden.get("positions", slice(None))]
    np.testing.assert_allclose(logits, golden["tf_logits"], atol=2e-5)


def test_greedy_generation(model):
    golden, config, tokenizer, params = model
    plan = Full().plan(config.cache_shape)
    out = greedy(config, tokenizer, params, plan, golden["labels"])
    np.testing.assert_array_equal(out.tokens, golden["ar_tokens"])
    logits = np.asarray(out.logits)
    shown = logits[:, golden.get("positions", slice(None))]
    np.testing.assert_allclose(shown, golden["ar_logits"], atol=2e-5)
    best = np.sort(logits, axis=-1)[..., -2:]
    np.testing.assert_allclose(best[..., 1] - best[..., 0], golden["ar_margin"], atol=4e-5)
    for scale, (mean, deviation) in enumerate(golden["ar_logits_stats"]):
        own = logits[:, config.schedule.slice(scale)].astype(np.float64)
        np.testing.assert_allclose([own.mean(), own.std()], [mean, deviation], atol=1e-5)
    latents = np.moveaxis(np.asarray(out.latents), -1, 2)
    if "ar_fhat" in golden:
        np.testing.assert_allclose(latents, golden["ar_fhat"], atol=4e-3)
    last_is_half = golden["ar_fhat_last"].dtype == np.float16
    np.testing.assert_allclose(
        latents[-1], golden["ar_fhat_last"], atol=4e-3 if last_is_half else 2e-5
    )
    for scale, (mean, deviation) in enumerate(golden["fhat_stats"]):
        own = latents[scale].astype(np.float64)
        np.testing.assert_allclose([own.mean(), own.std()], [mean, deviation], atol=1e-5)
    pictures = np.moveaxis(np.asarray(out.pictures), -1, 1)
    chex.assert_shape(out.pictures, (len(golden["labels"]), *tokenizer.picture_size, 3))
    if "image" in golden:
        np.testing.assert_allclose(pictures, golden["image"], atol=1e-3)
    else:
        np.testing.assert_allclose(pictures[..., ::4, ::4], golden["image_strided"], atol=1e-3)
    statistics = [pictures.astype(np.float64).mean(), pictures.astype(np.float64).std()]
    np.testing.assert_allclose(statistics, golden["image_stats"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["P1", "P2", "P3", "P4", "P5"])
def test_generation_with_a_restricted_cache(tiny, name):
    golden = load("retention")
    config, tokenizer, params = tiny
    plan = RetentionPlan.from_keep(VAR_256, json.loads(str(golden["plans"]))[name])
    attended = np.array([row.kept_tokens for row in plan.rows]) + VAR_256.tokens
    np.testing.assert_array_equal(attended, golden[f"{name}_attended_tokens"])
    out = greedy(config, tokenizer, params, plan, golden[f"{name}_labels"])
    np.testing.assert_array_equal(out.tokens, golden[f"{name}_tokens"])
    logits = out.logits[:, golden["positions"]]
    np.testing.assert_allclose(logits, golden[f"{name}_logits"], atol=2e-5)
    picture = np.rint(255 * np.moveaxis(np.asarray(out.pictures[:1]), -1, 1))
    np.testing.assert_allclose(picture, golden[f"{name}_image"], atol=1)


def test_cached_generation_equals_the_teacher_forced_pass_on_any_grid():
    schedule = ScaleSchedule(((1, 1), (1, 2), (3, 2), (3, 4)))
    config = VARConfig(3, 64, 4, schedule, 5, 16, 8, attn_l2_norm=False)
    tokenizer = VQVAEConfig(schedule, 16, 8, 32, (1, 1), 1)
    params = {"transformer": recipe_params(config), "tokenizer": recipe_params(tokenizer)}
    labels = jnp.array([0, 4, 2])
    plan = Full().plan(cache_shape(schedule, 3))
    out = greedy(config, tokenizer, params, plan, labels)
    chex.assert_shape(out.tokens, (3, schedule.total))
    chex.assert_shape(out.latents, (4, 3, 3, 4, 8))
    chex.assert_shape(out.pictures, (3, 6, 8, 3))

    inputs = VQVAE(tokenizer).apply(
        {"params": params["tokenizer"]}, out.tokens, method="teacher_inputs"
    )
    apply = jax.jit(VAR(config).apply)
    conditional, unconditional = (
        apply({"params": params["transformer"]}, rows, inputs) for rows in (labels, jnp.full(3, 5))
    )
    progress = np.repeat(np.arange(4) / 3, schedule.tokens)[None, :, None]
    guided = (1 + 1.5 * progress) * conditional - 1.5 * progress * unconditional
    np.testing.assert_allclose(out.logits, guided, atol=2e-5)
