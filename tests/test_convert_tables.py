"""Rules of conversion: what follows from shapes, what goes where, both ways."""

import gzip
import json
import tracemalloc

import chex
import jax
import numpy as np
import pytest
from checks import assert_same_state, message
from reference_weights import GOLDEN, recipe_state

from amskv_jax.convert import to_params, to_state_dict, var, vqvae
from amskv_jax.convert.api import architecture_of
from amskv_jax.models.kinds import param_shapes
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.schedule import VAR_256, VAR_512, ScaleSchedule
from amskv_jax.testing import SCHEDULE, TOKENIZER, TRANSFORMER, VAR_FIELDS, VQVAE_FIELDS

TRANSFORMERS = [
    TRANSFORMER,
    VARConfig(2, 128, 2, **VAR_FIELDS, shared_aln=True),
    VARConfig(2, 192, 3, **VAR_FIELDS, attn_l2_norm=False, mlp_ratio=2.5),
    VARConfig(1, 96, 4, **(VAR_FIELDS | {"schedule": ScaleSchedule.square((2, 5))})),
]
TOKENIZERS = [
    TOKENIZER,
    VQVAEConfig(**VQVAE_FIELDS, num_phi=1),
    VQVAEConfig(**(VQVAE_FIELDS | {"channel_multipliers": (1, 1, 2, 3), "num_res_blocks": 2})),
]


@pytest.mark.parametrize("config", TRANSFORMERS + TOKENIZERS, ids=str)
def test_every_entry_has_one_rule_and_a_place_of_its_own(config):
    architecture = architecture_of(type(config))
    places = set()
    for key in architecture.shapes(config):
        found = [rule.find(key) for rule in architecture.table.rules]
        found = [place for place in found if place is not None]
        assert len(found) == 1, key
        places.add((found[0].path, found[0].index))
    assert len(places) == len(architecture.shapes(config))


@pytest.mark.parametrize("config", TRANSFORMERS + TOKENIZERS, ids=str)
def test_tables_give_the_parameters_of_the_modules(config):
    architecture = architecture_of(type(config))
    shapes = architecture.table.param_shapes(architecture.shapes(config))
    assert shapes == param_shapes(config)


@pytest.mark.parametrize("config", TRANSFORMERS + TOKENIZERS, ids=str)
def test_there_and_back_is_exact_and_infers_the_configuration(config):
    state = recipe_state(config)
    module = {VARConfig: var, VQVAEConfig: vqvae}[type(config)]
    if isinstance(config, VARConfig):
        settings = {"num_heads": config.num_heads}
        assert module.infer_config(state, settings=settings) == config
    else:
        assert module.infer_config(state, config.schedule) == config
    assert_same_state(to_state_dict(to_params(state, config), config), state)


def test_layouts(transformer, tokenizer):
    params = to_params(transformer, TRANSFORMER)
    blocks = params["blocks"]
    for layer in range(3):
        block = f"blocks.{layer}"
        qkv = transformer[f"{block}.attn.mat_qkv.weight"]
        np.testing.assert_array_equal(blocks["attention"]["qkv"]["kernel"][layer], qkv.T)
        temperature = transformer[f"{block}.attn.scale_mul_1H11"][0, :, 0, 0]
        np.testing.assert_array_equal(blocks["attention"]["log_temperature"][layer], temperature)
        bias = transformer[f"{block}.ada_lin.1.bias"]
        np.testing.assert_array_equal(params["modulation"]["bias"][layer], bias)
    np.testing.assert_array_equal(params["position_embedding"], transformer["pos_1LC"][0])

    params = to_params(tokenizer, TOKENIZER)
    chex.assert_shape(params["encoder"]["down_1"]["attention_0"]["qkv"]["kernel"], (1, 1, 64, 192))
    kernel = tokenizer["decoder.up.0.block.1.conv2.weight"]
    ours = params["decoder"]["up_0"]["block_1"]["conv2"]["kernel"]
    np.testing.assert_array_equal(ours[2, 0, 5, 7], kernel[7, 5, 2, 0])
    phi = tokenizer["quantize.quant_resi.qresi_ls.3.weight"]
    ours = params["quantizer"]["phi_kernel"]
    np.testing.assert_array_equal(ours[3], phi.transpose(2, 3, 1, 0))


def manifest(name):
    path = GOLDEN / f"var/manifest_{name}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def without_data(entries):
    """Arrays of the given shapes and types which take no memory."""
    return {
        key: np.broadcast_to(np.zeros((), entry["dtype"]), entry["shape"])
        for key, entry in entries.items()
    }


@pytest.mark.parametrize("with_buffers", [False, True])
@pytest.mark.parametrize("depth", [16, 20, 24, 30, 36])
def test_published_transformers(depth, with_buffers):
    entries = manifest(f"var_d{depth}")
    large = depth == 36
    config = VARConfig(
        depth, 64 * depth, depth, schedule=VAR_512 if large else VAR_256, shared_aln=large
    )
    buffers = var.buffers(config)
    state = var.VAR.weights(without_data(entries)) | (buffers if with_buffers else {})
    assert var.infer_config(state) == config
    found = {key: {"shape": list(v.shape), "dtype": str(v.dtype)} for key, v in buffers.items()}
    weights = {
        key: {"shape": list(shape), "dtype": "float32"} for key, shape in var.shapes(config).items()
    }
    assert found | weights == entries
    assert var.TABLE.param_shapes(var.shapes(config)) == param_shapes(config)
    var.VAR.check(var.VAR.weights(state), config, "the manifest")


@pytest.mark.parametrize("schedule", [VAR_256, VAR_512], ids=["256", "512"])
def test_published_tokenizers(schedule):
    entries = manifest(f"vqvae_ch160_{16 * schedule.grids[-1][0]}")
    state = without_data(entries)
    config = VQVAEConfig(schedule=schedule)
    assert vqvae.infer_config(state, schedule) == config
    shapes = {key: value.shape for key, value in state.items()}
    buffers = {key: value.shape for key, value in vqvae.buffers(config).items()}
    assert vqvae.shapes(config) | buffers == shapes


def test_buffers_are_those_of_the_reference():
    buffers = var.buffers(TRANSFORMER)
    assert buffers["lvl_1L"].dtype == np.int64
    assert buffers["lvl_1L"].tolist() == [[0] + 4 * [1] + 9 * [2]]
    mask = buffers["attn_bias_for_masking"]
    assert mask.dtype == np.float32
    assert mask.shape == (1, 1, 14, 14)
    sees = mask[0, 0] == 0
    assert np.all(np.isneginf(mask[0, 0][~sees]))
    assert sees.sum(axis=1).tolist() == [1] + 4 * [5] + 9 * [14]
    assert not buffers["blocks.2.attn.zero_k_bias"].any()


def test_converting_holds_only_the_output(transformer):
    tracemalloc.start()
    params = to_params(transformer, TRANSFORMER)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_schedule_is_given_or_inferred(transformer):
    weights = var.VAR.weights(transformer)
    assert var.infer_config(weights, patch_nums=[1, 2, 3]).schedule == SCHEDULE
    assert var.infer_config(weights, settings={"patch_nums": [1, 2, 3]}).schedule == SCHEDULE
    assert var.infer_config(weights | {"lvl_1L": transformer["lvl_1L"]}).schedule == SCHEDULE
    text = message(var.infer_config, weights)
    assert "14 tokens in 3 scales" in text
    assert "--patch-nums" in text
    text = message(var.infer_config, weights, (1, 2, 4))
    assert "14 tokens in 3 scales, but the patch numbers 1, 2, 4 make 21 tokens" in text
