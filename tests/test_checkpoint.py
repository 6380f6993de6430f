import errno
import json
import shutil
from dataclasses import asdict

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checks import message
from reference_weights import recipe_params, recipe_state

from amskv_jax.checkpoints import storage, writer
from amskv_jax.checkpoints.folder import load_checkpoint, read_info, save_checkpoint
from amskv_jax.checkpoints.weights import fingerprint
from amskv_jax.convert import to_params
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.square((1, 2, 3))
MODEL = VARModel(
    VARConfig(2, 64, 1, schedule=SCHEDULE, num_classes=10, vocab_size=64),
    VQVAEConfig(
        schedule=SCHEDULE,
        vocab_size=64,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
    ),
)


@pytest.fixture(scope="module")
def params():
    return {part: recipe_params(config) for part, config in MODEL.parts.items()}


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(directory, MODEL, params)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit_config(directory, edit):
    path = directory / "config.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_what_was_saved_is_loaded(saved, params):
    loaded = load_checkpoint(saved)
    chex.assert_trees_all_equal(loaded.params, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))
    assert loaded.info == read_info(saved)
    assert loaded.info.model == MODEL
    assert (loaded.info.kind, loaded.info.dtype) == ("var", "float32")
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "params"]


def test_shapes_are_read_once(saved, monkeypatch):
    read, groups = storage._shapes, []
    monkeypatch.setattr(storage, "_shapes", lambda path: groups.append(path) or read(path))
    load_checkpoint(saved)
    assert sorted(groups) == sorted((saved / "params").glob("*/*"))


def test_parts_are_restored_alone(saved, params, copy):
    values = copy / "params" / "transformer" / "0" / "ocdbt.process_0" / "d"
    for path in values.iterdir():
        path.unlink()
    loaded = load_checkpoint(copy, parts=["tokenizer"])
    chex.assert_trees_all_equal(loaded.params, {"tokenizer": params["tokenizer"]})
    fingerprints = {part: fingerprint(tree) for part, tree in params.items()}
    assert loaded.info.fingerprints == fingerprints
    assert loaded.info.fingerprint == fingerprint(params)
    assert f"{copy} has no text_encoder: it holds transformer, tokenizer" in message(
        load_checkpoint, copy, parts=["text_encoder"]
    )


def test_each_part_is_checked_alone(copy):
    edit_config(copy, lambda content: content["fingerprints"].update(tokenizer="0" * 32))
    load_checkpoint(copy, parts=["transformer"])
    text = message(load_checkpoint, copy, parts=["tokenizer"])
    assert f"the weights in {copy / 'params' / 'tokenizer'} are not those which" in text


def test_drawing_lies_beside_the_weights(params, tmp_path):
    assert save_checkpoint(tmp_path / "a", MODEL, params).drawing == MODEL.drawing == Drawing()
    drawing = Drawing(cfg=(1.0, 2.0, 3.5), top_k=2, guide=(0, -1), more_smooth=True)
    save_checkpoint(tmp_path / "b", MODEL, params, drawing=drawing)
    assert read_info(tmp_path / "b").drawing == drawing


def save_version_1(directory, params, **more):
    """What this package wrote before checkpoints had parts."""
    directory.mkdir()
    with ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
        checkpointer.save(directory / "params", params)
    content = {
        "format": "amskv-jax checkpoint",
        "version": 1,
        "kind": "var",
        "configs": {part: asdict(config) for part, config in MODEL.parts.items()},
        "dtype": "float32",
        "fingerprint": fingerprint(params),
        **more,
    }
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def test_version_1_is_read(params, saved, tmp_path):
    old = save_version_1(tmp_path / "old", params, guidance=4.0, classes=list("abcdefghij"))
    info = read_info(old)
    assert info.model == MODEL
    assert info.fingerprint == read_info(saved).fingerprint
    assert (info.classes, info.drawing) == (tuple("abcdefghij"), Drawing(cfg=4.0))
    chex.assert_trees_all_equal(load_checkpoint(old).params, params)
    alone = load_checkpoint(old, parts=["tokenizer"]).params
    chex.assert_trees_all_equal(alone, {"tokenizer": params["tokenizer"]})
    assert read_info(save_version_1(tmp_path / "older", params)).drawing == Drawing()


