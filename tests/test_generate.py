"""Properties of the jitted sampler which no golden shows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_stats import cache_shape
from reference_weights import recipe_params

from amskv_jax.attention import attend, choose_implementation
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.policies import AMSKV, Full, Window
from amskv_jax.sampling import TokenSampling
from amskv_jax.schedule import VAR_256, ScaleSchedule

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4))
CONFIG = VARConfig(6, 64, 2, SCHEDULE, 5, 32, 8)
TOKENIZER = VQVAEConfig(SCHEDULE, 32, 8, 32, (1, 1), 1)
KEYS = picture_keys(jax.random.key(0), 4)
LABELS = jnp.array([0, 1, 2, 4])


@pytest.fixture(scope="module")
def params():
    return {"transformer": recipe_params(CONFIG), "tokenizer": recipe_params(TOKENIZER)}


def sampler(policy=None, **options):
    plan = (policy or Full()).plan(CONFIG.cache_shape)
    return Sampler(CONFIG, TOKENIZER, plan, **options)


def test_other_labels_keys_and_guidance_do_not_compile_again(params):
    sample = sampler(sampling=TokenSampling(8, 0.9))
    first = sample(params, LABELS, KEYS, 1.5)
    compiled = Sampler.__call__._cache_size()
    again = sample(params, LABELS[::-1], picture_keys(jax.random.key(7), 4), 3.0)
    equal = sampler(sampling=TokenSampling(8, 0.9))
    equal(params, LABELS, KEYS, 1.5)
    assert Sampler.__call__._cache_size() == compiled
    assert (np.asarray(first.tokens) != np.asarray(again.tokens)).any()


def test_a_picture_depends_on_its_key_and_label_alone(params):
    sample = sampler(sampling=TokenSampling(8, 0.9), decode=False)
    together = sample(params, LABELS, KEYS, 1.5).tokens
    alone = sample(params, LABELS[2:3], picture_keys(jax.random.key(0), 1, first=2), 1.5).tokens
    np.testing.assert_array_equal(together[2:3], alone)


def test_pictures_lie_between_zero_and_one(params):
    for options in (TokenSampling(), TokenSampling(8, 0.9, more_smooth=True)):
        out = sampler(sampling=options)(params, LABELS, KEYS, 1.5)
        pictures = np.asarray(out.pictures)
        assert pictures.shape == (4, 8, 8, 3)
        assert pictures.min() >= 0
        assert pictures.max() <= 1
        tokens = np.asarray(out.tokens)
        assert tokens.dtype == np.int32
        assert tokens.min() >= 0
        assert tokens.max() < 32


def test_interleaved_layers_share_one_scan_and_change_nothing(params, monkeypatch):
    # Six runs of layers are above the bound, so every layer picks its attention with a switch.
    policy = AMSKV(5, 9, 1, demanding_layers=(0, 2, 4))
    switched = sampler(policy, trace=True, decode=False)(params, LABELS, KEYS, 1.5)
    monkeypatch.setattr("amskv_jax.cache.stack.MAX_SCANS", 6)
    separate = sampler(policy, trace=True, decode=False, attention="xla")(params, LABELS, KEYS, 1.5)
    np.testing.assert_allclose(switched.logits, separate.logits, atol=1e-5)


def test_bfloat16_follows_float32(params):
    options = {"sampling": TokenSampling(top_k=1), "trace": True, "decode": False}
    exact = sampler(Window(7), **options)(params, LABELS, KEYS, 1.5)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    half["tokenizer"] = params["tokenizer"]
    rounded = sampler(Window(7), dtype="bfloat16", **options)(half, LABELS, KEYS, 1.5)
    assert rounded.logits.dtype == jnp.float32
    np.testing.assert_allclose(rounded.logits[:, 0], exact.logits[:, 0], atol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_every_platform(params, dtype):
    sample = sampler(AMSKV(5, 9, 1), sampling=TokenSampling(8, 0.9), dtype=dtype, attention="xla")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)

    def run(params, labels, key_data, guidance):
        return sample(params, labels, jax.random.wrap_key_data(key_data), guidance).pictures

    exported = jax.export.export(jax.jit(run), platforms=["tpu", "cuda", "cpu"])(
        shapes, LABELS, jax.random.key_data(KEYS), 1.5
    )
    assert exported.platforms == ("tpu", "cuda", "cpu")


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(AmskvError, match="plan has 3 layers, the model 6"):
        Sampler(CONFIG, TOKENIZER, Full().plan(cache_shape(SCHEDULE, 3)))
    with pytest.raises(AmskvError, match="the plan's scales are"):
        Sampler(CONFIG, TOKENIZER, Full().plan(cache_shape(VAR_256, 6)))
    with pytest.raises(AmskvError, match="the tokenizer's scales are"):
        Sampler(CONFIG, VQVAEConfig(VAR_256), Full().plan(CONFIG.cache_shape))


def test_attention_in_query_chunks_is_the_same(monkeypatch):
    query, key, value = (
        jax.random.normal(jax.random.key(i), (2, length, 3, 8))
        for i, length in enumerate((7, 9, 9))
    )
    whole = jax.jit(partial(attend, scale=0.3))(query, key, value)
    expected = jax.nn.dot_product_attention(query, key, value, scale=0.3)
    np.testing.assert_allclose(whole, expected, atol=1e-6)
    for bound in (2 * 3 * 9 * 4, 2 * 3 * 2 * 9 * 4, 1):
        monkeypatch.setattr("amskv_jax.attention.CPU_LOGITS_BYTES", bound)
        np.testing.assert_allclose(attend(query, key, value, 0.3), whole, atol=1e-6)


def test_the_attention_back_end_is_chosen_by_device():
    assert choose_implementation("auto", jnp.bfloat16, 64) == "xla"
    assert choose_implementation("cudnn", jnp.bfloat16, 64) == "cudnn"
    with pytest.raises(UsageError, match="unknown attention 'flash'"):
        choose_implementation("flash", jnp.bfloat16, 64)


def test_a_layer_may_keep_nothing(params):
    plan = RetentionPlan.from_keep(SCHEDULE, [[[], [], [], []]] * CONFIG.depth)
    out = Sampler(CONFIG, TOKENIZER, plan, decode=False)(params, LABELS, KEYS, 1.5)
    assert out.tokens.shape == (4, 30)
