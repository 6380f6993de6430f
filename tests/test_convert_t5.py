"""Conversion of T5 encoders: what follows from shapes, what goes where, both ways."""

import json

import numpy as np
import pytest
from checks import assert_same_state, message, to_torch
from safetensors.numpy import save_file
from t5_weights import NARROW, TINY, manifest, t5_state

from amskv_jax.convert import t5
from amskv_jax.convert.read import read_state_dict
from amskv_jax.models.t5 import FLAN_T5_XL, T5Config

ALIAS = "encoder.embed_tokens.weight"
SMALL = T5Config(depth=8, width=512, num_heads=6, head_dim=64, hidden=1024)
"""google/flan-t5-small."""

NARROW_SETTINGS = {
    "d_ff": 96,
    "d_kv": 8,
    "d_model": 48,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "num_heads": 3,
    "num_layers": 2,
    "relative_attention_max_distance": 40,
    "relative_attention_num_buckets": 16,
    "vocab_size": 70,
}
"""config.json of ``NARROW``; the embedding has more rows than tokens, as flan-t5's have."""


def without_data(shapes):
    """Arrays of the given shapes which take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


@pytest.fixture
def state():
    """What a file of an encoder holds."""
    state = t5_state(NARROW)
    return state | {ALIAS: state["shared.weight"]}


@pytest.mark.parametrize("config", [TINY, NARROW, SMALL, FLAN_T5_XL], ids=str)
def test_every_entry_has_one_rule_and_a_place_of_its_own(config):
    places = set()
    for key in t5.shapes(config):
        found = [rule.find(key) for rule in t5.TABLE.rules]
        found = [place for place in found if place is not None]
        assert len(found) == 1, key
        places.add((found[0].path, found[0].index))
    assert len(places) == len(t5.shapes(config))


@pytest.mark.parametrize(
    ("name", "config"), [("t5_tiny", TINY), ("flan_t5_xl_encoder", FLAN_T5_XL)]
)
def test_published_shapes(name, config):
    expected = {key: tuple(entry["shape"]) for key, entry in manifest(name).items()}
    state = without_data(expected)
    assert t5.infer_config(state) == config
    assert t5.shapes(config) | {ALIAS: expected["shared.weight"]} == expected
    weights = t5.T5.weights(state)
    t5.T5.check(weights, config, "the manifest")
    # There and back by shapes alone.
    shapes = t5.TABLE.param_shapes({key: value.shape for key, value in weights.items()})
    assert len(shapes) == 12
    nested = {}
    for path, shape in shapes.items():
        *folders, leaf = path.split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.broadcast_to(np.float32(0), shape)
    back = t5.T5.to_state_dict(nested, config)
    assert {key: value.shape for key, value in back.items()} == expected


@pytest.mark.parametrize("config", [TINY, NARROW], ids=["tiny", "narrow"])
def test_there_and_back_is_exact(config):
    state = t5_state(config)
    state[ALIAS] = state["shared.weight"]
    back = t5.T5.to_state_dict(t5.T5.to_params(state, config), config)
    assert_same_state(back, state)


def test_layouts(state):
    params = t5.T5.to_params(state, NARROW)
    for layer in range(2):
        block = f"encoder.block.{layer}.layer"
        for theirs, ours in {"q": "query", "k": "key", "v": "value", "o": "out"}.items():
            weight = state[f"{block}.0.SelfAttention.{theirs}.weight"]
            np.testing.assert_array_equal(
                params["blocks"]["attention"][ours]["kernel"][layer], weight.T
            )
        for theirs, ours in {"wi_0": "gate", "wi_1": "up", "wo": "down"}.items():
            weight = state[f"{block}.1.DenseReluDense.{theirs}.weight"]
            np.testing.assert_array_equal(params["blocks"]["mlp"][ours]["kernel"][layer], weight.T)
        gain = state[f"{block}.1.layer_norm.weight"]
        np.testing.assert_array_equal(params["blocks"]["mlp_norm"]["scale"][layer], gain)
    np.testing.assert_array_equal(params["position_bias"], state[t5.POSITION_BIAS])


def test_one_name_of_the_embedding_suffices(state):
    expected = t5.T5.to_params(state, NARROW)
    for name in (ALIAS, "shared.weight"):
        one = {key: value for key, value in state.items() if key != name}
        assert t5.infer_config(one, NARROW_SETTINGS) == NARROW
        found = t5.T5.to_params(one, NARROW)
        np.testing.assert_array_equal(
            found["embedding"]["embedding"], expected["embedding"]["embedding"]
        )


def whole_model(state):
    """With a decoder and a head, which the published files have."""
    ones = np.ones((3, 3), np.float32)
    return state | {
        "decoder.embed_tokens.weight": state["shared.weight"],
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ones,
        "decoder.block.5.layer.1.EncDecAttention.q.weight": ones,
        "decoder.final_layer_norm.weight": ones[0],
        "lm_head.weight": ones,
    }


def test_the_decoder_is_ignored(state):
    whole = whole_model(state)
    assert t5.infer_config(whole, NARROW_SETTINGS) == NARROW
    back = t5.T5.to_state_dict(t5.T5.to_params(whole, NARROW), NARROW)
    assert_same_state(back, state)
    # But not what stands in the encoder, or elsewhere.
    for name in ("encoder.extra.weight", "decoders.weight"):
        extra = whole | {name: np.ones(3, np.float32)}
        assert f"unexpected: {name}" in message(t5.T5.to_params, extra, NARROW)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_folders_of_the_hub(kind, state, tmp_path, request):
    """Shards with an index, config.json beside them."""
    state = whole_model(state)
    keys = sorted(state)
    shards = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i + 1}-of-00002.{kind}" for i in range(2)]
    for name, members in zip(names, shards, strict=True):
        part = {key: state[key] for key in members}
        if kind == "safetensors":
            save_file(part, tmp_path / name)
        else:
            torch = request.getfixturevalue("torch")
            torch.save(to_torch(torch, part), tmp_path / name)
    index = {key: name for name, part in zip(names, shards, strict=True) for key in part}
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(NARROW_SETTINGS))

    source = read_state_dict(tmp_path, t5.T5.keys)
    config = t5.infer_config(source.state, source.settings, str(tmp_path))
    assert config == NARROW
    back = t5.T5.to_state_dict(t5.T5.to_params(source.state, config), config)
    assert_same_state({key: back[key] for key in t5_state(NARROW)}, t5_state(NARROW))
    del source
    (tmp_path / names[1]).unlink()
    assert f"lacks 1 of the 2 files with the weights: {names[1]}." in message(
        read_state_dict, tmp_path, t5.T5.keys
    )


def test_settings_tell_what_shapes_do_not(state):
    assert t5.infer_config(state).max_distance == 128
    settings = NARROW_SETTINGS | {"layer_norm_epsilon": 1e-5}
    config = t5.infer_config(state, settings)
    assert (config.max_distance, config.norm_epsilon) == (40, 1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"d_kv": 64}, "d_kv is 64, the weights have 8"),
        ({"num_layers": 24, "d_ff": 7}, "num_layers is 24, the weights have 2; d_ff is 7"),
        ({"feed_forward_proj": "relu"}, "feed-forward part relu, expected gated-gelu"),
        ({"relative_attention_max_distance": 10**400}, "buckets up to distance 1000"),
        ({"relative_attention_max_distance": None}, "config.json that cannot be used"),
        ({"layer_norm_epsilon": "x"}, "config.json that cannot be used"),
    ],
)
def test_settings_that_do_not_fit(state, settings, expected):
    text = message(t5.infer_config, state, NARROW_SETTINGS | settings, "the folder")
    assert text.startswith(("the folder", "config.json in the folder"))
    assert expected in text


def test_weights_that_do_not_fit(state):
    first = {key.replace("wi_0", "wi"): v for key, v in state.items() if "wi_1" not in key}
    assert "feed-forward part relu" in message(t5.infer_config, first)
    assert "does not hold a T5 text encoder" in message(t5.infer_config, {"a": np.zeros(2)})
    flat = state | {"shared.weight": np.zeros(48, np.float32)}
    assert "shared.weight (48,) is no matrix" in message(t5.infer_config, flat)
    bias = np.zeros((16, 5), np.float32)
    text = message(t5.infer_config, state | {t5.POSITION_BIAS: bias})
    assert "24 channels, which is not a multiple of 5 heads" in text

    short = {key: value for key, value in state.items() if "block.0.layer.1" not in key}
    text = message(t5.T5.to_params, short, t5.infer_config(short, {"d_ff": 5120}))
    assert "missing: encoder.block.0.layer.1.DenseReluDense.wo.weight" in text
    no_bias = {key: value for key, value in state.items() if key != t5.POSITION_BIAS}
    assert f"{t5.POSITION_BIAS} is missing" in message(t5.infer_config, no_bias)
