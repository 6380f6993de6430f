"""Little memory: parts on the device one after the other, weights in 8 bits until they are used."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from checks import message, page_commands

from amskv_jax import drawing
from amskv_jax.checkpoints.folder import load_checkpoint, load_on_host
from amskv_jax.checkpoints.initialize import init_checkpoint
from amskv_jax.checkpoints.packed import pack_checkpoint
from amskv_jax.checkpoints.weights import part_structs
from amskv_jax.cli import app
from amskv_jax.generate import picture_keys
from amskv_jax.mesh import MeshShape
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.infinity.prompts import TextFeatures
from amskv_jax.models.var.config import VARConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.packed_weight import PackedWeight, is_packed, widened
from amskv_jax.pipeline import Pipeline, load
from amskv_jax.policies import AMSKV
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.testing import TOKENIZER, VAR_FIELDS

MODELS = {
    "var": VARModel(VARConfig(6, 64, 4, **VAR_FIELDS), TOKENIZER),
    "infinity": InfinityModel(
        InfinityConfig(
            6, 64, 4, 8, ScaleSchedule.square((1, 2, 4)), text_channels=32, text_maxlen=16
        ),
        BSQConfig(8, 32, (1, 2), 1),
    ),
}
GREEDY = {"top_k": 1, "top_p": 0.0, "cfg": 3.0}


@pytest.fixture(scope="module", params=MODELS)
def places(request, tmp_path_factory):
    """A checkpoint as a folder, and packed."""
    folder = tmp_path_factory.mktemp("low")
    init_checkpoint(MODELS[request.param], folder / "folder", seed=1)
    pack_checkpoint(folder / "folder", folder / "packed.safetensors")
    return folder / "folder", folder / "packed.safetensors"


def wanted_of(pipe, count=4):
    if pipe.model.takes == "classes":
        return np.arange(count)
    lengths = np.array([3, 5, 2, 4], np.int32)
    features = np.random.default_rng(0).standard_normal((lengths.sum(), 32), np.float32)
    return TextFeatures(features, lengths)


def test_tokens_are_those_without(places):
    """Of a packed checkpoint, and of a folder whose weights are rounded likewise.

    The policy makes several groups of layers, which are scanned apart.
    """
    folder, packed = places
    policy, key = AMSKV(1, 5, 1, demanding_layers=(0,)), jax.random.key(0)
    found = [
        pipe.sample(wanted_of(pipe), key=key, policy=policy, **GREEDY)
        for pipe in (load(packed), load(packed, low_memory=True), load(folder, low_memory=True))
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other.tokens, found[0].tokens)
    np.testing.assert_allclose(found[1].pictures, found[0].pictures, atol=1e-5)


def test_what_is_loaded_is_the_hosts(places):
    _, packed = places
    for place in places:
        params = load_on_host(place, parts=["transformer"]).params["transformer"]
        leaves = jax.tree.leaves(params, is_leaf=is_packed)
        assert sum(map(is_packed, leaves)) >= 3
        for leaf in jax.tree.leaves(params):
            assert isinstance(leaf, np.ndarray)
        expected = load_checkpoint(packed, parts=["transformer"]).params["transformer"]
        flat, others = (
            dict(jax.tree.leaves_with_path(tree)) for tree in (widened(params), expected)
        )
        assert flat.keys() == others.keys()
        for path, leaf in flat.items():
            if place == packed:
                np.testing.assert_array_equal(leaf, others[path])
    model = load(packed, weights=False).model
    for dtype in ("float32", "bfloat16"):
        structs = part_structs(model, "transformer", dtype, low_memory=True)
        held = load_on_host(packed, dtype, ["transformer"]).params["transformer"]
        found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), held)
        assert found == structs


def arguments_of(pipe, batch):
    condition = pipe.conditions(None).batch(np.arange(batch))
    return condition, picture_keys(jax.random.key(0), batch), pipe.controls()


WIDE = {
    "var": VARModel(VARConfig(12, 256, 4, **VAR_FIELDS), TOKENIZER),
    "infinity": InfinityModel(
        replace(MODELS["infinity"].transformer, depth=12, width=256), MODELS["infinity"].tokenizer
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_no_more_than_a_layer_is_widened(name):
    """By the compiler's analysis, with the shapes of weights alone."""
    pipe = Pipeline(WIDE[name], None, WIDE[name].schedule, "float32", WIDE[name].drawing)
    arguments, temporaries, parts = [], [], ("transformer", "tokenizer")
    for low_memory in (False, True):
        params = {
            part: part_structs(pipe.model, part, "float32", low_memory=low_memory) for part in parts
        }
        analysis = pipe.sampler().compile(params, *arguments_of(pipe, 1)).memory_analysis()
        arguments.append(analysis.argument_size_in_bytes)
        temporaries.append(analysis.temp_size_in_bytes)
    layer = sum(
        leaf.size * 4 // leaf.shape[0]
        for leaf in jax.tree.leaves(params["transformer"])
        if leaf.dtype == jnp.int8
    )
    assert arguments[0] > 12 * layer
    assert arguments[1] < 0.3 * arguments[0]
    assert temporaries[1] - temporaries[0] < 1.1 * layer