def test_version_1_has_one_fingerprint_for_all(params, tmp_path):
    old = save_version_1(tmp_path / "old", params, fingerprint="0" * 32)
    assert "not those which config.json was written for" in message(
        load_checkpoint, old, parts=["tokenizer"]
    )


def test_casting_keeps_quantizer_and_temperatures_in_float32(saved):
    params = load_checkpoint(saved, "bfloat16").params
    dtypes = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    kept = [path for path, dtype in dtypes.items() if dtype == jnp.float32]
    assert len(kept) == 4
    assert all("quantizer" in path or "log_temperature" in path for path in kept)
    assert set(dtypes.values()) == {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    assert "float16" in message(load_checkpoint, saved, "float16")


def test_bfloat16_checkpoint_has_the_fingerprint_of_the_float32_one(saved, tmp_path):
    half = {part: to_params(recipe_state(c), c, "bfloat16") for part, c in MODEL.parts.items()}
    info = save_checkpoint(tmp_path / "half", MODEL, half)
    assert info.dtype == "bfloat16"
    assert info.fingerprint == read_info(saved).fingerprint
    chex.assert_trees_all_equal(load_checkpoint(tmp_path / "half").params, half)
    chex.assert_trees_all_equal(load_checkpoint(saved, "bfloat16").params, half)
    for leaf in jax.tree.leaves(load_checkpoint(tmp_path / "half", "float32").params):
        assert leaf.dtype == jnp.float32


def test_fingerprint_sees_values_shapes_and_names():
    weights = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.ones(3, np.float32)}
    same = {"c": jnp.ones(3), "a": {"b": jnp.arange(6.0)}}
    others = [
        {"a": {"b": np.arange(6, dtype=np.float32)[::-1]}, "c": np.ones(3, np.float32)},
        {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.ones(3, np.float32)},
        {"a": {"d": np.arange(6, dtype=np.float32)}, "c": np.ones(3, np.float32)},
    ]
    assert fingerprint(weights) == fingerprint(same)
    assert len({fingerprint(tree) for tree in (weights, *others)}) == 4


def test_an_empty_folder_may_exist_and_missing_ones_are_made(params, tmp_path):
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", MODEL, params)
    save_checkpoint(tmp_path / "a" / "b", MODEL, params)
    assert read_info(tmp_path / "empty") == read_info(tmp_path / "a" / "b")


