"""Properties of the jitted sampler which no golden shows."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_stats import cache_shape
from reference_weights import recipe_params

from amskv_jax.attention import attend, choose_implementation
from amskv_jax.decode import decode
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.generate import Sampler, picture_keys, program
from amskv_jax.models.guidance import Drawing, Guidance
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.policies import AMSKV, Full, Window
from amskv_jax.sampling import TokenSampling
from amskv_jax.schedule import VAR_256, ScaleSchedule
from amskv_jax.testing import sample

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4))
CONFIG = VARConfig(6, 64, 2, SCHEDULE, 5, 32, 8)
TOKENIZER = VQVAEConfig(SCHEDULE, 32, 8, 32, (1, 1), 1)
KEYS = picture_keys(jax.random.key(0), 4)
LABELS = jnp.array([0, 1, 2, 4])
MODEL = VARModel(CONFIG, TOKENIZER)
DRAWING = Drawing(cfg=1.5, top_k=8, top_p=0.9)


@pytest.fixture(scope="module")
def params():
    return {"transformer": recipe_params(CONFIG), "tokenizer": recipe_params(TOKENIZER)}


def draw(params, policy=None, labels=LABELS, keys=KEYS, drawing=DRAWING, **options):
    plan = (policy or Full()).plan(CONFIG.cache_shape)
    return sample(MODEL, plan, params, labels, keys, drawing, **options)


def test_other_labels_keys_and_guidance_do_not_compile_again(params):
    first = draw(params)
    compiled = program("cpu")._cache_size()
    keys = picture_keys(jax.random.key(7), 4)
    again = draw(
        params, None, LABELS[::-1], keys, replace(DRAWING, cfg=(3.0, 1.0, 0.0, 2.0), tau=0.9)
    )
    draw(params)
    assert program("cpu")._cache_size() == compiled
    assert (np.asarray(first.tokens) != np.asarray(again.tokens)).any()


def test_a_picture_depends_on_its_key_and_label_alone(params):
    together = draw(params).tokens
    alone = draw(params, None, LABELS[2:3], picture_keys(jax.random.key(0), 1, first=2)).tokens
    np.testing.assert_array_equal(together[2:3], alone)


def test_pictures_lie_between_zero_and_one(params):
    for drawing in (Drawing(top_k=0, top_p=0.0), replace(DRAWING, more_smooth=True)):
        out = draw(params, drawing=drawing)
        pictures = np.asarray(decode(MODEL, SCHEDULE, "float32", params, out.latent))
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
    switched = draw(params, policy, trace=True)
    monkeypatch.setattr("amskv_jax.plan.retention.MAX_SCANS", 6)
    separate = draw(params, policy, trace=True, attention="xla")
    np.testing.assert_allclose(switched.logits, separate.logits, atol=1e-5)


def test_bfloat16_follows_float32(params):
    options = {"drawing": Drawing(top_k=1), "trace": True}
    exact = draw(params, Window(7), **options)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    half["tokenizer"] = params["tokenizer"]
    rounded = draw(half, Window(7), dtype="bfloat16", **options)
    assert rounded.logits.dtype == jnp.float32
    np.testing.assert_allclose(rounded.logits[:, 0], exact.logits[:, 0], atol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_every_platform(params, dtype):
    plan = AMSKV(5, 9, 1).plan(CONFIG.cache_shape)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)

    def run(params, labels, key_data):
        keys = jax.random.wrap_key_data(key_data)
        out = sample(MODEL, plan, params, labels, keys, DRAWING, dtype=dtype, attention="xla")
        return decode(MODEL, SCHEDULE, dtype, params, out.latent)

    exported = jax.export.export(jax.jit(run), platforms=["tpu", "cuda", "cpu"])(
        shapes, LABELS, jax.random.key_data(KEYS)
    )
    assert exported.platforms == ("tpu", "cuda", "cpu")


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(AmskvError, match="plan has 3 layers, the model 6"):
        Sampler(MODEL, Full().plan(cache_shape(SCHEDULE, 3)))
    with pytest.raises(AmskvError, match="the plan's scales are"):
        Sampler(MODEL, Full().plan(cache_shape(VAR_256, 6)))
    with pytest.raises(AmskvError, match="do not belong together: the transformer has 32 codes"):
        VARModel(CONFIG, VQVAEConfig(VAR_256))


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
    out = sample(MODEL, plan, params, LABELS, KEYS)
    assert out.tokens.shape == (4, 30)


def test_without_guidance_a_picture_has_one_row_and_the_same_tokens(params):
    drawing = Drawing(cfg=0.0, top_k=1, top_p=0.0)
    assert MODEL.guidance(drawing).rows_per_picture == 1
    alone = draw(params, AMSKV(5, 9, 1), drawing=drawing, trace=True)
    plan = AMSKV(5, 9, 1).plan(CONFIG.cache_shape)
    paired = Sampler(MODEL, plan, Guidance(), TokenSampling(1), trace=True)
    guided = paired(params, LABELS, KEYS, MODEL.controls(SCHEDULE, drawing))
    np.testing.assert_array_equal(alone.tokens, guided.tokens)
    np.testing.assert_allclose(alone.logits, guided.logits, atol=2e-5)


def test_guidance_at_layers_leaves_both_rows_alone_at_strength_one(params):
    layers = {"guide": (-1, -3), "top_k": 1, "top_p": 0.0}
    assert MODEL.guidance(Drawing(**layers)) == Guidance(False, (3, 5))
    plain = draw(params, drawing=Drawing(cfg=0.0, top_k=1, top_p=0.0), trace=True)
    nothing = draw(params, drawing=Drawing(cfg=(0.0, 0.0, 0.0, 1e-9), **layers), trace=True)
    np.testing.assert_allclose(plain.logits[:, :14], nothing.logits[:, :14], atol=2e-5)
    guided = draw(params, drawing=Drawing(cfg=4.0, **layers), trace=True)
    np.testing.assert_allclose(plain.logits[:, :1], guided.logits[:, :1], atol=2e-5)
    assert np.abs(plain.logits - guided.logits).max() > 0.1


def test_forced_codes_take_the_place_of_drawn_ones(params):
    drawing = Drawing(cfg=1.5, top_k=1, top_p=0.0)
    free = draw(params, drawing=drawing)
    codes = jnp.flip(free.tokens[:, :5], axis=0)
    controls = MODEL.controls(SCHEDULE, drawing).replace(forced=MODEL.forced(codes, SCHEDULE))
    plan = Full().plan(CONFIG.cache_shape)
    sampler = Sampler(MODEL, plan, sampling=TokenSampling(1), trace=True)
    forced = sampler(params, LABELS, KEYS, controls)
    expected = jax.jit(partial(VQVAE(TOKENIZER).apply, method="tokens_to_latent", every_scale=True))
    tokens = jnp.concatenate([codes, forced.tokens[:, 5:]], axis=1)
    latents = expected({"params": params["tokenizer"]}, tokens)
    np.testing.assert_allclose(forced.latents, latents, atol=1e-5)
    for wrong in (codes[:, :4], codes + 32, codes[0], codes + 0.5):
        with pytest.raises(AmskvError, match="forced codes"):
            MODEL.forced(wrong, SCHEDULE)


@pytest.mark.parametrize(
    ("drawing", "expected"),
    [
        ({"cfg": (1.0, 2.0)}, "cfg has 2 numbers: expected one, or one for each of the 4"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"cfg": float("nan")}, "cfg must be finite"),
        ({"guide": (-6,)}, "guidance cannot act at -6"),
        ({"guide": (1,)}, "guidance cannot act at 1"),
        ({"guide": ()}, "acts nowhere"),
    ],
)
def test_ways_of_drawing_that_do_not_fit_are_refused(drawing, expected):
    with pytest.raises(UsageError, match=expected):
        MODEL.guidance(Drawing(**drawing))
        MODEL.controls(SCHEDULE, Drawing(**drawing))
