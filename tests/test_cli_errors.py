"""Commands that fail: exit code 2 for what can never work, else 1; one message; nothing written."""

import json
import shutil

import jax
import numpy as np
import pytest
from made_stats import cache_shape
from PIL import Image
from reference_weights import recipe_state

from amskv_jax.checkpoints import writer
from amskv_jax.cli.options import MAX_SEED, parse_seeds
from amskv_jax.errors import UsageError
from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.policies import Full
from amskv_jax.testing import SCHEDULE, VQVAE_FIELDS


@pytest.fixture
def refused(amskv, tmp_path):
    """Run a command that must fail, and check how."""

    def refused(code, *arguments, expect):
        before = sorted(tmp_path.rglob("*"))
        done = amskv(*arguments)
        assert done.code == code, done
        assert "wrote" not in done.out
        assert sorted(tmp_path.rglob("*")) == before
        if code == 1 or done.err.startswith("error"):
            assert done.err.startswith("error: ")
            assert done.err.count("error:") == 1
            assert "Traceback" not in done.err
        assert expect in " ".join(done.err.replace("│", " ").split())
        return done

    return refused


# Convert


@pytest.fixture
def convert(refused, files, tmp_path):
    def convert(code, *options, transformer=files[0], tokenizer=files[1], expect):
        paths = ("--transformer", transformer, "--tokenizer", tokenizer, "--out", tmp_path / "out")
        return refused(code, "convert", "var", *paths, *options, expect=expect)

    return convert


def test_convert_truncated_file(convert, files):
    files[0].write_bytes(files[0].read_bytes()[:-1000])
    convert(1, expect="transformer.safetensors is truncated")


def test_convert_truncated_pth(convert, torch, tmp_path):
    path = tmp_path / "var.pth"
    torch.save({"pos_1LC": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:300])
    convert(1, transformer=path, expect="var.pth cannot be read: it is truncated")


def test_convert_wrong_architecture(convert, files):
    convert(1, transformer=files[1], expect="holds a VAR tokenizer, expected a VAR transformer")


def test_convert_transposed_matrix(convert, write, transformer):
    key = "blocks.1.ffn.fc1.weight"
    path = write(transformer | {key: transformer[key].T}, "wrong")
    convert(
        1, transformer=path, expect=f"wrong shape: {key}, expected (512, 128), found (128, 512)"
    )


def test_convert_missing_and_extra_keys(convert, write, transformer):
    wrong = transformer | {"blocks.0.attn.k_bias": np.zeros(128, np.float32)}
    del wrong["head.weight"]
    done = convert(1, transformer=write(wrong, "wrong"), expect="missing: head.weight (64, 128)")
    assert "unexpected: blocks.0.attn.k_bias (128,)" in done.err


def test_convert_tokenizer_of_another_model(convert, write):
    path = write(recipe_state(VQVAEConfig(**(VQVAE_FIELDS | {"vocab_size": 32}))), "other")
    convert(1, tokenizer=path, expect="do not belong together")


