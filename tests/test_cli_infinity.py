"""Infinity on the command line and through the pipeline: from published files to pictures."""

import json

import jax
import numpy as np
import pytest
from infinity_checkpoints import (
    MODEL,
    golden_checkpoint,
    save_golden_features,
    save_sources,
)
from infinity_golden import load
from PIL import Image

import amskv_jax
from amskv_jax import configs
from amskv_jax.checkpoints.folder import read_info
from amskv_jax.convert import convert
from amskv_jax.models.infinity.prompts import TextFeatures
from amskv_jax.models.infinity.schedules import schedule_of
from amskv_jax.pipeline import load as load_pipeline
from amskv_jax.plan.stats import LayerStats

TOKENS = 521
"""Of a square picture of size 0.06M: 256 pixels."""

# The goldens


@pytest.fixture(scope="module")
def golden_of(tmp_path_factory):
    """Return a function from a golden's name to its checkpoint, description and arrays."""
    folder, made = tmp_path_factory.mktemp("golden"), {}

    def golden_of(name):
        description, arrays = load(name)
        kind = name.partition(".")[0]
        if kind not in made:
            made[kind] = golden_checkpoint(description, folder / kind)
        return made[kind], description, arrays

    return golden_of


@pytest.mark.parametrize(
    "name",
    [
        *(f"infinity_tiny.gen_{run}" for run in ("logits", "nocfg", "layer", "vary", "negative")),
        "infinity_tiny_sharp.gen_leak",
        "infinity_tiny_sharp.retain_per_layer",
        "infinity_tiny_wide.gen_logits",
        "infinity_tiny_patchify.gen_leak",
    ],
)
def test_the_references_labels_come_out_of_the_command_line(name, golden_of, amskv, tmp_path):
    checkpoint, description, golden = golden_of(name)
    run, model = description["run"], description["model"]
    features = save_golden_features(tmp_path / "text.npz", golden)
    options = ["--checkpoint", checkpoint, "--text-features", features, "--size", model["pn"]]
    options += ["--aspect", model["h_div_w"], "--top-k", 1, "--top-p", 0]
    options += ["--cfg", ",".join(map(str, run["cfg_list"]))]
    options += ["--tau", ",".join(map(str, run["tau_list"]))]
    places = (str(place) if place else "logits" for place in run["cfg_insertion_layer"])
    options += [f"--guide={','.join(places)}"]
    if "forced_bits_vae" in golden:
        np.savez(tmp_path / "codes.npz", codes=golden["forced_bits_vae"])
        options += ["--forced-codes", tmp_path / "codes.npz"]
    if "plan" in description:
        (tmp_path / "plan.json").write_text(json.dumps({"keep": description["plan"]}))
        options += ["--plan", tmp_path / "plan.json"]
    out = ("--out", tmp_path / "sheet.png", "--save-tokens", tmp_path / "tokens.npz")
    done = amskv("sample", *options, *out)
    assert (done.code, done.err) == (0, "")
    with np.load(tmp_path / "tokens.npz") as saved:
        assert saved["tokens"].dtype == np.uint8
        np.testing.assert_array_equal(saved["tokens"], golden["bits"])
        assert "labels" not in saved


def test_the_references_pictures_come_out_of_the_pipeline(golden_of):
    checkpoint, description, golden = golden_of("infinity_tiny.gen_logits")
    run = description["run"]
    pipe = load_pipeline(checkpoint)
    features = TextFeatures(golden["text_features"], golden["text_lens"])
    drawn = {"cfg": tuple(run["cfg_list"]), "tau": 1.0, "top_k": 1}
    out = pipe.sample(features, key=jax.random.key(0), aspect="1.0", size="0.06M", **drawn)
    np.testing.assert_array_equal(out.tokens, golden["bits"])
    reference = np.moveaxis(golden["decoded_sub"], 1, -1)
    found = 2 * np.asarray(out.pictures)[:, ::4, ::4] - 1
    np.testing.assert_allclose(found, reference, atol=5e-4)


# A checkpoint with its text encoder