def test_transformer_and_decoder_take_turns(places, monkeypatch):
    """Counted by what is on the device when a program is called."""
    monkeypatch.setattr(drawing, "PICTURES_IN_TURN", 4)
    expected, pipe = load(places[1]), load(places[1], low_memory=True)
    drawn, sizes = [], {"transformer": [], "decoder": []}
    before = on_device()
    for one in (expected, pipe):
        how = replace(one.drawing, **GREEDY)
        conditions, sampler = one.conditions(wanted_of(one)), one.sampler(drawing=how)
        drawer = one.drawer(sampler, conditions, 2, how)
        if one is pipe:
            del expected
            before = on_device()
            drawer.programs = [
                weighing(program, sizes[name])
                for name, program in zip(sizes, drawer.programs, strict=True)
            ]
        drawn.append(drawer.draw(one.params, 0, 0, 7, one.controls(how)))
    np.testing.assert_array_equal(*drawn)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params["transformer"]))
    assert len(sizes["transformer"]) == len(sizes["decoder"]) == 4
    assert min(sizes["transformer"]) >= held
    assert max(sizes["decoder"]) - before < held / 4
    assert on_device() - before < held / 4


def weighing(program, sizes):
    def call(*arguments):
        sizes.append(on_device())
        return program(*arguments)

    return call


def on_device():
    return sum(array.nbytes for array in jax.live_arrays())


def test_not_on_a_mesh(places):
    said = message(load, places[1], low_memory=True, mesh=MeshShape(data=1))
    assert said == "low_memory is for one device, not a mesh: leave one of them out"


def test_a_packed_weight_is_what_it_stands_for():
    codes, scale = np.array([[[-127, 3], [64, 0]]], np.int8), np.array([[[0.5, 0.1]]], np.float32)
    weight = PackedWeight(codes, scale, "bfloat16")
    expected = (codes * scale).astype(jnp.bfloat16)
    for one in (weight, jax.device_put(weight)):
        tree = {"a": one, "b": codes}
        assert one.shape == (1, 2, 2)
        np.testing.assert_array_equal(widened(tree)["a"], expected)
        assert widened(tree)["a"].dtype == jnp.bfloat16
        assert widened(tree)["b"] is codes


def test_command(checkpoint, amskv, tmp_path):
    """Of a packed checkpoint a folder goes on with or without; of another it is told apart."""
    packed = tmp_path / "packed.safetensors"
    pack_checkpoint(checkpoint, packed)
    common = ["sample", "--num", 5, "--batch-size", 2, "--shards"]
    assert amskv(*common, tmp_path / "a", "--checkpoint", packed).code == 0
    pictures = (tmp_path / "a" / "pictures.npz").read_bytes()
    (tmp_path / "a" / "pictures.npz").unlink()
    done = amskv(*common, tmp_path / "a", "--checkpoint", packed, "--low-memory")
    assert done.code == 0, done.err
    assert (tmp_path / "a" / "pictures.npz").read_bytes() == pictures
    done = amskv(*common, tmp_path / "b", "--checkpoint", checkpoint, "--low-memory")
    assert done.code == 0, done.err
    done = amskv(*common, tmp_path / "b", "--checkpoint", checkpoint)
    assert done.code == 2
    assert "weights (there in 8 bits, now as stored)" in done.err
    sheet = "sample", "--labels", "0-2", "--low-memory", "--out"
    done = amskv(*sheet, tmp_path / "sheet.png", "--checkpoint", checkpoint)
    assert done.code == 0, done.err
    done = amskv(*sheet, tmp_path / "no.png", "--checkpoint", packed, "--mesh", "data=1")
    assert done.code == 2
    assert "--low-memory is for one device: leave out --mesh" in done.err


PAGE = (Path(__file__).parents[1] / "docs" / "small-card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", list(page_commands(PAGE)), ids=" ".join)
def test_commands_of_the_page_exist(words):
    command = typer.main.get_command(app).commands[words[0]]
    command.make_context("amskv", words[1:])  # raises if an option is unknown
