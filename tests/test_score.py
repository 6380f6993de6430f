"""The score of a cache: how well real pictures are predicted with it."""

import json
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from checks import message, pack_pictures

import amskv_jax
from amskv_jax.checkpoints.initialize import init_checkpoint
from amskv_jax.drawing import Chosen
from amskv_jax.evaluation.score import Figure, encode, score
from amskv_jax.generate import picture_keys
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.infinity.prompts import TextFeatures
from amskv_jax.models.infinity.transformer import Infinity
from amskv_jax.policies import H2O, Full, Window
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.testing import SCHEDULE, TOKENIZER, TRANSFORMER
from amskv_jax.text import write_features
from amskv_jax.training.config import Optimization, Run, TransformerTraining
from amskv_jax.training.data import Pictures
from amskv_jax.training.tokens import tokenize
from amskv_jax.training.transformer import objective

COUNT, SIZE, TOTAL = 5, 6, SCHEDULE.total
LABELS = np.array([2, 9, 0, 0, 7], np.int32)
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return amskv_jax.load(checkpoint)


@pytest.fixture(scope="module")
def codes(pipe):
    return encode(pipe, PIXELS, batch=3)


@pytest.fixture(scope="module")
def plans(pipe):
    policies = {"full": Full(), "window": Window(2), "h2o": H2O(budget=3)}
    return {name: pipe.plan(policy) for name, policy in policies.items()}


@pytest.fixture(scope="module")
def scores(pipe, plans, codes):
    return score(pipe, plans, codes, pipe.conditions(LABELS), batch=3)


def test_codes_are_those_of_training(pipe, codes):
    pictures = Pictures(PIXELS, LABELS, tuple("abcdefghij"))
    tokens = tokenize(TOKENIZER, pipe.params["tokenizer"], pictures, copies=1)
    chex.assert_shape(codes, (COUNT, TOTAL))
    np.testing.assert_array_equal(codes, tokens.target[0])
    assert len(np.unique(codes)) > 10


def test_full_cache_gives_the_loss_of_the_trainer(pipe, codes, scores):
    run = Run(steps=1, batch_size=COUNT, dtype="float32")
    config = TransformerTraining(TRANSFORMER, TOKENIZER, Optimization(1e-3, 1), run)
    quantizer = {"params": pipe.params["tokenizer"]["quantizer"]}
    params = pipe.params["transformer"]
    loss, figures = objective(config, quantizer, params, LABELS, codes, codes)
    entropy = scores["full"].entropy
    assert entropy.total.mean == pytest.approx(float(loss), abs=1e-5)
    found = [scale.mean for scale in entropy.scales]
    np.testing.assert_allclose(found, figures["loss_per_scale"], atol=1e-5)
    assert loss > 1
    assert not scores["full"].above_full.values.any()
    assert not scores["full"].divergence.values.any()


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_figures_follow_from_the_samplers_logits(pipe, plans, codes, scores):
    drawing = Drawing(cfg=0.0, top_k=1)
    controls = pipe.controls(drawing, forced=codes)
    found = {}
    for name, plan in plans.items():
        sampler = pipe.sampler(plan, drawing, trace=True)
        keys = picture_keys(jax.random.key(0), COUNT)
        found[name] = log_softmax(sampler(pipe.params, LABELS, keys, controls).logits)
    full = found.pop("full")
    rows, tokens = np.arange(COUNT)[:, None], np.arange(TOTAL)
    for name, own in found.items():
        nats, nats_full = (-x[rows, tokens, codes] for x in (own, full))
        divergence = (np.exp(full) * (full - own)).sum(-1)
        for figure, expected in (
            (scores[name].entropy, nats),
            (scores[name].above_full, nats - nats_full),
            (scores[name].divergence, divergence),
        ):
            per_picture = expected.mean(1)
            assert figure.total.mean == pytest.approx(per_picture.mean(), abs=1e-5)
            error = per_picture.std(ddof=1) / np.sqrt(COUNT)
            assert figure.total.error == pytest.approx(error, abs=1e-5)
            for scale, own_scale in enumerate(figure.scales):
                part = expected[:, SCHEDULE.slice(scale)].mean(1)
                assert own_scale.mean == pytest.approx(part.mean(), abs=1e-5)
        assert divergence.mean() > 1e-4