SMALL = ("--size", "0.06M")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The reference's files of a tiny model by part; not to be changed."""
    return save_sources(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def place(sources, tmp_path_factory):
    """The tiny model's checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    convert("infinity", sources, folder)
    return folder


@pytest.fixture
def sample(amskv, place, tmp_path):
    """Draw at the smallest size; return what was printed, and the saved tokens."""

    def sample(*options):
        paths = ("--out", tmp_path / "sheet.png", "--save-tokens", tmp_path / "tokens.npz")
        fixed = ("--checkpoint", place, "--size", "0.06M", *paths, "--force")
        done = amskv("sample", *fixed, *options)
        assert (done.code, done.err) == (0, "")
        with np.load(tmp_path / "tokens.npz") as saved:
            return done, saved["tokens"]

    return sample


@pytest.fixture(scope="module")
def pipe(place):
    return load_pipeline(place)


GREEDY = ("--top-k", 1)
DRAWN = ("--top-k", 0, "--top-p", 0, "--tau", 1)
"""Greedy bits of random weights depend on little, these on everything."""
FOX, SEA = "a red fox in the snow", "the sea"
"""Prompts of one bucket; greedy, guided pictures of both share one program."""


def test_prompts_in_pictures_out(sample, pipe, tmp_path):
    done, tokens = sample("--prompt", FOX, "--prompt", SEA, *GREEDY)
    assert tokens.dtype == np.uint8
    assert tokens.shape == (2, TOKENS, 8)
    assert tokens.max() == 1
    assert (tokens[0] != tokens[1]).any()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 512  # two pictures of 256 pixels
    for expected in ("16x16", "for 2 pictures, with guidance", "texts of 64 tokens take 0.25 MiB"):
        assert expected in done.out

    out = pipe.sample([FOX, SEA], key=jax.random.key(5), size="0.06M", top_k=1)
    np.testing.assert_array_equal(tokens, out.tokens)

    (tmp_path / "prompts.txt").write_text(f"{FOX}\n\n{SEA}\n")
    _, from_file = sample("--prompts", tmp_path / "prompts.txt", *GREEDY, "--batch-size", 1)
    np.testing.assert_array_equal(tokens, from_file)


def test_features_do_what_their_prompts_do(sample, amskv, place, tmp_path):
    prompts, features = tmp_path / "prompts.txt", tmp_path / "text.npz"
    prompts.write_text(f"{FOX}\n{SEA}")
    away = ("--negative-prompt", "blue night")
    encode = ("encode", "--checkpoint", place, "--prompts", prompts, "--out", features)
    done = amskv(*encode, *away)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"wrote {features}: 2 prompts, 11 tokens\n"
    with np.load(features) as saved:
        assert saved["features"].shape == (11, 48)
        assert saved["negative_lengths"].tolist() == [3]
        assert saved["encoder"] == read_info(place).fingerprints["text_encoder"]

    _, from_prompts = sample("--prompts", prompts, *away, *GREEDY)
    _, from_features = sample("--text-features", features, *GREEDY)
    np.testing.assert_array_equal(from_features, from_prompts)
    _, plain = sample("--prompts", prompts, *GREEDY)
    assert (plain != from_prompts).any()


def test_ways_of_drawing(sample):
    """Of the same random numbers each makes other tokens; greedily, and guided on layers, above."""
    ways = {
        "plain": (),
        "per scale": ("--cfg", "4,4,4,4,4,4,1"),
        "hot": ("--tau", "1,1,1,1,1,1,3"),
        "nucleus": ("--top-p", 0.6),
        "another seed": ("--seed", 1),
    }
    drawn = {name: sample("--prompt", FOX, *DRAWN, *how)[1] for name, how in ways.items()}
    for name, tokens in drawn.items():
        for other, others in drawn.items():
            assert name == other or (tokens != others).any(), (name, other)
    before = slice(None), slice(TOKENS - 256)  # the last scale
    for name in ("per scale", "hot"):
        assert (drawn[name][before] != drawn["plain"][before]).mean() < 1e-3, name


def test_forced_codes_take_the_place_of_the_first_scales(sample, tmp_path):
    _, free = sample("--prompt", FOX, *GREEDY)
    codes = np.random.default_rng(0).integers(0, 2, (1, 5, 8)).astype(np.uint8)
    np.savez(tmp_path / "codes.npz", codes=codes)
    _, forced = sample("--prompt", FOX, *GREEDY, "--forced-codes", tmp_path / "codes.npz")
    np.testing.assert_array_equal(forced[:, :1], free[:, :1])  # as they were drawn
    assert (forced[:, 5:] != free[:, 5:]).any()
    np.savez(tmp_path / "codes.npz", codes=free[:, :5])
    _, same = sample("--prompt", FOX, *GREEDY, "--forced-codes", tmp_path / "codes.npz")
    np.testing.assert_array_equal(same, free)


def test_policies_and_plan_files(sample, amskv, place, tmp_path):
    path = tmp_path / "plan.json"
    _, full = sample("--prompt", FOX, *DRAWN)
    done, ams = sample("--prompt", FOX, *DRAWN, "--policy", "ams:saving=0.8")
    assert "saved of all 7 scales" in done.out
    options = ("--checkpoint", place, *SMALL, "--policy", "ams:saving=0.8")
    done = amskv("plan", *options, "--save", path)
    assert (done.code, done.err) == (0, "")
    _, again = sample("--prompt", FOX, *DRAWN, "--plan", path)
    np.testing.assert_array_equal(again, ams)
    assert (ams != full).any()


def test_other_shapes_from_the_same_checkpoint(sample, pipe, tmp_path):
    """By the command and in Python."""
    options = "--aspect", "16:9", "--policy", "scalekv:budget=60"
    _, tokens = sample("--prompt", FOX, *GREEDY, *options)
    schedule = schedule_of("16:9", "0.06M")
    assert tokens.shape == (1, schedule.total, 8)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height
    shape = {"aspect": "16:9", "size": "0.06M", "policy": amskv_jax.ScaleKV(60)}
    out = pipe.sample([FOX], key=jax.random.key(0), top_k=1, **shape)
    np.testing.assert_array_equal(out.tokens, tokens)
    height, width = schedule.grids[-1]
    assert out.pictures.shape == (1, 16 * height, 16 * width, 3)
    assert np.isfinite(out.pictures).all()
    assert pipe.schedule == MODEL.schedule  # a call changes nothing


def test_calibrate_analyze_and_info(amskv, place, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "prompts.txt").write_text(f"{FOX}\n{SEA}")
    out = tmp_path / "stats.npz"
    options = ("--prompts", tmp_path / "prompts.txt", *SMALL, "--samples", 3, "--batch-size", 2)
    done = amskv("calibrate", "--checkpoint", place, "--out", out, *options)
    assert (done.code, done.err) == (0, "")
    assert "3 pictures measured" in done.out
    stats = LayerStats.load(out, read_info(place).fingerprint)
    assert stats.schedule == schedule_of(size="0.06M")
    assert stats.settings["conditions"] == [FOX, SEA]
    np.testing.assert_allclose(stats.density.sum(-1), 1, atol=1e-5)

    planned = ("--checkpoint", place, *SMALL, "--stats", out)
    for policy in ("ams:saving=0.8", "heads:saving=0.8", "scalekv:saving=0.7,window=4"):
        done = amskv("plan", *planned, "--policy", policy)
        assert (done.code, done.err) == (0, "")
        assert "by default and not by measurement" not in done.out
    done = amskv("plan", "--checkpoint", place, "--stats", out, "--policy", "ams")  # at 1M
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "schedule" in done.err or "scales" in done.err

    done = amskv("analyze", "--stats", out, "--out", tmp_path / "analysis")
    assert (done.code, done.err) == (0, "")
    assert len(list((tmp_path / "analysis").glob("*.png"))) >= 3

    done = amskv("info", "--checkpoint", place)
    assert (done.code, done.err) == (0, "")
    for expected in ("infinity", "1024 x 1024 pixels, from text", "text_encoder", "depth 2"):
        assert expected in done.out


def test_eval_compares_with_the_full_cache(amskv, place, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{FOX}\n{SEA}")
    policies = ("--policies", "full,window:saving=0.9", "--num", 3, "--batch-size", 2)
    options = (*SMALL, "--features", "none", "--prompts", tmp_path / "prompts.txt", *policies)
    options += ("--cfg", "4,4,4,4,4,4,2", "--top-p", 0)
    done = amskv("eval", "--checkpoint", place, "--out", tmp_path / "out", *options)
    assert (done.code, done.err) == (0, "")
    full, window = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (full["name"], full.get("psnr")) == ("full", None)
    assert window["psnr"] > 5
    assert 0 < window["ssim"] < 1
    with np.load(tmp_path / "out" / "full.npz") as pictures:
        assert pictures["arr_0"].shape == (3, 256, 256, 3)
        assert pictures.files == ["arr_0"]  # texts have no classes
    assert amskv("eval", "--checkpoint", place, "--out", tmp_path / "out", *options).out == done.out


def test_bench_with_random_weights(amskv, monkeypatch, tmp_path):
    known = configs.ModelConfig("infinity-tiny", "tiny", MODEL)
    monkeypatch.setattr(configs, "get", lambda name: known)
    options = ("--policies", "window:saving=0.9", "--repeats", 1, "--dtype", "float32")
    save = ("--save", tmp_path / "bench.json")
    done = amskv("bench", "--model", "infinity-tiny", *SMALL, *options, *save)
    assert (done.code, done.err) == (0, "")
    arms = json.loads((tmp_path / "bench.json").read_text())["arms"]
    assert list(arms) == ["window:saving=0.9"]
    assert all(arm["pictures_per_second"] > 0 for arm in arms.values())
