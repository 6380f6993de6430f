"""Infinity as a model of the protocol: what it can draw, and how it says what it cannot."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import message

from amskv_jax import configs
from amskv_jax.checkpoints.initialize import init_checkpoint
from amskv_jax.models.guidance import UNGUIDED, Drawing, Guidance
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.infinity.prompts import Prompts, TextFeatures
from amskv_jax.models.infinity.schedules import schedule_of
from amskv_jax.models.infinity.transformer import Infinity
from amskv_jax.models.t5 import T5Config
from amskv_jax.plan.shape import CacheShape
from amskv_jax.schedule import VAR_256, ScaleSchedule

EIGHT_LEVELS = (1, 2, 4, 4)
SQUARE = schedule_of("1:1", "0.06M")
MODEL = InfinityModel(InfinityConfig(32, 2048, 16, bits=32), BSQConfig())
PATCHED = InfinityModel(
    InfinityConfig(40, 3584, 28, bits=56),
    BSQConfig(codebook_dim=14, channel_multipliers=EIGHT_LEVELS, patchify=True),
)


def test_parts_must_belong_together():
    assert (MODEL.parts["transformer"], MODEL.parts["tokenizer"]) == (
        MODEL.transformer,
        MODEL.tokenizer,
    )
    said = message(InfinityModel, MODEL.transformer, BSQConfig(codebook_dim=16))
    assert "the tokenizer has 16 bits per token, the transformer 32" in said
    assert hash(MODEL) != hash(PATCHED)


@pytest.mark.parametrize("model", [MODEL, PATCHED])
def test_one_model_draws_all_sizes(model):
    assert model.schedule == schedule_of()
    assert model.picture_size(model.schedule) == (1024, 1024)
    assert model.picture_size(schedule_of("16:9", "0.25M")) == (384, 672)
    for aspect, size in (("3:1", "1M"), ("3:4", "0.60M")):
        model.check_schedule(schedule_of(aspect, size))
    assert "the nearest is aspect 1.0 of size 0.06M" in message(model.check_schedule, VAR_256)
    few = InfinityModel(InfinityConfig(2, 128, 2, num_levels=3), BSQConfig())
    few.check_schedule(ScaleSchedule.square((1, 2, 4)))
    assert "7 scales, the transformer knows 3" in message(few.check_schedule, SQUARE)


def test_cache_shape():
    assert MODEL.cache_shape(SQUARE) == CacheShape(SQUARE, 32, 16, 128)


def test_bytes_of_the_texts_keys_and_values():
    long = MODEL.conditions(TextFeatures(np.ones((300, 2048)), np.array([300])))
    assert list(MODEL.held_bytes(2, long.batch(np.arange(1)), "bfloat16").values()) == [2**28]
    model = InfinityModel(InfinityConfig(3, 128, 2, bits=4, text_channels=128), BSQConfig(4))
    transformer = Infinity(model.transformer, SQUARE, jnp.bfloat16)
    condition, features = (
        model.conditions(None).batch(np.arange(5)),
        jnp.zeros((5, SQUARE.total - 1, 4)),
    )

    def prepare():
        params = transformer.init(jax.random.key(0), condition, features)
        return transformer.bind(params).prepare(condition, Guidance()).layers

    layers = jax.eval_shape(prepare)
    held = sum(x.size * x.dtype.itemsize for x in (layers.key, layers.value))
    assert model.held_bytes(10, condition, "bfloat16") == {
        "keys and values of texts of 64 tokens": held
    }


def test_where_guidance_acts():
    assert MODEL.guidance(Drawing(cfg=4.0)) == Guidance()
    assert MODEL.guidance(Drawing(cfg=4.0, guide=(0, -4, -1, -4))) == Guidance(True, (28, 31))
    assert MODEL.guidance(Drawing(cfg=(1.0, 3.0), guide=(-31,))) == Guidance(False, (1,))
    for none in (1, 1.0, (1.0,) * 7):
        assert MODEL.guidance(Drawing(cfg=none)) == UNGUIDED


@pytest.mark.parametrize("entry", [1, -32, -40])
def test_guidance_at_a_block_that_does_not_exist(entry):
    said = message(MODEL.guidance, Drawing(cfg=3.0, guide=(0, entry)))
    assert f"cannot act at {entry}: expected 0 (on the logits), or -n" in said
    assert "-1 to -31" in said


def test_guidance_must_act_somewhere():
    assert "guidance acts nowhere" in message(MODEL.guidance, Drawing(cfg=3.0, guide=()))


def test_strength_and_temperature_of_every_scale():
    controls = MODEL.controls(SQUARE, Drawing(cfg=3.0, tau=(1, 0.5, 0.5, 0.5, 0.5, 0.5, 2)))
    np.testing.assert_array_equal(controls.strength, [3.0] * 7)
    np.testing.assert_array_equal(controls.temperature, [1, 0.5, 0.5, 0.5, 0.5, 0.5, 2])
    assert controls.strength.dtype == controls.temperature.dtype == jnp.float32
    assert controls.forced is None
    said = message(MODEL.controls, SQUARE, Drawing(cfg=(1.0, 2.0)))
    assert "cfg has 2 numbers: expected one, or one for each of the 7 scales" in said
    assert "tau must be positive, not 0.0" in message(MODEL.controls, SQUARE, Drawing(tau=0.0))
    assert "cfg must be finite" in message(MODEL.controls, SQUARE, Drawing(cfg=float("nan")))


def test_conditions_are_text_features():
    features = TextFeatures(np.ones((3, 2048), np.float32), np.array([3]))
    assert isinstance(MODEL.conditions(features), Prompts)
    assert "not str: encode prompts first" in message(MODEL.conditions, "a red fox")
    example = MODEL.conditions(None).batch(np.arange(2))
    alike = MODEL.conditions(TextFeatures(np.ones((6, 2048)), np.array([2, 4])))
    assert jax.tree.map(jnp.shape, example) == jax.tree.map(jnp.shape, alike.batch(np.arange(2)))


def test_only_the_parts_that_are_used_need_be_there():
    transformer, tokenizer = MODEL.bind({}, SQUARE, "bfloat16")
    assert transformer.attention_scale == 1.0
    assert tokenizer.latent_shape == (16, 16, 32)
    assert tokenizer.embed(jnp.zeros((1, 1, 32), jnp.uint8)).shape == (1, 1, 32)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"width": 100, "num_heads": 3}, "not a multiple of 3 heads"),
        ({"width": 96, "num_heads": 16}, "heads of 6 channels cannot turn"),
        ({"width": 136, "num_heads": 2}, "not a multiple of 16 pooling heads"),
        ({"width": 128, "num_heads": 2, "block_chunks": 3}, "depth 4 is not a multiple of 3"),
    ],
)
def test_shapes_that_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        InfinityConfig(depth=4, **wrong)


def test_a_model_without_text_encoder_is_known_by_its_name(amskv, monkeypatch, tmp_path):
    """A checkpoint may lack the text encoder which the known model has."""
    config = InfinityConfig(2, 64, 2, bits=4, text_channels=32, text_maxlen=8)
    model = InfinityModel(config, BSQConfig(4, 32, (1, 1), 1))
    whole = replace(model, text_encoder=T5Config(1, 32, 2, 8, 32, vocab_size=16))
    monkeypatch.setattr(configs, "names", lambda: ["small"])
    monkeypatch.setattr(configs, "get", lambda name: configs.ModelConfig(name, "small", whole))
    init_checkpoint(model, tmp_path / "without")
    assert "small" in amskv("info", "--checkpoint", tmp_path / "without").out.splitlines()[1]
    assert model.parts.keys() < whole.parts.keys()