def test_what_is_never_read_before_something_is_dropped_costs_nothing(scores):
    """Two tokens hold the first scale, so only the last scale can be predicted worse."""
    window = scores["window"]
    np.testing.assert_allclose(window.above_full.values[:, :2], 0, atol=1e-5)
    assert np.abs(window.above_full.values[:, 2]).max() > 1e-3
    assert (window.divergence.values > -1e-6).all()


def test_batches_and_neighbours_change_nothing(pipe, plans, codes, scores):
    window = {"window": plans["window"]}
    other = score(pipe, window, codes, pipe.conditions(LABELS), batch=2)
    assert other.keys() == window.keys()
    for figure in ("entropy", "above_full", "divergence"):
        one, two = (getattr(found["window"], figure).values for found in (scores, other))
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_bfloat16_sees_the_same_codes_and_nearly_the_same_loss(checkpoint, pipe, plans, codes):
    half = amskv_jax.load(checkpoint, "bfloat16")
    found = score(half, plans, codes, half.conditions(LABELS), batch=COUNT)
    exact = score(pipe, plans, codes, pipe.conditions(LABELS), batch=COUNT)
    for name in plans:
        total = found[name].entropy.total.mean
        assert total == pytest.approx(exact[name].entropy.total.mean, abs=0.05)
    assert (encode(half, PIXELS, COUNT) == codes).mean() > 0.5  # its weights are rounded


def test_coarser_numbers_cost_more_and_are_compared_with_the_full_cache_as_it_is(pipe, codes):
    caches = {
        name: replace(pipe.sampler(), cache_dtype=name) for name in ("float32", "int4", "int2")
    }
    found = score(pipe, caches, codes, pipe.conditions(LABELS), batch=COUNT)
    divergences = [own.divergence.total.mean for own in found.values()]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert 1e-5 < divergences[1] < divergences[2]
    plans = {"full": pipe.plan(Full())}
    coarse = replace(pipe, cache_dtype="int4")
    again = score(coarse, plans, codes, pipe.conditions(LABELS), batch=COUNT)
    chex.assert_trees_all_close(again["full"].record(), found["int4"].record(), atol=1e-6)


def test_units_and_errors():
    figure = Figure(np.array([[1.0, 3.0], [2.0, 4.0]]), (1, 3))
    assert figure.total == (pytest.approx(3.0), pytest.approx(0.5))
    assert [scale.mean for scale in figure.scales] == [1.5, 3.5]
    paired = figure.above(Figure(figure.values - 1, (1, 3)))
    assert paired.total == (pytest.approx(1.0), pytest.approx(0.0))
    assert figure.times(2.0).total == (pytest.approx(6.0), pytest.approx(1.0))


INFINITY = InfinityModel(
    InfinityConfig(2, 64, 2, 16, ScaleSchedule.square((1, 2, 4)), text_channels=64, text_maxlen=8),
    BSQConfig(4, 32, (1, 2), 1, patchify=True),
)
"""A token has 16 bits and 4 pixels: pictures of 16 pixels."""


@pytest.fixture(scope="module")
def infinity(tmp_path_factory):
    """A checkpoint with random weights."""
    directory = tmp_path_factory.mktemp("infinity") / "checkpoint"
    init_checkpoint(INFINITY, directory)
    return directory


@pytest.fixture(scope="module")
def captions():
    lengths = np.array([3, 8, 1])
    features = np.random.default_rng(4).standard_normal((12, 64)).astype(np.float32)
    return TextFeatures(features, lengths)


LARGE = np.random.default_rng(3).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)


