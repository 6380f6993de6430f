"""Prompts to features, and files of features."""

import dataclasses
import sys
import warnings
import zipfile

import chex
import jax
import numpy as np
import pytest
from checks import message
from t5_weights import NARROW, t5_params
from text_tokenizers import save_tokenizer

from amskv_jax.checkpoints.weights import fingerprint
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.models.t5 import T5Encoder
from amskv_jax.text import (
    PromptCutWarning,
    PromptTokenizer,
    TextEncoder,
    TextFeatures,
    read_features,
    read_prompts,
    write_features,
)
from amskv_jax.text.encoder import encode

PROMPTS = ["a red fox in the snow", "the sea", "A blue bird, " + 20 * "in the night "]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    save_tokenizer(folder / "tokenizer.json")
    return PromptTokenizer.read(folder)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    params = jax.device_put(t5_params(NARROW))
    return TextEncoder(NARROW, params, tokenizer, fingerprint(params), batch=4)


@pytest.fixture
def text():
    """Features of three prompts, of 2, 1 and 4 tokens."""
    features = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    return TextFeatures(features, np.array([2, 1, 4], np.int32))


def test_tokens_end_with_the_end_and_are_not_padded(tokenizer):
    red, sea, _ = tokenizer(PROMPTS)
    assert red == [3, 14, 4, 5, 6, 7, 8, 1]  # "▁", "a", then words
    assert sea == [7, 10, 1]
    assert tokenizer.end == 1
    assert tokenizer.size <= NARROW.vocab_size
    assert len(tokenizer([300 * " fox"])[0]) == 301
    # What has no token of its own is unknown, not left out.
    assert tokenizer(["fox 日本"])[0] == [5, 3, 2, 1]


def test_features_are_those_of_every_prompt_alone(encoder):
    found = encoder(PROMPTS)
    tokens = encoder.tokenizer(PROMPTS)
    assert found.lengths.tolist() == [len(ids) for ids in tokens]
    chex.assert_shape(found.features, (sum(found.lengths), NARROW.width))
    assert found.features.dtype == np.float32
    assert found.negative_features is None
    assert found.texts == tuple(PROMPTS)
    assert found.encoder == encoder.fingerprint
    apply = jax.jit(T5Encoder(NARROW).apply)
    for ids, features in zip(
        tokens, np.split(found.features, np.cumsum(found.lengths)[:-1]), strict=True
    ):
        alone = apply({"params": encoder.params}, np.array([ids]), np.ones((1, len(ids)), bool))
        np.testing.assert_allclose(features, alone[0], atol=2e-5)


def test_negative_prompts(encoder):
    plain = encoder(["the night", "the sea"])
    one = encoder(["a red fox", "a house"], "the sea")
    np.testing.assert_array_equal(one.negative_lengths, [3])
    np.testing.assert_allclose(one.negative_features, plain.features[-3:], atol=2e-5)
    each = encoder(["a red fox", "a house"], ["the night", "the sea"])
    np.testing.assert_array_equal(each.negative_lengths, plain.lengths)
    np.testing.assert_allclose(each.negative_features, plain.features, atol=2e-5)
    text = message(encoder, ["a house"], ["the night", "the sea"])
    assert "2 negative prompts for 1 prompts" in text
    assert "negative prompt 0 is empty" in message(encoder, "a house", "")


def test_programs_are_one_per_bucket_and_power_of_two(encoder):
    encoder(["the sea"])
    compiled = encode._cache_size()
    for prompt in ("a red fox in the snow", "bird " * 60):
        encoder([prompt])
    assert encode._cache_size() == compiled
    many = [f"{n} birds" for n in range(11)]  # 4, 4 and 3, which is padded to 4
    features = encoder(many)
    assert encode._cache_size() <= compiled + 1
    np.testing.assert_allclose(
        features.features[-features.lengths[-1] :], encoder(many[-1]).features, atol=2e-5
    )
    # Equal prompts are encoded once, and nothing comes out of order.
    twice = encoder(["the sea", 100 * " bird", "the sea"])
    assert twice.lengths.tolist() == [3, 101, 3]
    np.testing.assert_array_equal(twice.features[:3], twice.features[-3:])


