import gzip
import json
import shutil
import sys
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference_weights import GOLDEN, recipe_state
from safetensors.numpy import load_file, save_file

from amskv_jax import checkpoint
from amskv_jax.checkpoint import load_checkpoint
from amskv_jax.convert import convert_var, export_var, to_params, to_state_dict, var, vqvae
from amskv_jax.convert.api import ARCHITECTURES
from amskv_jax.convert.read import read_state_dict
from amskv_jax.errors import AmskvError
from amskv_jax.models.config import VARConfig, VQVAEConfig
from amskv_jax.schedule import VAR_256, VAR_512, ScaleSchedule

SCHEDULE = ScaleSchedule.square((1, 2, 3))
VAR_FIELDS = {"schedule": SCHEDULE, "num_classes": 10, "vocab_size": 64, "latent_channels": 16}
TRANSFORMER = VARConfig(3, 128, 2, **VAR_FIELDS)
TRANSFORMERS = [
    TRANSFORMER,
    VARConfig(2, 128, 2, **VAR_FIELDS, shared_aln=True),
    VARConfig(2, 192, 3, **VAR_FIELDS, attn_l2_norm=False, mlp_ratio=2.5),
    VARConfig(1, 96, 4, **(VAR_FIELDS | {"schedule": ScaleSchedule.square((2, 5))})),
]
VQVAE_FIELDS = {
    "schedule": SCHEDULE,
    "vocab_size": 64,
    "latent_channels": 16,
    "channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
}
TOKENIZER = VQVAEConfig(**VQVAE_FIELDS)
TOKENIZERS = [
    TOKENIZER,
    VQVAEConfig(**VQVAE_FIELDS, num_phi=1),
    VQVAEConfig(**(VQVAE_FIELDS | {"channel_multipliers": (1, 1, 2, 3), "num_res_blocks": 2})),
]


@pytest.fixture(scope="module")
def transformer():
    return recipe_state(TRANSFORMER)


@pytest.fixture(scope="module")
def tokenizer():
    return recipe_state(TOKENIZER)


@pytest.fixture
def write(tmp_path):
    """Write a state dict as .safetensors and return the path."""

    def write(state, name):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path)
        return path

    return write


@pytest.fixture
def files(transformer, tokenizer, write):
    return write(transformer, "transformer"), write(tokenizer, "tokenizer")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def to_torch(torch, state):
    return {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def message(call, *arguments, **keywords):
    with pytest.raises(AmskvError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].tobytes() == value.tobytes(), key


# The tables


@pytest.mark.parametrize("config", TRANSFORMERS + TOKENIZERS, ids=str)
def test_every_entry_has_one_rule_and_a_place_of_its_own(config):
    architecture = ARCHITECTURES[type(config)]
    places = set()
    for key in architecture.shapes(config):
        found = [rule.find(key) for rule in architecture.table.rules]
        found = [place for place in found if place is not None]
        assert len(found) == 1, key
        places.add((found[0].path, found[0].index))
    assert len(places) == len(architecture.shapes(config))


@pytest.mark.parametrize("config", TRANSFORMERS + TOKENIZERS, ids=str)
def test_tables_give_the_parameters_of_the_modules(config):
    architecture = ARCHITECTURES[type(config)]
    shapes = architecture.table.param_shapes(architecture.shapes(config))
    assert shapes == checkpoint.param_shapes(config)


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
    assert var.TABLE.param_shapes(var.shapes(config)) == checkpoint.param_shapes(config)
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


# Files


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
        "writing",
    }
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    assert seen[-1] == ("writing", 1.0)

    export_var(tmp_path / "out", tmp_path / "exported")
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
        export_var(tmp_path / "bfloat16", tmp_path / "exported")
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
    config = TRANSFORMERS[2]  # neither heads nor schedule follow from its shapes
    write_folder(tmp_path / "hub", var.VAR.weights(recipe_state(config)), shards)
    info = convert_var(tmp_path / "hub", write(tokenizer, "tokenizer"), tmp_path / "out")
    assert info.configs["transformer"] == config
    assert info.configs["tokenizer"] == VQVAEConfig(**VQVAE_FIELDS, phi_ratio=0.25)

    if shards > 1:
        (tmp_path / "hub" / "model-00002-of-00003.safetensors").unlink()
        assert "model-00002-of-00003.safetensors does not exist" in message(
            read_state_dict, tmp_path / "hub", var.VAR.keys
        )


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


