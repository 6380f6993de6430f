"""Conversion of whole files, from the reference and back."""

import json
import sys
import tracemalloc
from dataclasses import replace

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same_state, message, to_torch
from reference_weights import recipe_state
from safetensors.numpy import load_file, save_file

from amskv_jax.checkpoints.folder import load_checkpoint
from amskv_jax.convert import (
    api,
    convert,
    convert_var,
    export_checkpoint,
    tensors,
    to_params,
    var,
    vqvae,
)
from amskv_jax.convert.read import read_state_dict
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.testing import SCHEDULE, TOKENIZER, TRANSFORMER, VAR_FIELDS, VQVAE_FIELDS


def test_safetensors_to_checkpoint_and_back(files, transformer, tokenizer, tmp_path):
    seen = []
    info = convert_var(*files, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert info.configs == {"transformer": TRANSFORMER, "tokenizer": TOKENIZER}
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.info == info
    chex.assert_trees_all_equal(
        loaded.params,
        {
            "transformer": to_params(transformer, TRANSFORMER),
            "tokenizer": to_params(tokenizer, TOKENIZER),
        },
    )
    assert {what for what, _ in seen} == {
        "converting transformer",
        "converting tokenizer",
    }
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    assert seen[-1] == ("converting tokenizer", 1.0)

    export_checkpoint(tmp_path / "out", tmp_path / "exported")
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert names == {"transformer.safetensors", "tokenizer.safetensors"}
    for name, state in (("transformer", transformer), ("tokenizer", tokenizer)):
        assert_same_state(load_file(tmp_path / "exported" / f"{name}.safetensors"), state)


def test_pth_gives_what_safetensors_gives(torch, files, transformer, tokenizer, tmp_path):
    torch.save(to_torch(torch, transformer), tmp_path / "transformer.pth")
    torch.save(to_torch(torch, tokenizer), tmp_path / "tokenizer.pth")
    ours = convert_var(tmp_path / "transformer.pth", tmp_path / "tokenizer.pth", tmp_path / "pth")
    theirs = convert_var(*files, tmp_path / "safetensors")
    assert ours == theirs
    chex.assert_trees_all_equal(
        load_checkpoint(tmp_path / "pth").params, load_checkpoint(tmp_path / "safetensors").params
    )


def test_pth_is_mapped_and_old_formats_are_read(torch, transformer, tmp_path):
    tensors = to_torch(torch, transformer)
    torch.save(tensors, tmp_path / "new.pth")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new.pth", "old.pt"):
        assert_same_state(read_state_dict(tmp_path / name, var.VAR.keys).state, transformer)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_half_precision_files(name, suffix, tmp_path, write):
    states = []
    for state in (recipe_state(TRANSFORMER), recipe_state(TOKENIZER)):
        dtype = np.dtype(jnp.dtype(name))
        states.append(
            {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in state.items()}
        )
    paths = [tmp_path / f"{part}.{suffix}" for part in ("transformer", "tokenizer")]
    for path, state in zip(paths, states, strict=True):
        if suffix == "pth":
            torch = pytest.importorskip("torch")
            tensors = {k: torch.from_numpy(v.astype(np.float32)) for k, v in state.items()}
            torch.save({k: v.to(getattr(torch, name)) for k, v in tensors.items()}, path)
        else:
            write(state, path.stem)
    convert_var(*paths, tmp_path / "float32", patch_nums=(1, 2, 3))
    convert_var(*paths, tmp_path / "bfloat16", dtype="bfloat16", patch_nums=(1, 2, 3))
    for dtype in ("float32", "bfloat16"):
        chex.assert_trees_all_equal(
            load_checkpoint(tmp_path / dtype).params["transformer"],
            to_params(states[0], TRANSFORMER, dtype),
        )
    if name == "bfloat16":
        export_checkpoint(tmp_path / "bfloat16", tmp_path / "exported")
        exported = load_file(tmp_path / "exported" / "transformer.safetensors")
        key = "blocks.1.ffn.fc1.weight"
        assert exported[key].dtype == states[0][key].dtype
        assert exported[key].tobytes() == states[0][key].tobytes()


def test_training_checkpoint_holds_both_models(torch, transformer, tokenizer, tmp_path):
    without_level = {key: value for key, value in transformer.items() if key != "lvl_1L"}
    content = {
        "epoch": 3,
        "args": {"depth": 3},
        "trainer": {
            "config": {"patch_nums": (1, 2, 3), "prog_it": 0},
            "var_wo_ddp": to_torch(torch, without_level),
            "vae_local": to_torch(torch, tokenizer),
            "var_opt": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        },
    }
    torch.save(content, tmp_path / "ar-ckpt-last.pth")
    path = tmp_path / "ar-ckpt-last.pth"
    info = convert_var(path, path, tmp_path / "out")
    assert info.configs == {"transformer": TRANSFORMER, "tokenizer": TOKENIZER}


@pytest.mark.parametrize("nest", [("state_dict",), ("model",), ("checkpoint", "module")])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_nesting_and_prefixes(torch, transformer, tmp_path, nest, prefix):
    content = {prefix + key: value for key, value in to_torch(torch, transformer).items()}
    for name in nest:
        content = {name: content, "step": 7}
    torch.save(content, tmp_path / "nested.pth")
    assert_same_state(read_state_dict(tmp_path / "nested.pth", var.VAR.keys).state, transformer)


def write_folder(folder, state, shards):
    folder.mkdir()
    settings = {
        "depth": 2,
        "num_heads": 3,
        "patch_nums": [1, 2, 3],
        "vae_kwargs": {"quant_resi": -0.25, "ch": 32},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts = {name: list(state)[i::shards] for i, name in enumerate(names)}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_folder_of_the_hub(tokenizer, tmp_path, write, shards):
    # Neither heads nor schedule follow from its shapes.
    config = VARConfig(2, 192, 3, **VAR_FIELDS, attn_l2_norm=False)
    write_folder(tmp_path / "hub", var.VAR.weights(recipe_state(config)), shards)
    info = convert_var(tmp_path / "hub", write(tokenizer, "tokenizer"), tmp_path / "out")
    assert info.configs["transformer"] == config
    assert info.configs["tokenizer"] == VQVAEConfig(**VQVAE_FIELDS, phi_ratio=0.25)

    if shards > 1:
        (tmp_path / "hub" / "model-00002-of-00003.safetensors").unlink()
        text = message(read_state_dict, tmp_path / "hub", var.VAR.keys)
        assert "hub lacks 1 of the 3 files with the weights" in text
        assert "model-00002-of-00003.safetensors. Download it again" in text


def test_folder_with_pytorch_model_bin(torch, transformer, tmp_path):
    torch.save(to_torch(torch, transformer), tmp_path / "pytorch_model.bin")
    assert_same_state(read_state_dict(tmp_path, var.VAR.keys).state, transformer)


def test_folder_without_weights(tmp_path):
    assert "a folder without model.safetensors" in message(read_state_dict, tmp_path, var.VAR.keys)
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in message(read_state_dict, tmp_path, var.VAR.keys)


def test_one_phi_convolution_per_scale(tokenizer):
    config = VQVAEConfig(**VQVAE_FIELDS, num_phi=3)
    state = recipe_state(config)
    own = {key.replace("quant_resi.qresi_ls.", "quant_resi."): v for key, v in state.items()}
    assert own.keys() != state.keys()
    assert vqvae.infer_config(own, SCHEDULE) == config
    chex.assert_trees_all_equal(to_params(own, config), to_params(state, config))


def test_reading_pth_without_torch(transformer, tmp_path, monkeypatch):
    (tmp_path / "var.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    text = message(read_state_dict, tmp_path / "var.pth", var.VAR.keys)
    assert "amskv-jax[convert]" in text
    assert ".safetensors" in text


def test_folders_with_other_names(tokenizer, transformer, tmp_path, torch):
    """As the hub has Infinity 8B: an index of its own name, and shards which torch.save wrote."""
    torch_state = to_torch(torch, transformer)
    names = {key: f"part-{i % 2}.bin" for i, key in enumerate(torch_state)}
    for name in ("part-0.bin", "part-1.bin"):
        own = {key: value for key, value in torch_state.items() if names[key] == name}
        torch.save(own, tmp_path / name)
    index = tmp_path / "weights.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert_same_state(read_state_dict(tmp_path, var.VAR.keys).state, transformer)
    for wrong in ("{}", '{"weight_map": {"a": "../a.bin"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(wrong)
        assert "weights.bin.index.json is damaged: it does not say in which files" in message(
            read_state_dict, tmp_path, var.VAR.keys
        )
    index.unlink()
    text = message(read_state_dict, tmp_path, var.VAR.keys)
    assert "holds several files of weights: part-0.bin, part-1.bin. Give one of them" in text
    (tmp_path / "part-1.bin").unlink()
    found = read_state_dict(tmp_path, var.VAR.keys).state
    assert found.keys() == {key for key, name in names.items() if name == "part-0.bin"}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_are_read_tensor_by_tensor(torch, transformer, tmp_path, write, monkeypatch, suffix):
    path = tmp_path / f"transformer.{suffix}"
    if suffix == "pth":
        torch.save(to_torch(torch, transformer), path)
    else:
        write(transformer, "transformer")
    mapped = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: mapped.append(1) or load(*a, **k))
    monkeypatch.setattr(tensors, "MAPPED_BYTES", 10**6)
    source = read_state_dict(path, var.VAR.keys)
    tracemalloc.start()
    for path_, leaf in var.VAR.leaves(source.state, TRANSFORMER):
        assert path_
        del leaf
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 3 * 128 * 6 * 128 * 4  # modulation of three layers
    entry = largest // 3
    assert peak < largest + entry + 200_000 < sum(v.nbytes for v in transformer.values()) / 2
    assert len(mapped) == {"pth": 4, "safetensors": 0}[suffix]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
def test_weights_that_are_not_finite(files, transformer, tmp_path, write, wrong, dtype):
    key = "blocks.1.attn.proj.weight"
    value = transformer[key].copy()
    value[3, 5:7] = wrong
    path = write(transformer | {key: value}, "damaged")
    text = message(convert_var, path, files[1], tmp_path / "out", dtype=dtype)
    assert "damaged.safetensors holds weights that are not finite: 2 of the 16384 numbers" in text
    assert f"numbers in {key} are NaN or infinite" in text
    assert "keep them with --keep-not-finite" in text
    assert not (tmp_path / "out").exists()

    convert_var(path, files[1], tmp_path / "out", dtype=dtype, keep_not_finite=True)
    export_checkpoint(tmp_path / "out", tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "transformer.safetensors")[key]
    expected = value.astype(found.dtype).astype(
        np.float32
    )  # NumPy takes no bfloat16 NaNs for equal
    np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_kinds_and_parts_that_cannot_be_converted(files, tmp_path):
    parts = {"transformer": files[0]}
    text = message(convert, "var", parts, tmp_path / "out")
    assert (
        "kind var has the parts transformer, tokenizer: there is no file of its tokenizer" in text
    )
    parts |= {"tokenizer": files[1], "text_encoder": files[1]}
    assert "it has no text_encoder" in message(convert, "var", parts, tmp_path / "out")
    assert "cannot convert 'gan': expected var" in message(convert, "gan", parts, tmp_path / "out")


def test_small_files_go_with_the_part_that_needs_them(files, tmp_path, monkeypatch):
    named = replace(vqvae.VQVAE, files=("vocabulary.json",))
    monkeypatch.setitem(api.ARCHITECTURES["var"], "tokenizer", named)
    text = message(convert_var, *files, tmp_path / "out")
    assert "vocabulary.json cannot be read (No such file or directory): it belongs to" in text
    (tmp_path / "vocabulary.json").write_bytes(b"[1, 2]")
    info = convert_var(*files, tmp_path / "out")
    assert info.files == ("vocabulary.json",)
    names = export_checkpoint(tmp_path / "out", tmp_path / "exported")
    assert names == ["tokenizer.safetensors", "transformer.safetensors", "vocabulary.json"]
    for place in ("out", "exported"):
        assert (tmp_path / place / "vocabulary.json").read_bytes() == b"[1, 2]"