def test_an_existing_folder_is_left_alone(params, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    text = message(save_checkpoint, tmp_path, MODEL, params)
    assert f"{tmp_path} exists" in text
    assert "another output folder" in text
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("no SPACE")])
@pytest.mark.parametrize("where", ["weights", "config", "rename"])
def test_a_disk_error_leaves_nothing_behind(params, tmp_path, monkeypatch, where, error):
    def fail(*arguments, **keywords):
        raise error

    def write_a_part_and_fail(self, path, tree, **keywords):
        path.mkdir(parents=True)
        (path / "part").write_bytes(b"0" * 100)
        raise error

    if where == "weights":
        monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", write_a_part_and_fail)
    elif where == "config":
        monkeypatch.setattr(writer, "write_text", fail)
    else:
        monkeypatch.setattr(type(tmp_path), "rename", fail)
    text = message(save_checkpoint, tmp_path / "out", MODEL, params)
    assert f"cannot write {tmp_path / 'out'}" in text
    assert str(error) in text
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_behind(params, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "out", MODEL, params)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_full_is_refused_before_writing(params, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "the disk has 0.00 GiB left" in message(save_checkpoint, tmp_path / "out", MODEL, params)
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_do_not_fit_are_not_saved(params, tmp_path):
    wrong = jax.tree.map(lambda leaf: leaf, params)
    head = wrong["transformer"]["head"]
    head["kernel"] = head["kernel"].T.copy()
    wrong["tokenizer"]["extra"] = np.zeros(2, np.float32)
    del wrong["transformer"]["position_start"]
    text = message(save_checkpoint, tmp_path / "out", MODEL, wrong)
    assert "missing: transformer/position_start (1, 64)" in text
    assert "unexpected: tokenizer/extra (2,)" in text
    wrong_shape = "wrong shape: transformer/head/kernel, expected (64, 64)"
    assert wrong_shape not in text  # a square matrix looks the same transposed

    head["kernel"] = head["kernel"][:, :1]
    assert f"{wrong_shape}, found (64, 1)" in message(save_checkpoint, tmp_path, MODEL, wrong)


def test_mixed_types_are_not_saved(params, tmp_path):
    wrong = jax.tree.map(lambda leaf: leaf, params)
    wrong["transformer"]["head"]["bias"] = wrong["transformer"]["head"]["bias"].astype(np.float16)
    text = message(save_checkpoint, tmp_path / "out", MODEL, wrong)
    assert "cannot be stored as float16" in text
    wrong["transformer"]["head"]["bias"] = jnp.zeros(64, jnp.bfloat16)
    text = message(save_checkpoint, tmp_path / "out", MODEL, wrong)
    assert "as float32: expected bfloat16" in text


def test_folders_that_are_no_checkpoint(saved, tmp_path):
    assert "is not a checkpoint" in message(load_checkpoint, tmp_path / "nowhere")
    assert "config.json cannot be read" in message(load_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text('{"embed_dim": 1024}')
    assert "not a checkpoint of this package" in message(load_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text(saved.joinpath("config.json").read_text()[:200])
    assert "config.json is damaged" in message(load_checkpoint, tmp_path)


def test_other_versions_and_kinds_are_refused(copy):
    edit_config(copy, lambda content: content.update(version=3))
    assert "of version 3" in message(load_checkpoint, copy)
    edit_config(copy, lambda content: content.update(version=2, kind="unheard"))
    text = message(load_checkpoint, copy)
    assert "kind 'unheard', expected version 1 or 2 and kind var" in text
    edit_config(copy, lambda content: content.update(kind="var", configs={}))
    assert "config.json is damaged: KeyError('transformer')" in message(load_checkpoint, copy)


def test_weights_must_fit_the_configuration(copy):
    edit_config(copy, lambda content: content["configs"]["transformer"].update(num_classes=20))
    text = message(load_checkpoint, copy)
    assert f"{copy} does not fit its configuration" in text
    assert "class_embedding/embedding, expected (21, 64), found (11, 64)" in text


def test_weights_must_be_those_of_the_configuration(copy):
    edit_config(copy, lambda content: content.update(fingerprint="0" * 32))
    assert "not those which config.json was written for" in message(load_checkpoint, copy)


@pytest.mark.parametrize("damage", ["all", "data", "list", "mark"])
def test_damaged_weights(copy, damage):
    group = copy / "params" / "tokenizer" / "0"
    if damage == "all":
        shutil.rmtree(group)
        group = group.parent
    elif damage == "data":
        for path in group.rglob("d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "list":
        (group / "_METADATA").write_text("{")
    else:
        (group / "_METADATA").unlink()
    text = message(load_checkpoint, copy)
    assert f"the weights in {group} cannot be read: " in text
    assert "NoneType" not in text
    assert "Convert or copy the checkpoint again" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"depth": 10**9}, "transformer/depth is 1000000000, which the sizes of its parameters"),
        ({"num_heads": 10**9}, "transformer/num_heads is 1000000000"),
        ({"mlp_ratio": 1e300}, "transformer/mlp_ratio is 1e+300"),
        ({"mlp_ratio": float("nan")}, "transformer/mlp_ratio is not finite"),
        ({"schedule": {"grids": [[1, 1]] * 5000}}, "length of transformer/schedule/grids is 5000"),
        ({"schedule": {"grids": [[4000, 4000]]}}, "do not belong together"),
        ({"num_heads": 0}, "config.json is damaged: ZeroDivisionError"),
        ({"depth": "2"}, "config.json is damaged: TypeError"),
        ({"depth": True}, "config.json is damaged: TypeError"),
        ({"colour": 2}, "VARConfig has no field colour"),
        ({"schedule": {"grids": [[1]]}}, "config.json is damaged: TypeError"),
        ({"depth": -2}, "no model can have the shape VARConfig(depth=-2"),
        ({"depth": 4000}, "does not fit its configuration"),
    ],
)
def test_impossible_configurations_end_in_a_message(copy, change, expected):
    edit_config(copy, lambda content: content["configs"]["transformer"].update(change))
    assert expected in message(load_checkpoint, copy)


def test_scales_without_end_are_refused(copy):
    def edit(content):
        for part in content["configs"].values():
            part["schedule"] = {"grids": [[4000, 4000]]}

    edit_config(copy, edit)
    assert "its scales have 16000000 tokens" in message(read_info, copy)