# The schedule


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


# Bad input


def assert_refused(paths, tmp_path, *expected, **options):
    before = sorted(tmp_path.rglob("*"))
    text = message(convert_var, *paths, tmp_path / "out", **options)
    for part in expected:
        assert part in text
    assert sorted(tmp_path.rglob("*")) == before
    return text


def test_missing_file(files, tmp_path):
    assert_refused((tmp_path / "no.pth", files[1]), tmp_path, "no.pth does not exist")


def test_unknown_type_of_file(files, tmp_path):
    (tmp_path / "var.onnx").touch()
    assert_refused((tmp_path / "var.onnx", files[1]), tmp_path, "unknown type", ".safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, 20_000, -1000])
def test_truncated_safetensors(files, tmp_path, keep):
    content = files[0].read_bytes()
    files[0].write_bytes(content[:keep])
    assert_refused(files, tmp_path, "transformer.safetensors is truncated")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"not json", "is damaged, or not"),
        (b"[1, 2]   ", "is damaged, or not"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "is damaged, or not"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "a (2,) has 4 bytes"),
        (b'{"a": {"dtype": "F8_E5M2", "shape": [2], "data_offsets": [0, 2]}}', "type F8_E5M2"),
    ],
)
def test_damaged_safetensors(files, tmp_path, header, expected):
    files[0].write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert_refused(files, tmp_path, "transformer.safetensors", expected)


