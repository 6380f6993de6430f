import shutil
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from PIL import Image
from training_helpers import SCHEDULE, TOKENIZER, TRANSFORMER, comparable, smooth_pictures

from amskv_jax.checkpoints.folder import load_checkpoint
from amskv_jax.errors import UsageError
from amskv_jax.training import tokens
from amskv_jax.training.recipe import find_recipe, load_tokenizer

RECIPE = "from training_helpers import TOKENIZER_TRAINING, TRANSFORMER_TRAINING\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of class folders with two pictures each."""
    folder, pictures = tmp_path_factory.mktemp("data"), smooth_pictures()
    for index, label in enumerate(pictures.labels):
        own = folder / pictures.classes[label]
        own.mkdir(exist_ok=True)
        Image.fromarray(pictures.pixels[index]).save(own / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def train(amskv, data, recipe):
    def train(part, *options, pictures=data):
        return amskv("train", part, "--config", recipe, "--data", pictures, *options)

    return train


def test_from_pictures_to_pictures(train, amskv, data, tmp_path, monkeypatch):
    run = tmp_path / "tokenizer"
    options = ("--validation", data, "--out", run, "--steps", 4)
    done = train("tokenizer", *options, "--stop-after", 0)
    assert done.code == 1
    assert "stopped after step 0 of 4" in done.err
    done = train("tokenizer", *options)
    assert (done.code, done.err) == (0, "")
    assert "6 pictures of 3 classes" in done.out
    assert f"wrote {run / 'tokenizer.safetensors'}" in done.out
    assert (run / "log.png").read_bytes().startswith(b"\x89PNG")
    config, params = load_tokenizer(run)
    assert config == TOKENIZER
    chex.assert_tree_all_finite(params)

    options = ("--tokenizer", run, "--validation", data, "--out", tmp_path / "var")
    done = train("var", *options)
    assert (done.code, done.err) == (0, "")
    assert {path.name for path in (tmp_path / "var").iterdir()} >= {"tokens.npz", "log.png"}
    log = comparable(tmp_path / "var")
    assert log[-2]["loss"] < log[0]["loss"]
    loaded = load_checkpoint(tmp_path / "var/checkpoint")
    assert loaded.info.configs == {"transformer": TRANSFORMER, "tokenizer": TOKENIZER}
    assert loaded.info.classes == ("a", "b", "c")
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, loaded.params["tokenizer"]), params)

    monkeypatch.setattr(tokens, "tokenize", None)  # neither pictures are encoded again, nor trained
    again = train("var", *options)
    assert (again.code, again.err) == (0, "")
    assert comparable(tmp_path / "var") == log

    sheet = tmp_path / "sheet.png"
    done = amskv("sample", "--checkpoint", tmp_path / "var/checkpoint", "--out", sheet)
    assert (done.code, done.err) == (0, "")
    assert sheet.exists()


def test_tokens_are_made_again_when_anything_changes(tmp_path, monkeypatch):
    made = []

    def tokenize(config, params, pictures, *, copies, noise):
        made.append((copies, noise))
        target = np.zeros((copies, len(pictures), SCHEDULE.total), np.uint8)
        return tokens.TokenSet(target, target, pictures.labels, pictures.classes)

    monkeypatch.setattr(tokens, "tokenize", tokenize)
    params, pictures = {"a": {"b": np.zeros(3)}}, smooth_pictures()

    def kept(params=params, pictures=pictures, config=TOKENIZER, copies=2, noise=0.0):
        path = tmp_path / "tokens.npz"
        found = tokens.kept_tokens(path, config, params, pictures, copies=copies, noise=noise)
        assert found.target.shape == (copies, 6, SCHEDULE.total)
        return len(made)

    assert kept() == kept() == 1
    changes = [
        {"params": {"a": {"b": np.ones(3)}}},
        {"pictures": replace(pictures, pixels=pictures.pixels[::-1])},
        {"pictures": replace(pictures, labels=pictures.labels[::-1].copy())},
        {"config": replace(TOKENIZER, phi_ratio=0.1)},
        {"copies": 3},
        {"noise": 0.1},
    ]
    for count, change in enumerate(changes, start=2):
        assert kept(**change) == kept(**change) == count
    assert kept() == len(changes) + 2
    (tmp_path / "tokens.npz").unlink()
    assert kept() == len(changes) + 3


def spoil_empty_class(folder):
    (folder / "d").mkdir()


def spoil_bytes(folder):
    (folder / "a/0.png").write_bytes(b"no picture")


def spoil_size(folder):
    Image.new("RGB", (5, 4)).save(folder / "a/0.png")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (spoil_empty_class, "d holds no pictures"),
        (spoil_bytes, "0.png is not a readable picture"),
        (spoil_size, "0.png is 4x5 pixels (height x width), expected 4x4"),
    ],
)
def test_unsuitable_pictures(train, data, tmp_path, spoil, expected):
    folder = shutil.copytree(data, tmp_path / "data")
    spoil(folder)
    done = train("tokenizer", "--out", tmp_path / "run", pictures=folder)
    assert done.code == 1
    assert expected in done.err
    assert not (tmp_path / "run").exists()


def test_classes_that_do_not_fit(train, data, tmp_path, monkeypatch):
    from amskv_jax.training import recipe as module

    found = TOKENIZER, {"a": np.zeros(1)}
    monkeypatch.setattr(module, "load_tokenizer", lambda directory: found)
    two = shutil.copytree(data, tmp_path / "two")
    shutil.rmtree(two / "b")
    options = ("--tokenizer", tmp_path, "--out", tmp_path / "run")
    done = train("var", *options, pictures=two)
    assert done.code == 1
    assert "the data has 2 classes, the model 3" in done.err
    done = train("var", *options, "--validation", two)
    assert done.code == 1
    assert f"{two} has the classes a, c, {data} has a, b, c: expected the same" in done.err
    assert not (tmp_path / "run").exists()


def test_without_a_finished_tokenizer(train, tmp_path):
    done = train("var", "--tokenizer", tmp_path, "--out", tmp_path / "run")
    assert done.code == 1
    assert f"{tmp_path} holds no finished tokenizer" in done.err
    (tmp_path / "tokenizer.safetensors").write_text("hello")
    done = train("var", "--tokenizer", tmp_path, "--out", tmp_path / "run")
    assert done.code == 1
    assert "tokenizer.safetensors is damaged" in done.err


def test_configs(recipe, tmp_path):
    known = find_recipe("var-cifar10")
    assert known.tokenizer.model == known.transformer.tokenizer
    assert find_recipe(str(recipe)).transformer.model == TRANSFORMER
    for name, expected in (
        ("var-d30", "var-d30 says nothing about training"),
        ("var-dog", "unknown model 'var-dog'"),
        (str(tmp_path / "none.py"), "no such file"),
    ):
        with pytest.raises(UsageError, match=expected):
            find_recipe(name)


def test_numbers_on_the_command_line_replace_those_of_the_config(train, tmp_path):
    options = ("--steps", 9, "--batch-size", 3, "--seed", 7, "--dtype", "bfloat16")
    done = train("tokenizer", "--out", tmp_path, *options, "--stop-after", 0)
    assert "stopped after step 0 of 9" in done.err
    settings = (tmp_path / "settings.json").read_text()
    for expected in ('"batch_size": 3', '"seed": 7', '"dtype": "bfloat16"', '"steps": 9'):
        assert expected in settings