def test_convert_into_a_folder_that_exists(convert, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    convert(1, expect="out exists: remove it, or choose another output folder")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_convert_onto_a_full_disk(convert, monkeypatch):
    def fail(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_text", fail)
    convert(1, expect="No space left on device")


def test_convert_usage(convert, refused, tmp_path):
    convert(2, "--patch-nums", "1,two", expect="--patch-nums '1,two': expected numbers and ranges")
    convert(2, "--dtype", "float16", expect="'float16' is not one of 'float32', 'bfloat16'")
    convert(1, transformer=tmp_path / "no.pth", expect="no.pth does not exist")
    refused(2, "convert", "var", "--out", tmp_path / "out", expect="Missing option '--transformer'")


# Sample


@pytest.fixture
def sample(refused, checkpoint, tmp_path):
    def sample(code, *options, labels="0", out=tmp_path / "sheet.png", expect):
        fixed = ("--checkpoint", checkpoint, "--labels", labels, "--out", out)
        return refused(code, "sample", *fixed, *options, expect=expect)

    return sample


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("1000", "unknown label 1000: the model has classes 0-9"),
        ("-1", "unknown label -1: the model has classes 0-9"),
        ("3,10,11", "unknown label 10, 11"),
        ("", "--labels '': expected numbers and ranges such as 207,360"),
        (",", "--labels ',': expected"),
        ("cat", "--labels 'cat': expected"),
        ("5-3", "the range 5-3 is empty"),
        ("0-99999999999", "the range 0-99999999999 has more than 1000000 numbers"),
        ("1" * 20, f"unknown label {'1' * 20}: the model has classes 0-9"),
        ("1" * 5000, "expected numbers and ranges"),
    ],
)
def test_sample_labels(sample, labels, expected):
    assert sample(2, labels=labels, expect=expected).out == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--policy", "best"), "unknown policy 'best': expected full, ams"),
        (("--policy", "ams:c_min=9,c_max=5"), "C_max (5 tokens) is below C_min (9)"),
        (("--policy", "window:c_min=9"), "the policy window has no option 'c_min'; window has"),
        (("--policy", "explicit"), "the policy explicit needs path"),
        (("--policy", "full", "--plan", "plan.json"), "give either --policy or --plan"),
        (("--policy", "window:window=-1"), "window must be 0 or more"),
        (("--policy", "ams:demanding_layers=x"), "demanding_layers 'x': expected numbers"),
        (("--compare", "full,best"), "unknown policy 'best'"),
        (("--seed", str(2**70)), "4294967295"),
        (("--top-p", "1.5"), "'--top-p'"),
        (("--batch-size", "0"), "'--batch-size'"),
        (("--save-tokens", "tokens.txt"), "tokens.txt is of an unknown type: expected .npz"),
    ],
)
def test_sample_options_that_can_never_work(sample, options, expected):
    sample(2, *options, expect=expected)


def test_sample_policies_that_do_not_fit_the_model(sample):
    expected = "demanding layers [7]: the model has layers 0-2"
    sample(1, "--policy", "ams:demanding_layers=0+7", expect=expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            Full().plan(cache_shape(SCHEDULE, 4)).to_json(),
            "plan has 4 layers, the model 3",
        ),
        (json.dumps({"keep": [[[], [], [0]]] * 3}), "tokens 0:1 of scale 0, which were dropped"),
        ("{", "this is no retention plan"),
        (f'{{"keep": {"[" * 2000}{"]" * 2000}}}', "retention plan: expected"),
    ],
    ids=["another depth", "revived scale", "damaged", "nested too deep"],
)
def test_sample_plans(sample, tmp_path, content, expected):
    path = tmp_path / "plan.json"
    path.write_text(content)
    done = sample(1, "--plan", path, expect=expected)
    assert str(path) in done.err


def test_sample_files_that_are_in_the_way(sample, tmp_path):
    sample(2, out=tmp_path / "sheet.txt", expect="sheet.txt is of an unknown type: expected .jp")
    sample(1, out=tmp_path / "no" / "sheet.png", expect="does not exist: make it first")
    (tmp_path / "sheet.png").write_text("mine")
    sample(1, expect="sheet.png exists: choose another name, or replace it with --force")
    assert (tmp_path / "sheet.png").read_text() == "mine"
    (tmp_path / "folder.png").mkdir()
    sample(1, "--force", out=tmp_path / "folder.png", expect="folder.png is a folder")


