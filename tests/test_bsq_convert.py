"""Conversion of Infinity's tokenizer, both ways."""

import gzip
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bsq_golden import FOLDER, recipe_state
from checks import assert_same_state, message, to_torch
from flax.traverse_util import flatten_dict

from amskv_jax.convert import bsq
from amskv_jax.convert.api import refuse_others
from amskv_jax.convert.read import read_state_dict
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.vae import BSQVAE
from amskv_jax.schedule import ScaleSchedule

PATCHED = (1, 2, 4, 4)
CONFIGS = [
    BSQConfig(16, channels=32),
    BSQConfig(14, 32, PATCHED, num_res_blocks=1, patchify=True),
    BSQConfig(64, 32, (1, 3, 2), num_res_blocks=3),
]
PUBLISHED = {f"d{bits}": BSQConfig(bits) for bits in (16, 18, 20, 24, 32, 64)} | {
    "d14_patchify": BSQConfig(14, channel_multipliers=PATCHED, patchify=True)
}


def module_shapes(config):
    schedule = ScaleSchedule.square((1, 2))
    pictures = jax.ShapeDtypeStruct((1, *config.picture_size(schedule), 3), jnp.float32)
    variables = jax.eval_shape(BSQVAE(config, schedule).init, jax.random.key(0), pictures)
    assert variables.keys() == {"params"}
    return {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}


def without_steps(key):
    """A key as checkpoints without the reference's wrappers have it."""
    return re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", key)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_entry_has_one_rule_and_a_place_of_its_own(config):
    paths = set()
    for key in bsq.shapes(config):
        found = [rule.find(key) for rule in bsq.TABLE.rules]
        found = [place for place in found if place is not None]
        assert len(found) == 1, key
        paths.add(found[0].path)
    assert len(paths) == len(bsq.shapes(config))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tables_give_the_parameters_of_the_module(config):
    assert bsq.TABLE.param_shapes(bsq.shapes(config)) == module_shapes(config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_there_and_back_is_exact_and_infers_the_configuration(config):
    state = recipe_state(config) | bsq.buffers(config)
    assert bsq.infer_config(state) == config
    params = bsq.BSQ.to_params(state, config)
    assert_same_state(bsq.BSQ.to_state_dict(params, config), state)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_names_without_wrappers_mean_the_same(config):
    state = recipe_state(config)
    short = {without_steps(key): value for key, value in state.items()}
    assert len(short) == len(state)
    assert not short.keys() & state.keys()
    assert "encoder.down.0.downsample.conv.weight" in short
    assert_same_state(bsq.BSQ.weights(short), state)
    assert bsq.infer_config(short) == config


def test_names_with_wrappers_stay():
    for key in bsq.shapes(CONFIGS[0]):
        assert bsq.rename(key) == key


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers(name):
    entries = json.loads(gzip.decompress((FOLDER / f"manifest_vae_{name}.json.gz").read_bytes()))
    config = PUBLISHED[name]
    # Arrays of the given shapes and types which take no memory.
    state = {
        key: np.broadcast_to(np.zeros((), entry["dtype"]), entry["shape"])
        for key, entry in entries.items()
    }
    assert bsq.infer_config(state) == config
    bsq.BSQ.check(bsq.BSQ.weights(state), config, "the manifest")
    weights = {
        key: {"shape": list(shape), "dtype": "float32"} for key, shape in bsq.shapes(config).items()
    }
    buffers = {
        key: {"shape": list(value.shape), "dtype": str(value.dtype)}
        for key, value in bsq.buffers(config).items()
    }
    assert weights | buffers == entries
    assert bsq.TABLE.param_shapes(bsq.shapes(config)) == module_shapes(config)


@pytest.mark.parametrize("name", ["d32", "d14_patchify"])
def test_published_sizes_there_and_back(name):
    """Bit for bit, with numbers of which no two are equal within an entry."""
    config = PUBLISHED[name]
    numbers = np.arange(1 << 22, dtype=np.uint32).view(np.float32)
    state = {
        key: numbers[index : index + math.prod(shape)].reshape(shape)
        for index, (key, shape) in enumerate(bsq.shapes(config).items())
    }
    params = bsq.BSQ.to_params(state, config)
    back = bsq.BSQ.to_state_dict(params, config)
    assert_same_state(back, state | bsq.buffers(config))


def test_layouts():
    config = CONFIGS[1]
    state = recipe_state(config)
    params = bsq.BSQ.to_params(state, config)
    kernel = state["decoder.up.0.block.1.conv2.conv.weight"]
    ours = params["decoder"]["up_0"]["block_1"]["conv2"]["kernel"]
    np.testing.assert_array_equal(ours[2, 0, 5, 7], kernel[7, 5, 2, 0])
    scale = params["encoder"]["middle"]["block_2"]["norm1"]["scale"]
    np.testing.assert_array_equal(scale, state["encoder.mid.block_2.norm1.norm.weight"])


def test_buffers_weigh_the_bits_of_an_index():
    for config in CONFIGS:
        buffers = bsq.buffers(config)
        assert buffers.keys() == {"quantizer.lfq.mask", "quantize.lfq.mask"}
        mask = buffers["quantizer.lfq.mask"]
        assert mask.dtype == np.int64
        expected = [2**bit for bit in reversed(range(config.codebook_dim))]
        assert mask.view(np.uint64).tolist() == expected


@pytest.mark.parametrize("short", [False, True])
def test_weights_lie_under_vae(tmp_path, short):
    torch = pytest.importorskip("torch")
    config = CONFIGS[1]
    state = recipe_state(config)
    named = {without_steps(key) if short else key: value for key, value in state.items()}
    content = {"vae": to_torch(torch, named | bsq.buffers(config)), "args": {"codebook_dim": 14}}
    torch.save(content, tmp_path / "vae.pth")
    source = read_state_dict(tmp_path / "vae.pth", bsq.BSQ.keys)
    assert bsq.infer_config(source.state) == config
    assert_same_state(bsq.BSQ.weights(source.state), state)


def test_patchify_can_be_told():
    config = CONFIGS[1]
    state = recipe_state(config)
    assert bsq.infer_config(state).token_bits == 56
    assert bsq.infer_config(state, patchify=False).token_bits == 14


def test_other_architectures_are_named():
    text = message(refuse_others, bsq.BSQ, ["quantize.embedding.weight"], "vae.pth")
    assert text == "vae.pth holds a VAR tokenizer, expected an Infinity tokenizer"


def test_odd_channels_are_refused():
    state = recipe_state(CONFIGS[1])
    state["encoder.down.1.block.0.conv1.conv.bias"] = np.zeros(40, np.float32)
    text = message(bsq.infer_config, state, source="vae.pth")
    assert "vae.pth has levels of [32, 40, 128, 128] channels" in text


def test_what_is_missing_is_listed():
    config = CONFIGS[1]
    state = recipe_state(config)
    del state["decoder.mid.block_1.norm1.norm.weight"]
    text = message(bsq.BSQ.to_params, state, config)
    assert "an Infinity tokenizer with 32 x (1, 2, 4, 4) channels" in text
    assert "decoder.mid.block_1.norm1.norm.weight" in text
