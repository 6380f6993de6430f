"""Commands that succeed: what they print and write."""

import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from checks import assert_same_state
from PIL import Image
from safetensors.numpy import load_file

from amskv_jax import configs
from amskv_jax.checkpoints.folder import load_checkpoint, read_info
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.policies import AMSKV, Sink
from amskv_jax.testing import SCHEDULE, TINY_VAR


def table_row(out, name):
    """The words of the last row of a printed table that starts with ``name``."""
    lines = [line.strip() for line in out.splitlines()]
    rows = [line for line in lines if line.startswith(f"{name}  ")]
    return rows[-1].removeprefix(name).split()


def size_of(out, name):
    """The size in the memory table's row of that name."""
    return " ".join(table_row(out, name)[:2])


# Convert, export, init, info


def test_convert_and_export_are_inverse(amskv, files, transformer, tokenizer, tmp_path):
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    arguments = ("--transformer", files[0], "--tokenizer", files[1], "--out", checkpoint)
    done = amskv("convert", "var", *arguments)
    assert (done.code, done.out, done.err) == (0, f"wrote {checkpoint}\n", "")
    done = amskv("export", "--checkpoint", checkpoint, "--out", exported)
    assert (done.code, done.out, done.err) == (0, f"wrote {exported}\n", "")
    assert_same_state(load_file(exported / "transformer.safetensors"), transformer)
    assert_same_state(load_file(exported / "tokenizer.safetensors"), tokenizer)


def test_convert_takes_type_and_schedule(amskv, write, transformer, tokenizer, tmp_path):
    stripped = {key: value for key, value in transformer.items() if key != "lvl_1L"}
    arguments = ("--transformer", write(stripped, "a"), "--tokenizer", write(tokenizer, "b"))
    options = ("--patch-nums", "1,2,3", "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert amskv("convert", "var", *arguments, *options).code == 0
    info = read_info(tmp_path / "out")
    assert info.dtype == "bfloat16"
    assert info.configs["transformer"].schedule == SCHEDULE


def test_init_draws_the_same_weights_from_the_same_seed(amskv, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = amskv("init", "--model", "var-tiny", "--seed", seed, "--out", tmp_path / name)
        assert (done.code, done.out) == (0, f"wrote {tmp_path / name}\n")
    a, b, c = (load_checkpoint(tmp_path / name) for name in "abc")
    assert a.info.configs["transformer"] == configs.get("var-tiny").model.transformer
    chex.assert_trees_all_equal(a.params, b.params)
    assert a.info.fingerprint == b.info.fingerprint != c.info.fingerprint

    done = amskv("info", "--checkpoint", tmp_path / "a")
    assert (done.code, done.err) == (0, "")
    for expected in (
        "var-tiny",
        "float32",
        a.info.fingerprint,
        "1, 2, 3, 4 (30 tokens)",
        "64 x 64 pixels, 10 classes",
        "0.64 M parameters: depth 2, width 128",
    ):
        assert expected in done.out


def test_info_of_a_model_without_name(amskv, checkpoint):
    assert "no known model" in amskv("info", "--checkpoint", checkpoint).out


# Plan


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("var-d30", ("28.02 GiB", "18.68 GiB", "11.65 GiB", "6.28 GiB")),
        ("var-d36", ("132.89 GiB", "88.59 GiB", "48.09 GiB", "29.48 GiB")),
    ],
)
def test_plan_says_what_the_published_models_need(amskv, model, expected):
    done = amskv("plan", "--model", model, "--policy", "full", "--batch", 64)
    assert (done.code, done.err) == (0, "")
    rows = {
        "reference implementation": expected[0],
        "all 10 scales, bfloat16": expected[1],
        "last scale not stored": expected[2],
        "this plan": expected[2],
        "AMS-KV with its defaults": expected[3],
    }
    assert {name: size_of(done.out, name) for name in rows} == rows


def test_plan_shows_every_group_of_layers_at_every_step(amskv):
    policy = "ams:c_min=5,c_max=14,condensed=1,demanding_layers=1"
    done = amskv("plan", "--model", "var-tiny", "--policy", policy, "--dtype", "float32")
    assert done.code == 0
    assert "AMS-KV: C_min 5, C_max 14, condensed 1; demanding layers given: 1" in done.out
    lines = [line.split() for line in done.out.splitlines()]
    assert ["0", "5", "0", "1", "5", "5"] in lines  # layer, slots, tokens at every step
    assert ["1", "14", "0", "1", "5", "14"] in lines
    assert "for 1 picture, with guidance" in done.out


def test_plan_says_that_its_demanding_layers_are_no_measurement(amskv):
    done = amskv("plan", "--model", "var-d30", "--policy", "ams")
    assert "the first third, by default and not by measurement" in done.out


def test_plans_are_saved_read_again_and_drawn(amskv, checkpoint, tmp_path):
    path, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    made = ("--policy", "sink:sink=1,window=3")
    arguments = ("--checkpoint", checkpoint, *made, "--save", path, "--plot", plot)
    done = amskv("plan", *arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"wrote {path}\nwrote {plot}\n")
    plan = RetentionPlan.load(path)
    assert plan == Sink(1, 3).plan(TINY_VAR.transformer.cache_shape)
    with Image.open(plot) as image:
        assert min(image.size) > 500

    again = amskv("plan", "--checkpoint", checkpoint, "--plan", path)
    assert again.code == 0
    assert table_row(again.out, "0-2") == table_row(done.out, "0-2")
    assert {file.name for file in tmp_path.iterdir()} == {"plan.json", "plan.png"}


# Sample

