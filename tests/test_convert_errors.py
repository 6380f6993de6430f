"""Files that cannot be converted: one message each, and nothing half-written."""

import numpy as np
import pytest
from checks import message, to_torch
from flax.traverse_util import flatten_dict
from reference_weights import recipe_state

from amskv_jax.checkpoints import writer
from amskv_jax.convert import convert_var, export_checkpoint, to_params, to_state_dict, var, vqvae
from amskv_jax.convert.write import SafetensorsWriter
from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.testing import SCHEDULE, TOKENIZER, TRANSFORMER, VQVAE_FIELDS


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
    assert "out exists" in message(export_checkpoint, tmp_path / "checkpoint", out)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_disk_error_while_exporting(files, tmp_path, monkeypatch):
    convert_var(*files, tmp_path / "checkpoint")
    written = []

    write = SafetensorsWriter.write

    def fail_at_the_third(self, key, value):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(key)
        write(self, key, value)

    monkeypatch.setattr(SafetensorsWriter, "write", fail_at_the_third)
    before = sorted(tmp_path.rglob("*"))
    text = message(export_checkpoint, tmp_path / "checkpoint", tmp_path / "out")
    assert "cannot write" in text
    assert "No space left on device" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_disk_error_while_converting(files, tmp_path, monkeypatch):
    def fail(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_text", fail)
    assert_refused(files, tmp_path, "cannot write", "No space left on device")


def test_parameters_that_do_not_fit_are_not_exported(transformer):
    params = to_params(transformer, TRANSFORMER)
    del params["head"]
    flat = flatten_dict(params, sep="/")
    assert "head/bias" not in flat
    text = message(to_state_dict, params, TRANSFORMER)
    assert "missing: head/kernel (128, 64)" in text
