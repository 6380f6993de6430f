"""What cannot be drawn by Infinity: one clear message each, and nothing written."""

from dataclasses import replace

import numpy as np
import pytest
from infinity_checkpoints import (
    MODEL,
    TOKENIZER,
    TRANSFORMER,
    save_sources,
    save_tokenizer_weights,
    save_transformer,
)
from safetensors.numpy import load_file, save_file

from amskv_jax.checkpoints.folder import read_info
from amskv_jax.convert import convert
from amskv_jax.text import TextFeatures, read_features, write_features

FOX = ("--prompt", "a red fox in the snow")
SMALL = ("--size", "0.06M")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The reference's files by part; not to be changed."""
    return save_sources(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def place(published, tmp_path_factory):
    """A checkpoint with its text encoder; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    convert("infinity", published, folder)
    return folder


@pytest.fixture
def refused(amskv, tmp_path):
    """Run a command that must fail; its message must say what is expected."""

    def refused(code, *arguments, expect):
        before = sorted(tmp_path.rglob("*"))
        done = amskv(*arguments)
        assert done.code == code, done
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        assert expect in done.err
        assert "wrote" not in done.out
        assert sorted(tmp_path.rglob("*")) == before

    return refused


@pytest.fixture
def sample(refused, place, tmp_path):
    def sample(code, *options, expect, checkpoint=place):
        fixed = ("--checkpoint", checkpoint, "--out", tmp_path / "sheet.png")
        refused(code, "sample", *fixed, *options, expect=expect)

    return sample


@pytest.fixture
def features(tmp_path):
    """Write features of one prompt of three tokens, and return the options that name them."""

    def features(width=TRANSFORMER.text_channels, encoder=""):
        made = np.ones((3, width), np.float32)
        write_features(tmp_path / "text.npz", TextFeatures(made, np.array([3]), encoder=encoder))
        return ("--text-features", tmp_path / "text.npz")

    return features


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--prompt", " "), "prompt 0 is empty"),
        ((*FOX, "--prompt", ""), "prompt 1 is empty"),
        ((*FOX, "--negative-prompt", ""), "negative prompt 0 is empty"),
        ((*FOX, *2 * ("--negative-prompt", "sea")), "2 negative prompts for 1 prompts"),
        (("--negative-prompt", "sea"), "--negative-prompt needs --prompt or --prompts"),
        ((), "nothing to draw: give --prompt, --prompts or --text-features"),
        (("--labels", "1"), "the model draws prompts, not classes: leave out --labels"),
        ((*FOX, "--labels", "1"), "not --labels and --prompt"),
        ((*FOX, "--aspect", "5:1"), "unknown aspect ratio '5:1': expected width:height, or height"),
        ((*FOX, "--aspect", "5:1"), "of 1:1 (1.0), "),
        ((*FOX, "--aspect", "wide"), "unknown aspect ratio 'wide'"),
        ((*FOX, "--size", "2M"), "unknown size '2M': expected one of 0.06M, 0.25M, 0.60M, 1M"),
        ((*FOX, *SMALL, "--cfg", "1,2"), "cfg has 2 numbers: expected one, or one for each of the"),
        ((*FOX, *SMALL, "--tau", "1,2,3"), "tau has 3 numbers: expected one, or one for each of t"),
        ((*FOX, *SMALL, "--tau", "0"), "tau must be positive, not 0"),
        ((*FOX, "--cfg", "much"), "--cfg 'much': expected a number, or one for every scale"),
        ((*FOX, "--guide", "logits,-7"), "guidance cannot act at -7: expected 0 (on the logits)"),
        ((*FOX, "--guide", "logits,4"), "--guide 'logits,4': expected logits, or -n as in -4"),
    ],
)
def test_what_can_never_work(sample, options, expected):
    sample(2, *options, expect=expected)


def test_features_that_do_not_fit(sample, features, tmp_path):
    other = "features were made by another text encoder than the checkpoint's"
    sample(1, *features(encoder="5" * 32), expect=other)
    sample(2, *features(width=50), expect="shape (3, 50), expected (tokens, 48)")
    (tmp_path / "text.npz").write_bytes(b"no features")
    sample(1, "--text-features", tmp_path / "text.npz", expect="text.npz holds no text features")
    missing = "cannot read the text features no.npz"
    sample(1, "--text-features", "no.npz", expect=missing)
    sample(1, "--prompts", tmp_path / "text.txt", expect="text.txt cannot be read: No such file")


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 5, 4), (5, 8)])
def test_forced_codes_of_another_schedule(sample, tmp_path, shape):
    np.savez(tmp_path / "codes.npz", codes=np.zeros(shape, np.uint8))
    codes = ("--forced-codes", tmp_path / "codes.npz")
    expected = f"codes have shape {shape}" if len(shape) == 3 else f"codes of shape {shape}"
    sample(1, *FOX, *SMALL, *codes, expect=expected)


def test_forced_codes_must_be_bits(sample, tmp_path):
    np.savez(tmp_path / "codes.npz", codes=np.full((1, 5, 8), 2, np.uint8))
    codes = ("--forced-codes", tmp_path / "codes.npz")
    sample(1, *FOX, *SMALL, *codes, expect="expected bits, zeros and ones")


def test_models_of_the_other_kind(amskv, checkpoint, sample, tmp_path):
    expected = "the model draws classes, not prompts: leave out --prompt"
    sample(2, *FOX, checkpoint=checkpoint, expect=expected)
    sample(
        2, "--labels", "0", *SMALL, checkpoint=checkpoint, expect="pictures of 6 x 6 pixels alone"
    )
    done = amskv("encode", "--checkpoint", checkpoint, "--prompts", "a", "--out", "b.npz")
    assert (done.code, done.out) == (1, "")


def test_checkpoints_without_a_text_encoder(sample, refused, published, tmp_path):
    sources = {part: published[part] for part in ("transformer", "tokenizer")}
    convert("infinity", sources, tmp_path / "without")
    expected = "holds no text encoder: convert it again with --text-encoder, or give the features"
    sample(1, *FOX, checkpoint=tmp_path / "without", expect=expected)
    (tmp_path / "prompts.txt").write_text("a fox")
    options = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "text.npz")
    refused(1, "encode", "--checkpoint", tmp_path / "without", *options, expect=expected)


def test_a_prompt_that_is_too_long_is_cut_and_the_line_says_where(amskv, place, tmp_path):
    (tmp_path / "prompts.txt").write_text("the sea\n" + "bird " * 510 + "fox in the snow\n")
    options = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "text.npz")
    done = amskv("encode", "--checkpoint", place, *options)
    assert done.code == 0
    assert done.err == (
        'warning: prompt 1 ("bird bird bird bird bird bird bird bird...") has 515 tokens, at most '
        '512 are used: it is cut after "...bird bird bird bird bird fox"\n'
    )
    assert read_features(tmp_path / "text.npz").lengths.tolist() == [3, 512]


def test_what_does_not_belong_together(refused, published, tmp_path):
    other = save_tokenizer_weights(tmp_path / "vae.safetensors", replace(TOKENIZER, codebook_dim=4))
    wide = save_transformer(tmp_path / "wide.safetensors", replace(TRANSFORMER, text_channels=64))

    def refuse(expect, code=1, **changed):
        files = published | changed
        named = [x for part, path in files.items() for x in (f"--{part.replace('_', '-')}", path)]
        refused(code, "convert", "infinity", *named, "--out", tmp_path / "out", expect=expect)

    refuse("the tokenizer has 4 bits per token, the transformer 8", tokenizer=other)
    refuse("features of 48 channels, the transformer takes 64", transformer=wide)
    refuse("holds an Infinity tokenizer, expected", transformer=published["tokenizer"])
    shards = tmp_path / "shards"
    shards.mkdir()
    save_file(load_file(published["transformer"]), shards / "a.safetensors")
    index = '{"weight_map": {"cfg_uncond": "a.safetensors", "pos_start": "b.safetensors"}}'
    (shards / "model.safetensors.index.json").write_text(index)
    refuse("shards lacks 1 of the 2 files with the weights: b.safetensors", transformer=shards)


def test_the_checkpoint_is_what_was_written(place):
    """Of these tests all are about one model, which is a whole one."""
    assert read_info(place).model == MODEL
