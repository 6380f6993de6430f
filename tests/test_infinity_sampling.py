"""Whole pictures of Infinity, scale by scale, against the reference's labels and logits."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from infinity_golden import FOLDER, config_of, load, recipe_params, schedule_in, texts_in

from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.stack import apply_blocks
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.infinity.bsq import from_grids
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.policies import Full
from amskv_jax.schedule import ScaleSchedule

LEVELS = {16: (1, 2, 4, 4, 4), 8: (1, 2, 4, 4)}
GENERATIONS = sorted(
    path.stem for path in FOLDER.glob("*.npz") if ".gen_" in path.stem or ".retain_" in path.stem
)


@cache
def params_of(config, scale_mul):
    return {"transformer": recipe_params(config, scale_mul)}


def model_in(description):
    """The model and its weights, of which the decoder's are not needed here."""
    model = description["model"]
    tokenizer = BSQConfig(
        codebook_dim=model["codebook_dim"],
        channels=model["vae"]["base_ch"],
        channel_multipliers=LEVELS[model["vae"]["patch_size"]],
        num_res_blocks=model["vae"]["num_res_blocks"],
        patchify=bool(model["apply_spatial_patchify"]),
    )
    config = config_of(model)
    params = params_of(config, tuple(model.get("scale_mul", (4.0, 0.1))))
    return InfinityModel(config, tokenizer), params


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="dtype")
def draw(model, plan, guidance, params, condition, controls, dtype="float32"):
    """Return logits, the latent and the inputs of all later scales, drawing greedily."""
    schedule = plan.schedule
    transformer, tokenizer = model.bind(params, schedule, dtype)
    prepared = transformer.prepare(condition, guidance)
    layout, shape = CacheLayout.of(plan), model.cache_shape(schedule)
    x, batch = prepared.start, len(condition.lengths)
    caches = layout.init(len(x), shape.num_heads, shape.head_dim, dtype)
    flags = jnp.asarray(guidance.layer_flags(shape.num_layers))
    latent = jnp.zeros((batch, *tokenizer.latent_shape))
    all_logits, inputs = [], []
    for step in range(schedule.num_scales):

        def block(layer_and_flag, x, attention, step=step):
            layer, flag = layer_and_flag
            x, carry = transformer.block(layer, prepared.shared, x, step, attention)
            if guidance.on_layers:
                x = guidance.mix_rows(x, controls.strength[step], flag)
            return x, carry

        x, caches, _ = apply_blocks(
            block,
            (prepared.layers, flags),
            x,
            caches,
            layout,
            step,
            scale=transformer.attention_scale,
            implementation="auto",
        )
        logits = transformer.logits(x, prepared.shared) / controls.temperature[step]
        all_logits.append(guidance.mix_logits(logits, controls.strength[step]))
        codes = jnp.argmax(all_logits[-1], axis=-1)
        if controls.forced is not None and schedule.offsets[step + 1] <= controls.forced.shape[1]:
            codes = controls.forced[:, schedule.slice(step)]
        latent = tokenizer.accumulate(latent, tokenizer.embed(codes), step)
        if step + 1 < schedule.num_scales:
            inputs.append(tokenizer.next_input(latent, step))
            x = guidance.repeat(transformer.next_input(inputs[-1], step + 1))
    return jnp.concatenate(all_logits, axis=1), latent, jnp.concatenate(inputs, axis=1)


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation(name):
    description, golden = load(name)
    schedule, run = schedule_in(description), description["run"]
    model, params = model_in(description)
    drawing = Drawing(
        cfg=tuple(run["cfg_list"]),
        tau=tuple(run["tau_list"]),
        guide=tuple(run["cfg_insertion_layer"]),
        top_k=1,
    )
    keep = description.get("plan")
    depth = model.transformer.depth
    plan = RetentionPlan.from_keep(schedule, keep) if keep else Full().plan(schedule, depth)
    controls = model.controls(schedule, drawing)
    if "forced_bits_vae" in golden:
        forced = from_grids(golden["forced_bits_vae"], model.tokenizer, schedule)
        controls = controls.replace(forced=forced)
    prompts = model.conditions(texts_in(golden))
    condition = prompts.batch(np.arange(len(prompts)))
    results = draw(model, plan, model.guidance(drawing), params, condition, controls)
    logits, latent, inputs = map(np.asarray, results)

    np.testing.assert_array_equal(logits.argmax(-1), golden["bits"])
    stride = run["logits_stride"]
    shown = np.concatenate(
        [np.arange(t)[::stride] + schedule.offsets[i] for i, t in enumerate(schedule.tokens)]
    )
    found = logits.reshape(*logits.shape[:2], -1)[:, shown]
    np.testing.assert_allclose(found, golden["logits"], atol=1e-4)
    np.testing.assert_allclose(np.moveaxis(latent, -1, 1), golden["summed_codes"], atol=1e-5)
    if "word_embed_in" in golden:
        np.testing.assert_allclose(inputs, golden["word_embed_in"], atol=1e-5)


@pytest.fixture(scope="module")
def beginning():
    """A model, and what it needs to draw the first three scales."""
    description, golden = load("infinity_tiny.gen_vary")
    model, params = model_in(description)
    schedule = ScaleSchedule.square((1, 2, 4))
    return model, Full().plan(schedule, model.transformer.depth), params, texts_in(golden)


def test_other_prompts_strengths_and_temperatures_do_not_compile_again(beginning):
    model, plan, params, texts = beginning
    guidance = model.guidance(Drawing(cfg=3.0))
    results = []
    before = draw._cache_size()
    for cfg, tau, order in ((3.0, 0.5, [0, 1]), ((1.0, 2.0, 4.0), (1.0, 2.0, 0.3), [1, 1])):
        controls = model.controls(plan.schedule, Drawing(cfg=cfg, tau=tau))
        condition = model.conditions(texts).batch(np.array(order))
        results.append(draw(model, plan, guidance, params, condition, controls)[0])
    assert draw._cache_size() == before + 1
    first, second = map(np.asarray, results)
    np.testing.assert_array_equal(second[0], second[1])  # the same prompt twice
    assert np.abs(first - second).max() > 0.1


def test_bfloat16_draws_nearly_the_same_logits_at_the_first_scale(beginning):
    model, plan, params, texts = beginning
    drawing = Drawing(cfg=3.0)
    inputs = model.conditions(texts).batch(np.arange(2)), model.controls(plan.schedule, drawing)
    exact, rounded = (
        draw(model, plan, model.guidance(drawing), params, *inputs, dtype=dtype)[0]
        for dtype in ("float32", "bfloat16")
    )
    assert np.isfinite(rounded).all()
    np.testing.assert_allclose(rounded[:, 0], exact[:, 0], atol=0.2)
    assert (rounded[:, 0] != exact[:, 0]).any()