DRAWN = ("--policy", "ams", "--top-k", 20, "--top-p", 0.8)
"""Several tests share these options, so that the program is compiled once."""


@pytest.fixture
def sample(amskv, checkpoint, tmp_path):
    """Sample classes 3 and 7; return what was printed, and the saved arrays."""

    def sample(*options, labels="3,7"):
        paths = ("--out", tmp_path / "sheet.png", "--save-tokens", tmp_path / "tokens.npz")
        fixed = ("--checkpoint", checkpoint, "--labels", labels, *paths, "--force")
        done = amskv("sample", *fixed, *options)
        assert (done.code, done.err) == (0, "")
        with np.load(tmp_path / "tokens.npz") as saved:
            return done, dict(saved)

    return sample


def test_sample_writes_pictures_and_tokens_and_says_what_it_took(sample, tmp_path):
    done, saved = sample(*DRAWN, "--seed", 5, labels="3,7-8")
    assert saved["tokens"].dtype == np.int32
    assert saved["tokens"].shape == (3, SCHEDULE.total)
    assert saved["tokens"].min() >= 0
    assert saved["tokens"].max() < TINY_VAR.transformer.vocab_size
    assert saved["labels"].tolist() == [3, 7, 8]
    assert saved["seed"] == 5
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 2 * 128  # two rows and two columns of enlarged pictures
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.png", "tokens.npz"}
    for expected in (
        "AMS-KV: C_min",
        "for 3 pictures, with guidance",
        "reference implementation",
        "float32 on cpu (cpu), attention xla",
        "compiled in",
        "3 pictures in",
        f"wrote {tmp_path / 'sheet.png'}",
    ):
        assert expected in done.out


def test_sample_is_the_pipeline(sample, checkpoint):
    import amskv_jax as amskv

    _, saved = sample(*DRAWN, "--seed", 2, "--cfg", 3)
    options = {"cfg": 3.0, "top_k": 20, "top_p": 0.8, "policy": AMSKV()}
    expected = amskv.load(checkpoint).sample([3, 7], key=jax.random.key(2), **options)
    np.testing.assert_array_equal(saved["tokens"], expected.tokens)


def test_greedy_sampling_does_not_depend_on_the_seed(sample):
    greedy = [sample("--top-k", 1, "--seed", seed)[1]["tokens"] for seed in (0, 1)]
    np.testing.assert_array_equal(*greedy)
    drawn = [sample(*DRAWN, "--seed", seed)[1]["tokens"] for seed in (0, 1)]
    assert (drawn[0] != drawn[1]).any()


def test_the_size_of_batches_changes_nothing(sample):
    _, saved = sample(*DRAWN, "--num-per-label", 2, "--batch-size", 3)
    assert saved["labels"].tolist() == [3, 3, 7, 7]
    assert (saved["tokens"][0] != saved["tokens"][1]).any()
    _, again = sample(*DRAWN, "--num-per-label", 2, "--batch-size", 2)
    np.testing.assert_array_equal(saved["tokens"], again["tokens"])


def test_a_plan_file_does_what_its_policy_does(amskv, sample, checkpoint, tmp_path):
    options = ("--policy", "window:window=2")
    path = tmp_path / "plan.json"
    assert amskv("plan", "--checkpoint", checkpoint, *options, "--save", path).code == 0
    _, from_policy = sample(*options, "--top-k", 1)
    _, from_file = sample("--plan", path, "--top-k", 1)
    np.testing.assert_array_equal(from_file["tokens"], from_policy["tokens"])


def test_sampling_in_bfloat16_halves_the_cache(amskv, sample, checkpoint):
    done, saved = sample("--dtype", "bfloat16", "--top-k", 1)
    assert saved["tokens"].shape == (2, SCHEDULE.total)
    assert "bfloat16 on cpu" in done.out
    options = ("--checkpoint", checkpoint, "--batch", 2, "--dtype", "float32")
    whole = float(size_of(amskv("plan", *options).out, "this plan").split()[0])
    assert float(size_of(done.out, "this plan").split()[0]) == whole / 2


# The command line itself


def test_help_names_every_command_policy_and_paper(amskv):
    out = amskv("--help").out
    for command in ("bench", "convert", "export", "info", "init", "plan", "sample"):
        assert f" {command} " in out
    out = amskv("plan", "--help").out
    for text in ("full:", "ams:", "2511.16047", "window:", "sink:", "2309.17453", "explicit:"):
        assert text in out


def test_every_option_is_documented():
    import typer

    from amskv_jax.cli import app

    def commands(group):
        for command in group.commands.values():
            yield from commands(command) if hasattr(command, "commands") else [command]

    for command in commands(typer.main.get_command(app)):
        assert command.help or command.callback.__doc__, command.name
        for parameter in command.params:
            assert parameter.help, f"{command.name}: {parameter.name}"


def test_plan_json_is_plain(amskv, tmp_path):
    amskv("plan", "--model", "var-tiny", "--save", tmp_path / "plan.json")
    keep = json.loads((tmp_path / "plan.json").read_text())["keep"]
    assert keep == [[[], [0], [0, 1], [0, 1, 2]]] * 2


def test_compiled_programs_are_kept_unless_the_user_says_where(monkeypatch):
    from amskv_jax.cli.compilation_cache import use_compilation_cache

    def folder_after(before):
        jax.config.update("jax_compilation_cache_dir", before)
        use_compilation_cache()
        return jax.config.jax_compilation_cache_dir

    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert folder_after(None) == "/caches/amskv_jax"
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
        assert folder_after("/own") == "/own"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert folder_after(None) == str(Path.home() / ".cache" / "amskv_jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
