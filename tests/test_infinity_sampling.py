"""Whole pictures of Infinity, scale by scale, against the reference's labels and logits."""

import json
from functools import cache

import chex
import jax
import numpy as np
import pytest
from infinity_golden import FOLDER, config_of, load, recipe_params, schedule_in, texts_in

from amskv_jax.generate import Sampler, picture_keys, program
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.policies import Full
from amskv_jax.sampling import TokenSampling, filter_logits
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


def keys_of(batch):
    return picture_keys(jax.random.key(0), batch)


def sampler_of(model, plan, drawing, **options):
    sampling = TokenSampling(drawing.top_k, drawing.top_p)
    return Sampler(model, plan, model.guidance(drawing), sampling, trace=True, **options)


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
        top_p=0.0,
    )
    keep = description.get("plan")
    plan = (
        RetentionPlan.from_keep(schedule, keep)
        if keep
        else Full().plan(model.cache_shape(schedule))
    )
    controls = model.controls(schedule, drawing)
    if "forced_bits_vae" in golden:
        forced = model.forced(golden["forced_bits_vae"], schedule)
        controls = controls.replace(forced=forced)
    prompts = model.conditions(texts_in(golden))
    condition, keys = prompts.batch(np.arange(len(prompts))), keys_of(len(prompts))
    samples = sampler_of(model, plan, drawing)(params, condition, keys, controls)

    chex.assert_shape(samples.tokens, (len(prompts), schedule.total, model.transformer.bits))
    np.testing.assert_array_equal(samples.tokens, golden["bits"])
    logits, latent = np.asarray(samples.logits), np.asarray(samples.latent)
    stride = run["logits_stride"]
    shown = np.concatenate(
        [np.arange(t)[::stride] + schedule.offsets[i] for i, t in enumerate(schedule.tokens)]
    )
    found = logits.reshape(*logits.shape[:2], -1)[:, shown]
    np.testing.assert_allclose(found, golden["logits"], atol=1e-4)
    np.testing.assert_allclose(np.moveaxis(latent, -1, 1), golden["summed_codes"], atol=1e-5)


@pytest.fixture(scope="module")
def beginning():
    """A model, and what it needs to draw the first three scales."""
    description, golden = load("infinity_tiny.gen_vary")
    model, params = model_in(description)
    schedule = ScaleSchedule.square((1, 2, 4))
    return model, Full().plan(model.cache_shape(schedule)), params, texts_in(golden)


def test_other_prompts_strengths_and_temperatures_do_not_compile_again(beginning):
    model, plan, params, texts = beginning
    sampler = sampler_of(model, plan, Drawing(cfg=3.0, top_k=1))
    results = []
    before = program("cpu")._cache_size()
    for cfg, tau, order in ((3.0, 0.5, [0, 1]), ((1.0, 2.0, 4.0), (1.0, 2.0, 0.3), [1, 1])):
        controls = model.controls(plan.schedule, Drawing(cfg=cfg, tau=tau))
        condition = model.conditions(texts).batch(np.array(order))
        results.append(np.asarray(sampler(params, condition, keys_of(2), controls).logits))
    assert program("cpu")._cache_size() == before + 1
    first, second = results
    np.testing.assert_array_equal(second[0], second[1])  # the same prompt twice
    assert np.abs(first - second).max() > 0.1


def test_guidance_on_several_layers_and_logits_adds_up(beginning):
    model, plan, params, texts = beginning
    condition = model.conditions(texts).batch(np.arange(2))

    def logits(guide, cfg):
        drawing = Drawing(cfg=cfg, guide=guide, top_k=1)
        controls = model.controls(plan.schedule, drawing)
        sampler = sampler_of(model, plan, drawing)
        return np.asarray(sampler(params, condition, keys_of(2), controls).logits)

    everywhere = logits((0, -1, -3), 3.0)
    for fewer in ((0, -1), (-1, -3), (0, -3)):
        assert np.abs(logits(fewer, 3.0) - everywhere).max() > 0.1
    # Where it is 1 nothing is mixed, wherever it acts.
    unguided = logits((0,), (1.0, 1.0, 1.0))
    np.testing.assert_allclose(
        logits((0, -1, -3), (1.0, 1.0, 3.0))[:, :5], unguided[:, :5], atol=1e-5
    )


def test_bfloat16_draws_nearly_the_same_logits_at_the_first_scale(beginning):
    model, plan, params, texts = beginning
    drawing = Drawing(cfg=3.0, top_k=1)
    controls = model.controls(plan.schedule, drawing)
    condition = model.conditions(texts).batch(np.arange(2))
    exact, rounded = (
        np.asarray(
            sampler_of(model, plan, drawing, dtype=dtype)(
                params, condition, keys_of(2), controls
            ).logits
        )
        for dtype in ("float32", "bfloat16")
    )
    assert np.isfinite(rounded).all()
    np.testing.assert_allclose(rounded[:, 0], exact[:, 0], atol=0.2)
    assert (rounded[:, 0] != exact[:, 0]).any()


def test_filtered_probabilities_of_bits():
    with np.load(FOLDER / "sampler.npz") as data:
        golden = dict(data)
    combinations = json.loads((FOLDER / "sampler.json").read_text())["combos_top_k_top_p"]
    for number, (top_k, top_p) in enumerate(combinations):
        found = jax.nn.softmax(filter_logits(golden["logits"][0], top_k, top_p))
        first = 2 if top_p == 0.5 else 0  # where values tie, the reference's sort decides
        np.testing.assert_allclose(found[first:], golden[f"probs_{number}"][first:], atol=1e-6)