def test_infinity_is_scored_in_bits_per_bit(infinity, captions):
    pipe = amskv_jax.load(infinity)
    codes = encode(pipe, LARGE, batch=2)
    chex.assert_shape(codes, (3, 21, 16))
    assert 0.1 < codes.mean() < 0.9
    _, tokenizer = INFINITY.bind(pipe.params, pipe.schedule, "float32")
    inputs = tokenizer.teacher_inputs(codes)
    conditions = pipe.conditions(captions)
    condition = conditions.batch(np.arange(3))
    transformer = Infinity(INFINITY.transformer, pipe.schedule)
    logits = transformer.apply({"params": pipe.params["transformer"]}, condition, inputs)
    chances = log_softmax(logits)
    nats = -np.take_along_axis(chances, codes[..., None].astype(int), -1)[..., 0].sum(-1)

    plans = {"full": pipe.plan(Full()), "window": pipe.plan(Window(2))}
    scores = score(pipe, plans, codes, conditions, batch=2)
    full = scores["full"]
    assert full.entropy.total.mean == pytest.approx(nats.mean(), abs=1e-4)
    per_bit = full.bits_per_code(full.entropy).total.mean
    assert per_bit == pytest.approx(nats.mean() / 16 / np.log(2), abs=1e-5)
    assert scores["window"].divergence.total.mean > 1e-5


def test_what_cannot_be_scored_is_refused(pipe, plans, codes):
    conditions = pipe.conditions(LABELS)

    def refusal(plans=plans, codes=codes, conditions=conditions, batch=2):
        return message(score, pipe, plans, codes, conditions, batch=batch)

    assert "no policies" in refusal({})
    assert "cannot score 1 pictures" in refusal(codes=codes[:1], conditions=pipe.conditions([1]))
    assert "cannot score 5 pictures, 0 at once" in refusal(batch=0)
    assert "5 conditions for 4 pictures" in refusal(codes=codes[:4])
    assert "have 13 tokens each, the model's scales 14" in refusal(codes=codes[:, :-1])
    other = Full().plan(replace(TRANSFORMER.cache_shape, schedule=ScaleSchedule.square((1, 2))))
    assert "the plan's scales are" in refusal({"other": other})
    foreign = replace(pipe.sampler(), dtype="bfloat16")
    assert "sampler of foreign is of another model or dtype" in refusal({"foreign": foreign})
    assert "not finite" in refusal(codes=np.full_like(codes, 64))
    said = message(encode, pipe, PIXELS[:, :4], 2)
    assert "pictures have shape (4, 6, 3), expected (height, width, channels) = (6, 6, 3)" in said
    assert "cannot encode 0 pictures" in message(encode, pipe, PIXELS[:0], 2)


def packed(path, pixels=PIXELS, classes="abcdefghij", labels=LABELS):
    return pack_pictures(path, pixels, classes, labels)


def test_command(amskv, checkpoint, scores, tmp_path):
    out = tmp_path / "score.json"
    given = ["--checkpoint", checkpoint, "--real", packed(tmp_path / "real.npz")]
    given += ["--policies", "window:window=2,h2o:budget=3", "--batch-size", 3, "--out", out]
    finished = amskv("score", *given)
    assert (finished.code, finished.err) == (0, "")
    written = json.loads(out.read_text())
    assert list(written["policies"]) == ["full", "window:window=2", "h2o:budget=3"]
    assert (written["pictures"], written["dtype"]) == (COUNT, "float32")
    for spelled, own in written["policies"].items():
        expected = scores[spelled.partition(":")[0]]
        chex.assert_trees_all_close(own["nats_per_token"], expected.entropy.record(), atol=1e-5)
        chex.assert_trees_all_close(own["divergence"], expected.divergence.record(), atol=1e-5)
        total = expected.entropy.total
        assert own["bits_per_token"]["mean"] == pytest.approx(total.mean / np.log(2), abs=1e-5)
        assert 0 < own["saving"] < 1
        assert f"{total.mean:.4f} ± {total.error:.4f}" in finished.out
        for scale in expected.above_full.scales:
            assert f"{scale.mean:.4f} ± {scale.error:.4f}" in finished.out
    assert "5 of 5 pictures" in finished.out
    assert "bits per code" not in finished.out
    assert "exists" in amskv("score", *given).err
    finished = amskv("score", *given, "--force", "--num", 2, "--cache-dtype", "float32,int4")
    assert "2 of 5 pictures" in finished.out
    coarse = json.loads(out.read_text())["policies"]
    assert list(coarse) == [
        "full",
        *(f"{p}{n}" for p in list(coarse)[1::2] for n in ("", ", int4")),
    ]
    assert coarse["window:window=2, int4"]["cache_bytes"] < coarse["window:window=2"]["cache_bytes"]
    assert not coarse["window:window=2"]["states_formats"]


