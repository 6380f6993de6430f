import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import amskv_jax
from amskv_jax import configs
from amskv_jax.checkpoints import embedded, packed
from amskv_jax.checkpoints.compression import compress, decompress
from amskv_jax.checkpoints.embedded import (
    embedded_models,
    find_checkpoint,
    find_classifier,
    find_stats,
)
from amskv_jax.checkpoints.folder import load_checkpoint, read_info, save_checkpoint
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.checkpoints.packed import pack_checkpoint, pack_model
from amskv_jax.checkpoints.weights import fingerprint
from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.classifier import load_classifier
from amskv_jax.plan.stats import LayerStats
from amskv_jax.testing import TINY_VAR

CLASSES = tuple(["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])


@pytest.fixture(scope="module")
def params():
    return random_params(TINY_VAR)


@pytest.fixture(scope="module")
def packed_file(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "small.safetensors"
    pack_model(path, TINY_VAR, params, CLASSES)
    return path


@pytest.fixture
def embedding(packed_file, tmp_path, monkeypatch):
    """The small model in place of the default one, and an empty folder to work in."""
    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copy(packed_file, folder / "var_cifar10.safetensors")
    monkeypatch.setattr(embedded, "WEIGHTS", folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_packed_checkpoint_is_read_like_a_folder(params, packed_file):
    loaded = load_checkpoint(packed_file)
    expected = decompress(compress(params))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, loaded.params), expected)
    assert loaded.info == read_info(packed_file)
    assert loaded.info.model == TINY_VAR
    assert loaded.info.classes == CLASSES
    assert (loaded.info.kind, loaded.info.dtype) == ("var", "float32")
    assert loaded.info.fingerprint == fingerprint(expected) != fingerprint(params)
    half = load_checkpoint(packed_file, "bfloat16").params
    assert half["transformer"]["head"]["kernel"].dtype == "bfloat16"


def test_checkpoint_folders_are_packed_with_their_classes(params, packed_file, amskv, tmp_path):
    save_checkpoint(tmp_path / "folder", TINY_VAR, params, CLASSES)
    assert read_info(tmp_path / "folder").classes == CLASSES
    assert pack_checkpoint(tmp_path / "folder", tmp_path / "a.safetensors").classes == CLASSES
    assert (tmp_path / "a.safetensors").read_bytes() == packed_file.read_bytes()

    arguments = ("pack", "--checkpoint", tmp_path / "folder", "--out", tmp_path / "b.safetensors")
    done = amskv(*arguments)
    assert (done.code, done.err) == (0, "")
    assert f"wrote {tmp_path / 'b.safetensors'}, 2.95 MB" in done.out
    assert (tmp_path / "b.safetensors").read_bytes() == packed_file.read_bytes()
    assert amskv(*arguments).code == 1  # it exists


def test_what_is_not_packed(params, packed_file, tmp_path):
    with pytest.raises(AmskvError, match="exists: choose another name"):
        pack_model(packed_file, TINY_VAR, params)
    with pytest.raises(AmskvError, match=r"does not end in \.safetensors"):
        pack_model(tmp_path / "a.npz", TINY_VAR, params)
    with pytest.raises(AmskvError, match="3 names of classes, but the transformer has 10"):
        pack_model(tmp_path / "a.safetensors", TINY_VAR, params, ("a", "b", "c"))
    with pytest.raises(AmskvError, match="3 names of classes, but the transformer has 10"):
        save_checkpoint(tmp_path / "a", TINY_VAR, params, ("a", "b", "c"))
    wrong = {**params, "tokenizer": {}}
    with pytest.raises(AmskvError, match="missing: tokenizer/"):
        pack_model(tmp_path / "a.safetensors", TINY_VAR, wrong)
    assert list(tmp_path.iterdir()) == []


def test_packed_weights_must_be_those_of_the_description(params, tmp_path):
    arrays, info = compress(params), pack_model(tmp_path / "a.safetensors", TINY_VAR, params)
    arrays["transformer/head/bias"] = arrays["transformer/head/bias"] + 1
    changed = tmp_path / "changed.safetensors"
    packed.write_compressed(changed, arrays, packed.info_to_json(info))
    with pytest.raises(AmskvError, match="not those which its description was written for"):
        load_checkpoint(changed)
    del arrays["transformer/head/bias"]
    packed.write_compressed(changed, arrays, packed.info_to_json(info))
    with pytest.raises(AmskvError, match="missing: transformer/head/bias"):
        load_checkpoint(changed)


def test_finding_checkpoints(embedding, tmp_path, monkeypatch):
    assert embedded_models() == ["var-cifar10"]
    place = embedding / "var_cifar10.safetensors"
    assert find_checkpoint(None) == find_checkpoint("var-cifar10") == place
    assert find_checkpoint(tmp_path) == tmp_path
    assert find_checkpoint("elsewhere").name == "elsewhere"
    (tmp_path / "work/var-cifar10").mkdir()
    assert find_checkpoint("var-cifar10") != place  # a folder of that name comes first
    place.unlink()
    with pytest.raises(AmskvError, match=r"var-cifar10 is not in .*install the package again"):
        find_checkpoint(None)


def test_loading_without_a_checkpoint(embedding):
    pipeline = amskv_jax.load()
    assert pipeline.model == TINY_VAR
    assert pipeline.classes == CLASSES
    named = amskv_jax.load("var-cifar10")
    chex.assert_trees_all_equal(named.params, pipeline.params)
    assert named.fingerprint == pipeline.fingerprint


def test_sample_without_a_checkpoint_compares_with_the_full_cache(embedding, amskv):
    done = amskv("sample")
    assert (done.code, done.err) == (0, "")
    for text in ("full cache: cache of", "AMS-KV: cache of", "wrote amskv-sample.png"):
        assert text in done.out
    assert done.out.count("10 pictures in") == 2
    with Image.open("amskv-sample.png") as first:
        assert first.width > 10 * 128 > 3 * first.height  # two panels of 5 x 2 pictures
        pixels = np.asarray(first)

    again = amskv("sample", "--policy", "window:window=3", "--compare", "full")
    assert "full cache: cache of" in again.out
    assert "window" in again.out
    assert "wrote amskv-sample-2.png" in again.out
    with Image.open("amskv-sample-2.png") as second:
        panels = np.asarray(second), pixels
    captions = 60  # rows of pixels with the headings, which tell the time
    half = panels[0].shape[1] // 2
    full = [panel[captions:, : half - 8] for panel in panels]
    np.testing.assert_array_equal(*full)


def test_first_panel_is_on_the_sheet_while_the_second_is_drawn(embedding, amskv, monkeypatch):
    def generate(pipe, sampler, conditions, *settings):
        if Path("amskv-sample.png").exists():
            raise AmskvError("stopped while drawing the second panel")
        count = len(conditions)
        return np.zeros((count, 5)), np.zeros((count, 12, 12, 3), np.uint8), 1.0

    monkeypatch.setattr("amskv_jax.cli.sample._draw", generate)
    done = amskv("sample")
    assert (done.code, "stopped while drawing the second panel" in done.err) == (1, True)
    with Image.open("amskv-sample.png") as sheet:
        assert sheet.width < 3 * sheet.height  # one panel of 5 x 2 pictures


def test_commands_take_the_name_of_an_embedded_model(embedding, amskv):
    done = amskv("info", "--checkpoint", "var-cifar10")
    assert (done.code, done.err) == (0, "")
    assert "10 classes" in done.out
    done = amskv("sample", "--checkpoint", "var-cifar10", "--labels", "3", "--out", "a.png")
    assert "full cache: cache of" in done.out  # the policy full, and nothing beside it
    assert done.out.count("1 picture in") == 1


def test_default_model_of_the_package():
    path = find_checkpoint(None)
    assert path.stat().st_size <= 40e6
    info, known = read_info(path), configs.get("var-cifar10")
    assert info.model == known.model
    assert info.classes[3] == "cat"
    params = flatten_dict(load_checkpoint(path).params, sep="/")
    assert all(np.isfinite(leaf).all() for leaf in params.values())


def test_classifiers_are_found_by_the_names_of_the_classes():
    (classes,) = embedded.CLASSIFIERS
    network = load_classifier(find_classifier(classes))
    assert network.num_classes == len(classes)
    with pytest.raises(AmskvError, match="no classifier of the model's classes comes with"):
        find_classifier(classes[::-1])


def test_statistics_of_embedded_models_are_theirs(tmp_path):
    for name in embedded_models():
        stats = LayerStats.load(find_stats(name), read_info(find_checkpoint(name)).fingerprint)
        assert stats.schedule == configs.get(name).model.schedule
    assert find_stats(tmp_path / "stats.npz") == tmp_path / "stats.npz"


def test_plans_follow_from_embedded_statistics(amskv):
    given = ("--checkpoint", "var-cifar10", "--stats", "var-cifar10")
    done = amskv("plan", *given, "--policy", "ams:saving=0.787")
    assert (done.code, done.err) == (0, "")
    assert "calibrated" in done.out
    assert "78.8%" in done.out