def test_sample_onto_a_full_disk(sample, tmp_path, monkeypatch):
    def write_a_part_and_fail(image, path):
        path.write_bytes(b"0" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", write_a_part_and_fail)
    expected = f"cannot write {tmp_path / 'sheet.png'}: [Errno 28] No space left on device"
    sample(1, "--top-k", 1, labels="3,7", expect=expected)


def test_sample_from_what_is_no_checkpoint(refused, checkpoint, tmp_path):
    options = ("--labels", "0", "--out", tmp_path / "sheet.png")
    folder = tmp_path / "nowhere"
    refused(1, "sample", "--checkpoint", folder, *options, expect="nowhere is not a checkpoint")
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    shutil.rmtree(damaged / "params")
    expected = f"the weights in {damaged / 'params' / 'transformer'} cannot be read"
    refused(1, "sample", "--checkpoint", damaged, *options, expect=expected)


def test_out_of_memory_says_what_to_do(sample, monkeypatch):
    import jax

    from amskv_jax.generate import Sampler

    def lower(self, *arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Sampler, "lower", lower)
    sample(1, labels="0-2", expect="not enough memory for 3 pictures at once")


# Plan, export, info, init


def test_plan(refused, checkpoint, tmp_path, monkeypatch):
    refused(2, "plan", expect="give either --model or --checkpoint")
    both = ("--model", "var-tiny", "--checkpoint", checkpoint)
    refused(2, "plan", *both, expect="give either --model or --checkpoint")
    refused(2, "plan", "--model", "var-d99", expect="unknown model 'var-d99': expected one of ")
    options = ("--policy", "ams:c_min=9,c_max=5")
    refused(2, "plan", "--model", "var-d16", *options, expect="C_max (5 tokens) is below C_min (9)")
    options = ("--policy", "ams:c_min=4")
    refused(1, "plan", "--model", "var-d16", *options, expect="the 2 condensed scales need 5")
    refused(
        2, "plan", "--model", "var-d16", "--plot", "plan.gif", expect="plan.gif is of an unknown"
    )
    options = ("--model", "var-d16", "--stats", tmp_path / "no.npz", "--policy", "ams")
    refused(1, "plan", *options, expect="no.npz")

    (tmp_path / "plan.json").write_text("mine")
    save = ("--model", "var-tiny", "--save", tmp_path / "plan.json")
    refused(1, "plan", *save, expect="plan.json exists: choose another name")

    def write_a_part_and_fail(path, text, encoding):
        path.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", write_a_part_and_fail)
    refused(1, "plan", *save, "--force", expect="No space left on device")
    assert (tmp_path / "plan.json").read_text() == "mine"


def test_plan_for_other_scales(refused, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(Full().plan(cache_shape(SCHEDULE, 16)).to_json())
    expected = "was made for the scales 1, 2, 3; the model has 1, 2, 3, 4, 5"
    refused(1, "plan", "--model", "var-d16", "--plan", path, expect=expected)


def test_export(refused, checkpoint, tmp_path, monkeypatch):
    out = ("--out", tmp_path / "out")
    refused(1, "export", "--checkpoint", tmp_path, *out, expect="is not a checkpoint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    arguments = ("--checkpoint", checkpoint, "--out", tmp_path / "full")
    refused(1, "export", *arguments, expect="full exists")

    def fail(writer, key, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("amskv_jax.convert.write.SafetensorsWriter.write", fail)
    refused(1, "export", "--checkpoint", checkpoint, *out, expect="No space left on device")


def test_info(refused, tmp_path):
    refused(1, "info", "--checkpoint", tmp_path, expect="is not a checkpoint: config.json cannot")
    (tmp_path / "config.json").write_text("{")
    refused(1, "info", "--checkpoint", tmp_path, expect="config.json is damaged")


def test_init(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ("init", "--model", "small", "--out", tmp_path / "out")
    refused(2, *arguments, expect="unknown model 'small': expected one of ")
    arguments = ("init", "--model", "var-tiny", "--out", tmp_path)
    refused(1, *arguments, expect="exists: remove it, or choose another output folder")


# The command line itself


def test_unknown_command(refused):
    refused(2, "paint", expect="No such command 'paint'")


def test_errors_show_where_they_came_from_on_request(amskv, monkeypatch, tmp_path):
    import sys

    from amskv_jax.cli import main
    from amskv_jax.errors import AmskvError

    monkeypatch.setenv("AMSKV_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["amskv", "info", "--checkpoint", str(tmp_path)])
    with pytest.raises(AmskvError, match="is not a checkpoint"):
        main()


def test_seeds_are_those_that_jax_tells_apart():
    assert parse_seeds("0-2,4294967295", "--seeds") == (0, 1, 2, MAX_SEED)
    keys = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (0, MAX_SEED, 2**32)]
    assert keys[0] == keys[2] != keys[1]
    for text in ("1,4294967296", "-1"):
        with pytest.raises(UsageError, match="is no seed: expected 0 to 4294967295"):
            parse_seeds(text, "--seeds")
