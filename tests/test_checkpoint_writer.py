"""Checkpoints which are written part after part, from weights that come one by one."""

import dataclasses
import json

import chex
import numpy as np
import pytest
from checks import message
from flax.traverse_util import flatten_dict

from amskv_jax.checkpoints import writer as writing
from amskv_jax.checkpoints.folder import load_checkpoint, read_file, read_info
from amskv_jax.checkpoints.initialize import init_checkpoint, random_leaves, random_params
from amskv_jax.checkpoints.packed import pack_checkpoint
from amskv_jax.checkpoints.writer import CheckpointWriter
from amskv_jax.models import kinds
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.parts import config_from_json, module_of
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.testing import TINY_VAR


@pytest.fixture(scope="module")
def params():
    return random_params(TINY_VAR)


def leaves(params, part):
    return flatten_dict(params[part], sep="/").items()


@pytest.mark.parametrize("group_bytes", [1, 300_000, 2**30])
def test_weights_come_in_any_order_and_are_kept_in_groups(
    params, tmp_path, monkeypatch, group_bytes
):
    monkeypatch.setattr(writing, "GROUP_BYTES", group_bytes)
    with CheckpointWriter(tmp_path / "out", TINY_VAR) as writer:
        writer.add("tokenizer", reversed(leaves(params, "tokenizer")))
        writer.add("transformer", iter(leaves(params, "transformer")))
    chex.assert_trees_all_equal(load_checkpoint(tmp_path / "out").params, params)
    assert writer.info == read_info(tmp_path / "out")
    groups = list((tmp_path / "out" / "params" / "transformer").iterdir())
    count = len(leaves(params, "transformer"))
    assert {1: len(groups) == count, 2**30: len(groups) == 1}.get(
        group_bytes, 1 < len(groups) < count
    )


def test_what_does_not_fit_leaves_nothing_behind(params, tmp_path):
    def write(part, leaves):
        with CheckpointWriter(tmp_path / "out", TINY_VAR, "bfloat16") as writer:
            writer.add(part, leaves)

    head = np.zeros((128, 64), np.float32)
    text = message(write, "transformer", [("head/kernel", head)])
    assert "cannot store transformer/head/kernel as float32: expected bfloat16" in text
    text = message(write, "transformer", [("head/kernel", head.T)])
    assert "expected (128, 64), found (64, 128) (transposed)" in text
    assert "unexpected: transformer/colour" in message(write, "transformer", [("colour", head)])
    assert "missing: tokenizer/decoder/conv_in/bias (64,)" in message(write, "tokenizer", {})
    half = list(random_leaves(TINY_VAR.tokenizer, np.random.default_rng(0), "bfloat16"))
    assert "out lacks the weights of its transformer" in message(write, "tokenizer", half)
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_those_of_the_whole(params, tmp_path):
    init_checkpoint(TINY_VAR, tmp_path / "out")
    chex.assert_trees_all_equal(load_checkpoint(tmp_path / "out").params, params)


def test_large_parameters_repeat_random_numbers(monkeypatch):
    monkeypatch.setattr("amskv_jax.checkpoints.initialize.MOST_NUMBERS", 1021)
    flat = dict(random_leaves(TINY_VAR.transformer, np.random.default_rng(0)))
    kernel = flat["blocks/mlp/up/kernel"].reshape(-1)
    np.testing.assert_array_equal(kernel[1021:2042], kernel[:1021])
    assert 0.9 < kernel.std() * 128**0.5 < 1.1
    rows = flat["blocks/mlp/up/kernel"].reshape(-1, 512)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_small_files_lie_beside_the_weights(params, tmp_path):
    with CheckpointWriter(tmp_path / "out", TINY_VAR) as writer:
        writer.add_file("tokenizer.json", b'{"model": {}}')
        for part in TINY_VAR.parts:
            writer.add(part, params[part])
    assert read_info(tmp_path / "out").files == ("tokenizer.json",)
    packed = tmp_path / "out.safetensors"
    assert pack_checkpoint(tmp_path / "out", packed).files == ("tokenizer.json",)
    for place in (tmp_path / "out", packed):
        assert read_file(place, "tokenizer.json") == b'{"model": {}}'
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert "out has no tokenizer.json" in message(read_file, tmp_path / "out", "tokenizer.json")


