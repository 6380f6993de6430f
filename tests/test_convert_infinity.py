"""Conversion of Infinity: three parts, one of which may be missing, from the hub and back."""

import json
from dataclasses import replace

import chex
import numpy as np
import pytest
from checks import assert_same_state, message, to_torch
from reference_weights import recipe_params, recipe_state
from safetensors.numpy import load_file, save_file

from amskv_jax.checkpoints import published
from amskv_jax.checkpoints.folder import load_checkpoint, read_file, read_info
from amskv_jax.checkpoints.packed import pack_checkpoint
from amskv_jax.convert import convert
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.t5 import T5Config

TRANSFORMER = InfinityConfig(4, 64, 2, bits=8, text_channels=128, text_maxlen=32, block_chunks=2)
TOKENIZER = BSQConfig(8, 32, (1, 1, 2, 2, 2), 1)
ENCODER = T5Config(2, 128, 2, 16, 64, vocab_size=100)
MODEL = InfinityModel(TRANSFORMER, TOKENIZER, ENCODER)
VOCABULARY = b'{"model": {"type": "Unigram"}}'


@pytest.fixture(scope="module")
def states():
    return {part: recipe_state(config) for part, config in MODEL.parts.items()}


@pytest.fixture
def sources(torch, states, tmp_path):
    """As they are published: shards with an index, "vae" in a file, a folder of the hub."""
    shards = tmp_path / "infinity_8b_weights"
    shards.mkdir()
    places = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(states["transformer"])}
    for name in set(places.values()):
        own = {k: v for k, v in states["transformer"].items() if places[k] == name}
        save_file(own, shards / name)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    vae = {"epoch": 3, "trainer": {"vae": to_torch(torch, states["tokenizer"])}}
    torch.save(vae, tmp_path / "infinity_vae_d8.pth")

    encoder = tmp_path / "flan-t5"
    encoder.mkdir()
    decoder = {"decoder.final_layer_norm.weight": np.ones(128, np.float32)}
    save_file(states["text_encoder"] | decoder, encoder / "model.safetensors")
    (encoder / "config.json").write_text('{"d_model": 128, "num_heads": 2}')
    (encoder / "tokenizer.json").write_bytes(VOCABULARY)
    return {
        "transformer": shards,
        "tokenizer": tmp_path / "infinity_vae_d8.pth",
        "text_encoder": encoder,
    }


def test_published_files_to_a_checkpoint_and_back(sources, states, amskv, tmp_path):
    options = [
        word for part, path in sources.items() for word in (f"--{part.replace('_', '-')}", path)
    ]
    done = amskv("convert", "infinity", *options, "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    info = read_info(tmp_path / "out")
    assert (info.model, info.kind, info.drawing) == (MODEL, "infinity", MODEL.drawing)
    assert read_file(tmp_path / "out", "tokenizer.json") == VOCABULARY
    loaded = load_checkpoint(tmp_path / "out").params
    chex.assert_trees_all_equal(loaded, {p: recipe_params(c) for p, c in MODEL.parts.items()})

    done = amskv("info", "--checkpoint", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert "1024 x 1024 pixels, from text" in done.out
    done = amskv("export", "--checkpoint", tmp_path / "out", "--out", tmp_path / "back")
    assert (done.code, done.err) == (0, "")
    shared = states["text_encoder"]["shared.weight"]
    states = states | {
        "text_encoder": states["text_encoder"] | {"encoder.embed_tokens.weight": shared}
    }
    for part, state in states.items():
        assert_same_state(load_file(tmp_path / "back" / f"{part}.safetensors"), state)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == VOCABULARY


def test_published_files_from_the_hub(hub, sources, amskv, tmp_path, monkeypatch):
    """Shards in a folder, a file and a whole repository, from two repositories, by one name."""
    weights = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*.*")}
    ours = {name: content for name, content in weights.items() if not name.startswith("flan-t5")}
    hub.add("maker/Infinity", ours)
    others = {n.removeprefix("flan-t5/"): c for n, c in weights.items() if n not in ours}
    commit = hub.add("google/t5", others | {"flax_model.msgpack": b"the same again"})
    parts = {
        "transformer": "hf://maker/Infinity/infinity_8b_weights",
        "tokenizer": "hf://maker/Infinity/infinity_vae_d8.pth",
        "text_encoder": f"hf://google/t5@{commit}",
    }
    model = published.Published("a small Infinity", "infinity", parts)
    monkeypatch.setitem(published.PUBLISHED, "infinity-2b", model)
    done = amskv("convert", "infinity-2b", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out.count("unchecked") == len(sources) + 2  # three shards
    assert read_info(tmp_path / "out").model == MODEL
    assert read_file(tmp_path / "out", "tokenizer.json") == VOCABULARY
    some = ("--parts", "transformer,tokenizer")
    assert amskv("convert", "infinity-2b", *some, "--out", tmp_path / "some").code == 0
    assert read_info(tmp_path / "some").model == replace(MODEL, text_encoder=None)


def test_the_text_encoder_may_be_missing(sources, tmp_path):
    whole = convert("infinity", sources, tmp_path / "whole")
    without = convert(
        "infinity", {p: sources[p] for p in ("transformer", "tokenizer")}, tmp_path / "without"
    )
    assert without.model == replace(MODEL, text_encoder=None)
    assert (without.files, whole.files) == ((), ("tokenizer.json",))
    assert without.fingerprint == whole.fingerprint
    assert "without has no text_encoder" in message(
        load_checkpoint, tmp_path / "without", parts=["text_encoder"]
    )
    assert pack_checkpoint(tmp_path / "whole", tmp_path / "a.safetensors").model == MODEL


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("tokenizer", {"codebook_dim": 16}, "the tokenizer has 16 bits per token, the transf"),
        ("text_encoder", {"width": 64}, "features of 64 channels, the transformer takes 128"),
    ],
)
def test_parts_must_belong_together(sources, tmp_path, part, change, expected):
    config = replace(MODEL.parts[part], **change)
    sources[part] = tmp_path / "other"
    sources[part].mkdir()
    save_file(recipe_state(config), sources[part] / "model.safetensors")
    (sources[part] / "tokenizer.json").write_bytes(VOCABULARY)
    before = sorted(tmp_path.iterdir())
    assert expected in message(convert, "infinity", sources, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_are_missing(sources, tmp_path):
    (sources["text_encoder"] / "tokenizer.json").unlink()
    text = message(convert, "infinity", sources, tmp_path / "out")
    assert "flan-t5/tokenizer.json cannot be read (No such file or directory)" in text
    (sources["transformer"] / "model-1.safetensors").unlink()
    text = message(convert, "infinity", sources, tmp_path / "out")
    assert "infinity_8b_weights lacks 1 of the 3 files with the weights: model-1.safetens" in text
    assert not (tmp_path / "out").exists()