@pytest.mark.parametrize("content", ["empty", "garbage", "truncated"])
def test_damaged_pth(torch, transformer, files, tmp_path, content):
    path = tmp_path / "var.pth"
    torch.save(to_torch(torch, transformer), path)
    size = path.stat().st_size
    damaged = {"empty": b"", "garbage": b"hello" * 100, "truncated": path.read_bytes()[: size // 2]}
    path.write_bytes(damaged[content])
    text = assert_refused((path, files[1]), tmp_path, "var.pth cannot be read: it is truncated")
    assert "\n" not in text


def test_pth_with_other_objects(torch, files, tmp_path):
    path = tmp_path / "var.pth"
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    assert_refused((path, files[1]), tmp_path, "holds other Python objects than tensors")
    torch.save([torch.zeros(2)], path)
    assert_refused((path, files[1]), tmp_path, "holds a list, expected a state dict")
    torch.save({"step": 3}, path)
    assert_refused((path, files[1]), tmp_path, "holds no pos_1LC; state dicts in it: nothing")


def test_several_models_in_a_file(torch, files, transformer, tmp_path):
    path = tmp_path / "var.pth"
    tensors = to_torch(torch, transformer)
    torch.save({"model": tensors, "ema": tensors}, path)
    assert_refused((path, files[1]), tmp_path, "holds several models: model, ema")


def test_wrong_architecture(files, tmp_path, write):
    expected = ("tokenizer.safetensors holds a VAR tokenizer, expected a VAR transformer",)
    assert_refused(files[::-1], tmp_path, *expected)
    expected = ("transformer.safetensors holds a VAR transformer, expected a VAR tokenizer",)
    assert_refused((files[0], files[0]), tmp_path, *expected)
    infinity = {"text_norm.weight": np.ones(4), "pos_start": np.ones((1, 1, 8))}
    path = write(infinity, "infinity")
    assert_refused((path, files[1]), tmp_path, "an Infinity transformer, expected a VAR trans")
    path = write({"conv1.weight": np.ones((8, 3, 7, 7)), "fc.bias": np.ones(10)}, "resnet")
    assert_refused(
        (path, files[1]), tmp_path, "does not hold a VAR transformer", "conv1.weight, fc.bias, ..."
    )


def test_transposed_matrix(files, transformer, tmp_path, write):
    key = "blocks.1.ffn.fc1.weight"
    path = write(transformer | {key: transformer[key].T}, "wrong")
    assert_refused(
        (path, files[1]),
        tmp_path,
        "wrong.safetensors does not fit a VAR transformer of depth 3, width 128, 2 heads",
        f"wrong shape: {key}, expected (512, 128), found (128, 512) (transposed)",
    )


@pytest.mark.parametrize(
    "key",
    [
        "word_embed.weight",
        "class_emb.weight",
        "head.weight",
        "lvl_embed.weight",
        "head_nm.ada_lin.1.weight",
    ],
)
def test_transposed_matrices_from_which_shapes_are_inferred(transformer, tmp_path, key):
    state = transformer | {key: transformer[key].T}
    config = var.infer_config(state)
    assert config == TRANSFORMER
    problems = message(var.VAR.check, var.VAR.weights(state), config, "it").splitlines()
    assert len(problems) == 2
    assert "(transposed)" in problems[1]


def test_all_problems_are_reported_together(files, transformer, tmp_path, write):
    wrong = dict(transformer)
    del wrong["blocks.2.attn.q_bias"], wrong["head.weight"], wrong["pos_1LC"]
    wrong["blocks.0.attn.k_bias"] = np.zeros(128, np.float32)
    wrong["head_nm.ada_lin.1.bias"] = np.zeros(255, np.float32)
    wrong["pos_start"] = wrong["pos_start"].astype(np.int32)
    text = assert_refused(
        (write(wrong, "wrong"), files[1]),
        tmp_path,
        "missing: blocks.2.attn.q_bias (128,)",
        "missing: head.weight (64, 128)",
        "missing: pos_1LC (1, 14, 128)",
        "unexpected: blocks.0.attn.k_bias (128,)",
        "wrong shape: head_nm.ada_lin.1.bias, expected (256,), found (255,)",
        "not floating point: pos_start is int32",
        patch_nums=(1, 2, 3),
    )
    assert len(text.splitlines()) == 7


def test_long_reports_are_cut(files, transformer, tmp_path, write):
    extra = {f"ema.{key}": value for key, value in transformer.items()}
    text = assert_refused((write(transformer | extra, "wrong"), files[1]), tmp_path, "unexpected")
    weights = len(var.VAR.weights(transformer))
    assert f"... and {weights - 20} more unexpected" in text
    assert len(text.splitlines()) == 22


@pytest.mark.parametrize("key", list(vqvae.shapes(TOKENIZER))[::7])
def test_any_missing_entry_of_the_tokenizer_is_reported(files, tokenizer, tmp_path, write, key):
    state = {name: value for name, value in tokenizer.items() if name != key}
    text = assert_refused((files[0], write(state, "wrong")), tmp_path, f"missing: {key} ")
    assert "wrong.safetensors does not fit a VAR tokenizer" in text


def test_tokenizer_of_another_transformer(files, tmp_path, write):
    other = VQVAEConfig(**(VQVAE_FIELDS | {"vocab_size": 32}))
    paths = (files[0], write(recipe_state(other), "other"))
    assert_refused(paths, tmp_path, "the transformer has 64 codes, the tokenizer 32")


def test_tokenizer_with_normalised_codes(tokenizer):
    settings = {"using_znorm": True}
    assert "using_znorm" in message(vqvae.infer_config, tokenizer, SCHEDULE, settings)


def test_unknown_dtype(files, tmp_path):
    assert_refused(files, tmp_path, "float32 or bfloat16", dtype="int8")


def test_output_folder_exists(files, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep")
    assert_refused(files, tmp_path, "out exists", "another output folder")
    convert_var(*files, tmp_path / "checkpoint")
    assert "out exists" in message(export_var, tmp_path / "checkpoint", out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_disk_error_while_exporting(files, tmp_path, monkeypatch):
    convert_var(*files, tmp_path / "checkpoint")
    written = []

    def fail_at_the_second(arrays, path, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(shutil.copy(files[0], path))

    monkeypatch.setattr("amskv_jax.convert.api.save_file", fail_at_the_second)
    before = sorted(tmp_path.rglob("*"))
    text = message(export_var, tmp_path / "checkpoint", tmp_path / "out")
    assert "cannot write" in text
    assert "No space left on device" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_disk_error_while_converting(files, tmp_path, monkeypatch):
    def fail(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_text", fail)
    assert_refused(files, tmp_path, "cannot write", "No space left on device")


def test_parameters_that_do_not_fit_are_not_exported(transformer):
    params = to_params(transformer, TRANSFORMER)
    del params["head"]
    flat = flatten_dict(params, sep="/")
    assert "head/bias" not in flat
    text = message(to_state_dict, params, TRANSFORMER)
    assert "missing: head/kernel (128, 64)" in text
