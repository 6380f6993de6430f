"""Infinity's state dicts: names, shapes, layouts, and the way back."""

import gzip
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same_state, message
from flax.traverse_util import flatten_dict
from infinity_golden import FOLDER, recipe_state

from amskv_jax.convert.api import refuse_others
from amskv_jax.convert.architecture import is_buffer
from amskv_jax.convert.infinity import INFINITY, block_names, infer_config, shapes
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.schedules import schedule_of
from amskv_jax.models.infinity.text import TextCondition
from amskv_jax.models.infinity.transformer import Infinity

PUBLISHED = {
    "2b": InfinityConfig(32, 2048, 16, bits=32, block_chunks=8),
    "8b": InfinityConfig(40, 3584, 28, bits=56, block_chunks=8),
    "layer12": InfinityConfig(12, 768, 8, bits=16, block_chunks=4),
    "layer24": InfinityConfig(24, 1536, 16, bits=16, block_chunks=4),
}
SMALL = InfinityConfig(
    depth=4, width=128, num_heads=2, bits=6, text_channels=128, text_maxlen=8, block_chunks=2
)


@pytest.fixture(scope="module")
def state():
    return recipe_state(SMALL)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_recognised_and_covered(name):
    manifest = json.loads(
        gzip.decompress((FOLDER / f"manifest_infinity_{name}.json.gz").read_bytes())
    )
    zero = np.float32(0)
    state = {key: np.broadcast_to(zero, entry["shape"]) for key, entry in manifest.items()}
    config = infer_config(state)
    assert config == PUBLISHED[name]
    weights = INFINITY.weights(state)
    INFINITY.check(weights, config, name)
    buffers = {key: value.shape for key, value in INFINITY.buffers(config).items()}
    assert buffers == {key: value.shape for key, value in state.items() if is_buffer(key)}
    whole = {key: value.shape for key, value in weights.items()} | buffers
    assert whole == {key: tuple(entry["shape"]) for key, entry in manifest.items()}
    assert INFINITY.table.param_shapes(shapes(config)) == parameter_shapes(config)


def parameter_shapes(config):
    schedule = schedule_of("1:1", "0.06M")
    condition = TextCondition(jnp.zeros((1, 4, config.text_channels)), jnp.ones(1, jnp.int32))
    features = jnp.zeros((1, schedule.total - 1, config.bits))
    init = Infinity(config, schedule).init
    params = jax.eval_shape(init, jax.random.key(0), condition, features)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def test_the_way_back_is_exact(state):
    params = INFINITY.to_params(state, infer_config(state))
    assert infer_config(state) == SMALL
    assert_same_state(INFINITY.to_state_dict(params, SMALL), state)
    names = block_names(SMALL)
    assert names[2] == "block_chunks.1.module.0"
    for layer, name in enumerate(names):
        kernel = params["blocks"]["attention"]["qkv"]["kernel"][layer]
        np.testing.assert_array_equal(kernel, state[f"{name}.sa.mat_qkv.weight"].T)
        kernel = params["text_keys_values"]["kernel"][layer]
        np.testing.assert_array_equal(kernel, state[f"{name}.ca.mat_kv.weight"].T)


def test_more_than_ten_blocks_of_a_chunk_keep_their_order():
    config = InfinityConfig(24, 4, 1, bits=1, text_channels=4, text_maxlen=1, block_chunks=2)
    state = recipe_state(config)
    params = INFINITY.to_params(dict(sorted(state.items())), config)
    offsets = [state[f"{name}.ada_gss"][0, 0] for name in block_names(config)]
    np.testing.assert_array_equal(params["blocks"]["modulation_offset"], offsets)


def test_heads_may_lie_on_the_third_axis(state):
    other = {
        key: value.reshape(1, 1, -1, 1) if key.endswith("scale_mul_1H11") else value
        for key, value in state.items()
    }
    assert infer_config(other) == SMALL
    chex.assert_trees_all_equal(INFINITY.to_params(other, SMALL), INFINITY.to_params(state, SMALL))


def test_blocks_need_not_be_in_chunks(state):
    plain = {f"block_chunks.{i // 2}.module.{i % 2}": f"blocks.{i}" for i in range(4)}
    renamed = {}
    for key, value in state.items():
        block = next((name for name in plain if key.startswith(f"{name}.")), "")
        renamed[key.replace(block, plain.get(block, ""), 1)] = value
    config = infer_config(renamed)
    assert (config.block_chunks, config.depth) == (1, 4)
    params = INFINITY.to_params(renamed, config)
    chex.assert_trees_all_equal(params, INFINITY.to_params(state, SMALL))
    assert_same_state(INFINITY.to_state_dict(params, config), renamed)


def test_what_does_not_fit_is_said(state):
    missing = dict(state)
    del missing["block_chunks.1.module.0.ca.proj.weight"]
    said = message(INFINITY.to_params, missing, infer_config(missing))
    assert "block_chunks.1.module.0.ca.proj.weight" in said
    assert "an Infinity transformer of depth 4, width 128, 2 heads, 6 bits per token" in said

    missing = {key: value for key, value in state.items() if "chunks.1.module.1" not in key}
    assert "depth 3 is not a multiple of 2 chunks" in message(infer_config, missing)
    missing = {key: value for key, value in state.items() if "scale_mul" not in key}
    assert "scale_mul_1H11" in message(infer_config, missing)
    assert "a VAR transformer" in message(refuse_others, INFINITY, ["pos_1LC"], "it")
    assert "not complete" in message(infer_config, {"text_norm.weight": np.zeros(128)})
