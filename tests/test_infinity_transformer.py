"""Infinity's transformer against the reference's numbers, part by part.

Whole pictures are in `test_infinity_sampling.py`.
"""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from infinity_golden import TINY, config_of, load, picture_major, recipe_params, texts_in

from amskv_jax.attention import attend
from amskv_jax.models.guidance import UNGUIDED, Guidance
from amskv_jax.models.infinity.prompts import Prompts
from amskv_jax.models.infinity.transformer import Infinity


@cache
def model(description):
    """The configuration and the weights of one of the four models."""
    description = load(description)[0]["model"]
    config = config_of(description)
    return config, recipe_params(config, tuple(description.get("scale_mul", (4.0, 0.1))))


def condition_of(config, arrays):
    prompts = Prompts(config, texts_in(arrays))
    return prompts.batch(np.arange(len(prompts)))


@pytest.fixture(scope="module")
def steps():
    @cache
    def compiled(config, guidance):
        module = Infinity(config, config.schedule)

        @jax.jit
        def run(params, condition, features):
            bound = module.bind({"params": params})
            prepared = bound.prepare(condition, guidance)
            shape = (config.depth, len(prepared.start), 0, config.num_heads, config.head_dim)
            x, kept, outputs = prepared.start, (jnp.zeros(shape),) * 2, []
            for step in range(2):

                def body(x, layer_and_kept, step=step):
                    layer, kept = layer_and_kept

                    def attention(qkv):
                        seen = [
                            jnp.concatenate(pair, axis=1)
                            for pair in zip(kept, (qkv.key, qkv.value), strict=True)
                        ]
                        return attend(qkv.query, *seen, bound.attention_scale), seen

                    x, kept = bound.block(layer, prepared.shared, x, step, attention)
                    return x, (x, tuple(kept))

                _, (every, kept) = jax.lax.scan(body, x, (prepared.layers, kept))
                outputs.append(every)
                x = guidance.repeat(bound.next_input(features, 1))
            return prepared, outputs

        return run

    return compiled


@pytest.mark.parametrize("name", [f"{name}.gen_logits" for name in TINY])
def test_blocks(steps, name):
    check_blocks(steps, name, Guidance())


@pytest.mark.parametrize("run", ["gen_negative", "gen_nocfg"])
def test_blocks_with_negative_prompts_and_without_guidance(steps, run):
    check_blocks(steps, f"infinity_tiny.{run}", UNGUIDED if run == "gen_nocfg" else Guidance())


def check_blocks(steps, name, guidance):
    golden = load(name)[1]
    config, params = model(f"{name.partition('.')[0]}.gen_logits")
    tokens = config.schedule.tokens[1]
    prepared, outputs = steps(config, guidance)(
        params, condition_of(config, golden), golden["word_embed_in"][:, :tokens]
    )
    order = picture_major if guidance.paired else np.asarray
    added = params["position_start"] + params["scale_embedding"]["embedding"][0]
    pooled = np.asarray(prepared.start)[:, 0] - added
    np.testing.assert_allclose(pooled, order(golden["cond_BD"]), atol=1e-5)
    np.testing.assert_allclose(prepared.shared.modulation, order(golden["gss"])[:, 0], atol=1e-5)
    for scale, every in enumerate(outputs):
        expected = np.stack([order(block) for block in golden[f"block_out_s{scale}"]])
        np.testing.assert_allclose(every, expected, atol=5e-5)


def test_projected_text():
    golden = load("infinity_tiny.gen_negative")[1]
    config, params = model("infinity_tiny.gen_logits")
    condition = condition_of(config, golden)

    @jax.jit
    def project(params):
        bound = Infinity(config, config.schedule).bind({"params": params})
        features, lengths = condition.rows(bound.unconditional_text, Guidance())
        return bound.text_projection(bound.text_norm(features)), lengths

    rows, lengths = project(params)
    texts = [np.asarray(row)[:length] for row, length in zip(rows, lengths, strict=True)]
    found = np.concatenate(texts[0::2] + texts[1::2])
    np.testing.assert_allclose(found, golden["ca_kv"], atol=5e-5)


@pytest.mark.parametrize(
    "name",
    [f"{name}.gen_logits" for name in TINY[:3]] + ["infinity_tiny_patchify.gen_leak"],
)
def test_teacher_forced_logits(name):
    golden = load(name)[1]
    config, params = model(f"{name.partition('.')[0]}.gen_logits")
    apply = jax.jit(Infinity(config, config.schedule).apply)
    condition = condition_of(config, golden)
    logits = apply({"params": params}, condition, golden["tf_x_BLC_wo_prefix"])
    chex.assert_shape(logits, (len(condition.lengths), config.schedule.total, config.bits, 2))
    found = np.asarray(logits).reshape(golden["tf_logits"].shape)
    np.testing.assert_allclose(found, golden["tf_logits"], atol=1e-4)


def test_gradients_reach_every_weight_but_the_unconditional_text():
    config, params = model("infinity_tiny.gen_logits")
    golden = load("infinity_tiny.gen_logits")[1]
    condition = condition_of(config, golden)
    module = Infinity(config, config.schedule)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = module.apply({"params": params}, condition, golden["tf_x_BLC_wo_prefix"])
        return jnp.square(jax.nn.log_softmax(logits)).sum()

    gradients = gradient(params)
    unused = gradients.pop("unconditional_text")
    assert not unused.any()
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert leaf.any()