def test_command_refuses_what_cannot_work(amskv, checkpoint, tmp_path):
    real = packed(tmp_path / "real.npz")
    few = packed(tmp_path / "few.npz", PIXELS[:3], "abcdefghijk")
    small = packed(tmp_path / "small.npz", PIXELS[:, :4])
    one = packed(tmp_path / "one.npz", PIXELS[:1])
    for changes, said in (
        ({"--real": small}, f"picture 0 of {small} is 4x6 pixels (height x width), expected"),
        ({"--real": few}, "the data has 11 classes, the model 10"),
        ({"--real": one}, "cannot score 1 pictures"),
        ({"--real": tmp_path / "no.npz"}, "no such file or folder"),
        ({"--policies": "full,lru"}, "unknown policy 'lru'"),
        ({"--cache-dtype": "int4,int5"}, "numbers cannot be cached as 'int5'"),
        ({"--policies": "heads"}, "needs the attention of a calibration run"),
        ({"--out": tmp_path / "score.txt"}, "expected .json"),
    ):
        options = {"--checkpoint": checkpoint, "--real": real, "--policies": "full", **changes}
        finished = amskv("score", *(word for pair in options.items() for word in pair))
        assert finished.code in (1, 2)
        assert said in " ".join(finished.err.split())
    cropped = amskv("score", "--checkpoint", checkpoint, "--real", small, "--crop")
    assert (cropped.code, cropped.err) == (0, "")


def test_command_takes_texts_of_models_that_draw_from_them(
    amskv, infinity, captions, checkpoint, tmp_path
):
    real = packed(tmp_path / "real.npz", LARGE, "a", 0 * LABELS)
    write_features(tmp_path / "captions.npz", captions)
    given = ["--checkpoint", infinity, "--real", real, "--policies", "window:window=2"]
    given += ["--out", tmp_path / "score.json", "--num", 2]
    finished = amskv("score", *given, "--text-features", tmp_path / "captions.npz")
    assert (finished.code, finished.err) == (0, "")
    assert "bits per code" in finished.out
    pipe = amskv_jax.load(infinity)
    pair = Chosen(pipe.conditions(captions), (0, 1))  # spread over three
    expected = score(pipe, {"full": pipe.plan(Full())}, encode(pipe, LARGE[:2], 2), pair, batch=2)
    found = json.loads((tmp_path / "score.json").read_text())["policies"]["full"]["nats_per_token"]
    chex.assert_trees_all_close(found, expected["full"].entropy.record(), atol=1e-4)

    given += ["--force"]
    assert "give --prompts or --text-features" in amskv("score", *given).err
    write_features(tmp_path / "one.npz", TextFeatures(captions.features[:3], np.array([3])))
    finished = amskv("score", *given, "--text-features", tmp_path / "one.npz")
    assert "there are 1 prompts for 3 pictures" in finished.err
    (tmp_path / "prompts.txt").write_text("a cat\n")
    given = ["--checkpoint", checkpoint, "--real", packed(tmp_path / "classes.npz")]
    finished = amskv("score", *given, "--prompts", tmp_path / "prompts.txt")
    assert (finished.code, "draws classes, not prompts" in finished.err) == (2, True)