def test_bfloat16_features_are_float32(encoder):
    rounded = dataclasses.replace(encoder, params=t5_params(NARROW, "bfloat16"), dtype="bfloat16")
    # The fingerprint holds for both.
    assert fingerprint(rounded.params) == encoder.fingerprint
    found, exact = rounded(PROMPTS).features, encoder(PROMPTS).features
    assert found.dtype == np.float32
    assert 1e-3 < np.abs(found - exact).mean() < 0.05


def test_long_prompts_are_cut_with_a_warning_that_says_where(encoder):
    kept = "red fox " * 255 + "house"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = encoder(["the sea", kept + " by the sea"])
        assert len(caught) == 1
        encoder([kept])  # the longest that fits
        assert len(caught) == 1
    assert caught[0].category is PromptCutWarning
    said = str(caught[0].message)
    assert said.startswith('prompt 1 ("red fox')
    assert "has 517 tokens, at most 512 are used" in said  # "by" has three
    assert said.endswith('cut after "...fox red fox red fox house"')
    assert found.lengths.tolist() == [3, 512]
    np.testing.assert_array_equal(
        encoder.tokenizer([kept])[0][-2:], [encoder.tokenizer(["house"])[0][0], 1]
    )
    # What was cut has no influence.
    np.testing.assert_allclose(found.features[3:], encoder([kept]).features, atol=2e-5)


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ([], "there is no prompt"),
        (["a fox", ""], "prompt 1 is empty"),
        ([" \n\t"], "prompt 0 is empty"),
        (["</s>"], "has no token"),
        (["a\ud800"], "no valid Unicode"),
        (["a", 3], "prompt 1 is of type int"),
    ],
)
def test_prompts_that_cannot_be_encoded(encoder, prompts, text):
    with pytest.raises(UsageError, match=text):
        encoder(prompts)


def test_tokenizers_that_do_not_fit(tokenizer, tmp_path, monkeypatch):
    assert "missing.json cannot be read" in message(PromptTokenizer.read, tmp_path / "missing.json")
    (tmp_path / "empty.json").write_text("{}")
    assert "empty.json cannot be read" in message(PromptTokenizer.read, tmp_path / "empty.json")
    assert "tokenizer.json cannot be read" in message(PromptTokenizer, b"\xff")
    endless = save_tokenizer(tmp_path / "endless.json", end=False)
    assert "puts no </s> at the end" in message(PromptTokenizer.read, endless)
    small = dataclasses.replace(NARROW, vocab_size=20)
    text = message(TextEncoder, small, {}, tokenizer)
    assert "they do not belong together" in text
    with pytest.raises(UsageError, match="batch of 0"):
        TextEncoder(NARROW, {}, tokenizer, batch=0)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it was not installed
    assert "pip install 'amskv-jax[text]'" in message(PromptTokenizer.read, endless)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red fox\r\n\n  the sea, 雪\u2028and snow \n".encode())
    assert read_prompts(path) == ["a red fox", "the sea, 雪\u2028and snow"]
    path.write_bytes(b"a fox\n\xff\n")
    assert "not UTF-8 text: see line 2" in message(read_prompts, path)
    path.write_text(" \n")
    assert "holds no prompt" in message(read_prompts, path)
    assert "cannot be read: No such file" in message(read_prompts, tmp_path / "missing.txt")


def test_files_give_back_what_was_written(encoder, tmp_path, text):
    path = tmp_path / "text.npz"
    found = encoder(["a red fox", "the sea, 雪"], "blue")
    for written in (text, found):
        write_features(path, written)
        read = read_features(path)
        for name in ("features", "lengths", "negative_features", "negative_lengths"):
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
        assert (read.texts, read.encoder) == (written.texts, written.encoder)
    assert list(tmp_path.iterdir()) == [path]
    with np.load(path) as content:
        assert content["encoder"].dtype.kind == "U"
        assert content["prompts"].tolist() == ["a red fox", "the sea, 雪"]
    assert read_features(path, encoder.fingerprint, NARROW.width).encoder == encoder.fingerprint


def test_files_by_hand_need_features_and_lengths_only(tmp_path, text):
    path = tmp_path / "text.npz"
    np.savez_compressed(path, features=text.features, lengths=[2, 1, 4], mine=[object is None])
    read = read_features(path, encoder="abc", channels=5)
    np.testing.assert_array_equal(read.features, text.features)
    assert (read.texts, read.encoder) == ((), "")