# A kind whose text encoder may be missing; its encoder is a second VQVAE.


@dataclasses.dataclass(frozen=True)
class WithText(VARModel):
    text_encoder: "TextConfig | None" = None

    kind = "with-text"

    @property
    def parts(self):
        more = {} if self.text_encoder is None else {"text_encoder": self.text_encoder}
        return {**super().parts, **more}


@dataclasses.dataclass(frozen=True)
class TextConfig(VQVAEConfig):
    names: tuple[str, ...] = ()


@module_of.register
def _(config: TextConfig):
    return VQVAE(config), module_of(TINY_VAR.tokenizer)[1]


@pytest.fixture
def with_text(monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "with-text", WithText)
    fields = vars(TINY_VAR.tokenizer)
    return WithText(
        TINY_VAR.transformer, TINY_VAR.tokenizer, TextConfig(**fields, names=("a", "b"))
    )


def test_a_part_may_be_missing(with_text, tmp_path):
    init_checkpoint(with_text, tmp_path / "whole")
    init_checkpoint(dataclasses.replace(with_text, text_encoder=None), tmp_path / "without")
    whole, without = read_info(tmp_path / "whole"), read_info(tmp_path / "without")
    assert whole.model == with_text
    assert list(without.configs) == ["transformer", "tokenizer"]
    assert whole.fingerprint == without.fingerprint  # layer statistics are not the encoder's
    assert whole.fingerprints.keys() - without.fingerprints.keys() == {"text_encoder"}
    alone = load_checkpoint(tmp_path / "whole", parts=["text_encoder"]).params
    assert list(alone) == ["text_encoder"]
    text = message(load_checkpoint, tmp_path / "without", parts=["text_encoder"])
    assert "without has no text_encoder: it holds transformer, tokenizer" in text
    assert kinds.optional_parts(WithText) == {"text_encoder"}
    assert kinds.part_types(with_text)["text_encoder"] is TextConfig


def test_models_are_made_of_the_parts_of_their_kind(with_text):
    assert kinds.make_model("var", TINY_VAR.parts) == TINY_VAR
    assert kinds.make_model("with-text", with_text.parts) == with_text
    text = message(kinds.make_model, "var", {"transformer": TINY_VAR.transformer})
    assert "this model of the kind var lacks its tokenizer" in text
    text = message(kinds.make_model, "var", {**TINY_VAR.parts, "tokenizer": TINY_VAR.transformer})
    assert "has another tokenizer: expected the parts transformer, tokenizer" in text
    assert "has another text_encoder" in message(kinds.make_model, "var", with_text.parts)
    assert "unknown kind of model 'vqgan'" in message(kinds.make_model, "vqgan", {})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 32}, "has 64 codes, the tokenizer 32"),
        ({"latent_channels": 8}, "has 16 channels per code, the tokenizer 8"),
        ({"schedule": TINY_VAR.schedule.square((1, 2))}, "the tokenizer 1, 2"),
    ],
)
def test_transformer_and_tokenizer_must_belong_together(change, expected):
    tokenizer = dataclasses.replace(TINY_VAR.tokenizer, **change)
    text = message(VARModel, TINY_VAR.transformer, tokenizer)
    assert "do not belong together" in text
    assert expected in text


@pytest.mark.parametrize(
    "config",
    [
        TINY_VAR.transformer,
        TINY_VAR.tokenizer,
        Drawing(cfg=(1.0, 2.0), guide=(-1,)),
        Drawing(cfg=3),
    ],
)
def test_configurations_are_read_as_they_were_written(config):
    text = json.dumps(dataclasses.asdict(config))
    assert config_from_json(type(config), json.loads(text)) == config


def test_fields_with_defaults_may_be_missing():
    fields = {"depth": 2, "width": 64, "num_heads": 1}
    assert config_from_json(VARConfig, fields) == VARConfig(2, 64, 1)
    with pytest.raises(KeyError, match="num_heads"):
        config_from_json(VARConfig, {"depth": 2, "width": 64})


def test_parameters_of_unheard_parts():
    assert "no module is registered for a Drawing" in message(kinds.param_shapes, Drawing())