def test_features_of_another_encoder_or_width(tmp_path, text):
    path = tmp_path / "text.npz"
    write_features(path, text.replace(encoder="abc"))
    assert "features of another text encoder (fingerprint abc, expected def)" in message(
        read_features, path, "def"
    )
    assert "text features of 5 channels, the model takes 2048" in message(
        read_features, path, "abc", 2048
    )


BAD = {
    "features": [
        (lambda x: x.astype(np.float16), "features is float16 (7, 5), expected float32"),
        (lambda x: x[None], "features is float32 (1, 7, 5), expected float32 (sum of lengths"),
        (lambda x: x[:6], "lengths add up to 7, but features has 6 rows"),
        (lambda x: x[:, :0], "features is float32 (7, 0)"),
        (
            lambda x: np.where(np.arange(7)[:, None] == 3, np.float32(np.nan), x),
            "not finite, in prompt 2",
        ),
    ],
    "lengths": [
        (lambda x: x.astype(np.float32), "lengths is float32 (3,), expected whole numbers"),
        (lambda x: x[None], "lengths is int32 (1, 3), expected whole numbers"),
        (lambda x: np.array([3, 0, 4]), "lengths[1] is 0, expected 1 to 512 tokens"),
        (lambda x: np.array([2, 1, 513]), "lengths[2] is 513, expected 1 to 512"),
        (lambda x: np.array([2, 2**64 - 1, 4], np.uint64), "lengths[1] is 18446744073709551615"),
        (lambda x: None, "it has features, expected features and lengths"),
    ],
    "negative_lengths": [
        (lambda x: np.array([2, 5]), "negative_features has 2 texts of 5 channels, expected one"),
        (lambda x: None, "it has negative_features alone"),
    ],
    "negative_features": [
        (lambda x: x[:, :4], "has 1 texts of 4 channels, expected one or 3, of 5 channels"),
        (lambda x: x[:3], "negative_lengths add up to 7, but negative_features has 3 rows"),
        (lambda x: x * np.float32(np.inf), "negative_features has numbers that are not finite"),
    ],
    "prompts": [
        (lambda x: np.array(["a", "b"]), "prompts is <U1 (2,), expected 3 texts"),
        (lambda x: np.zeros(3), "prompts is float64 (3,), expected 3 texts"),
    ],
}


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [(name, change, expected) for name, cases in BAD.items() for change, expected in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_do_not_fit(name, change, expected, tmp_path, text):
    arrays = {"features": text.features, "lengths": text.lengths}
    if "negative" in name:
        arrays |= {"negative_features": text.features, "negative_lengths": np.array([7])}
    changed = change(arrays.get(name))
    arrays.pop(name, None)
    if changed is not None:
        arrays[name] = changed
    path = tmp_path / "text.npz"
    np.savez(path, **arrays)
    said = message(read_features, path)
    assert said.startswith(str(path))
    assert expected in said


def test_what_does_not_fit_is_not_written(tmp_path, text):
    path = tmp_path / "text.npz"
    wrong = text.replace(lengths=np.array([2, 1, 3]))
    assert f"cannot write {path}: lengths add up to 6" in message(write_features, path, wrong)
    lonely = text.replace(negative_lengths=np.array([1]))
    assert "it has negative_lengths alone" in message(write_features, path, lonely)
    captions = text.replace(texts=("a", "b"))
    assert "expected 3 texts" in message(write_features, path, captions)
    assert not list(tmp_path.iterdir())
    with pytest.raises(AmskvError, match="cannot write"):
        write_features(tmp_path / "no folder" / "text.npz", text)


def test_files_that_are_none(tmp_path, text):
    path = tmp_path / "text.npz"
    assert "cannot read the text features" in message(read_features, path)
    assert "cannot read the text features" in message(read_features, tmp_path)
    path.write_text("a red fox")
    assert "is no .npz file" in message(read_features, path)
    with path.open("wb") as file:
        np.save(file, text.features)
    assert "is no .npz file" in message(read_features, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    assert "holds no text features: it has readme" in message(read_features, path)
    np.savez(path, features=np.array([object()]), lengths=[1])
    assert "cannot read the text features" in message(read_features, path)

    write_features(path, text)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    assert "is no .npz file" in message(read_features, path)
    start = content.index(text.features.tobytes()[:8])
    content[start] ^= 1
    path.write_bytes(content)
    assert "cannot read the text features" in message(read_features, path)
