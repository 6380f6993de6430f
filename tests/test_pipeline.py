"""Loading and sampling from Python."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import amskv_jax
from amskv_jax.checkpoints.folder import read_info
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.decode import decode
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.generate import Sampler, picture_keys, program
from amskv_jax.models.guidance import Drawing
from amskv_jax.policies import AMSKV, Full, Sink, Window
from amskv_jax.sampling import TokenSampling
from amskv_jax.testing import SCHEDULE, TINY_VAR, TRANSFORMER

KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return amskv_jax.load(checkpoint)


def test_load_gives_what_was_saved(pipe, checkpoint):
    assert pipe.model == TINY_VAR
    assert (pipe.dtype, pipe.fingerprint) == ("float32", read_info(checkpoint).fingerprint)
    chex.assert_trees_all_equal(pipe.params, random_params(TINY_VAR))
    half = amskv_jax.load(checkpoint, "bfloat16")
    assert half.dtype == half.sampler().dtype == "bfloat16"
    assert half.params["transformer"]["head"]["kernel"].dtype == jnp.bfloat16


def test_sampling_gives_tokens_and_pictures(pipe):
    out = pipe.sample([2, 9], key=KEY, top_k=1)
    chex.assert_shape(out.tokens, (2, SCHEDULE.total))
    chex.assert_type(out.tokens, jnp.int32)
    chex.assert_shape(out.pictures, (2, 6, 6, 3))
    chex.assert_type(out.pictures, jnp.float32)
    pictures = np.asarray(out.pictures)
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_labels_may_be_any_sequence_and_do_not_compile_again(pipe):
    first = pipe.sample([2, 9], key=KEY, top_k=1)
    compiled = program("cpu")._cache_size()
    for labels in ((2, 9), np.array([2, 9], np.int64), jnp.array([2, 9])):
        out = pipe.sample(labels, key=jax.random.key(7), top_k=1, policy=Full())
        np.testing.assert_array_equal(out.tokens, first.tokens)
    pipe.sample([3, 3], key=KEY, top_k=1, cfg=4.0)
    assert program("cpu")._cache_size() == compiled


def test_the_functional_layer_alone_gives_the_same(pipe):
    """What the README shows: a plan, a sampler, weights, and no pipeline."""
    plan = AMSKV().plan(TRANSFORMER.cache_shape)
    sampler = Sampler(TINY_VAR, plan, sampling=TokenSampling(top_k=20, top_p=0.9))
    expected = pipe.sample([2, 9], key=KEY, policy=AMSKV(), top_k=20, top_p=0.9)
    controls = TINY_VAR.controls(SCHEDULE, Drawing(cfg=1.5))
    out = sampler(pipe.params, jnp.array([2, 9]), picture_keys(KEY, 2), controls)
    chex.assert_trees_all_equal(out.tokens, expected.tokens)
    pictures = decode(TINY_VAR, SCHEDULE, "float32", pipe.params, out.latent)
    chex.assert_trees_all_equal(pictures, expected.pictures)


@pytest.mark.parametrize("policy", [Full(), AMSKV(condensed=1), Window(4), Sink(1, 2)])
def test_policies_decide_what_the_sampler_keeps(pipe, policy):
    drawing = Drawing(top_k=5, top_p=0.5, more_smooth=True)
    sampler = pipe.sampler(policy, drawing, attention="xla")
    assert sampler.plan == policy.plan(TRANSFORMER.cache_shape)
    assert sampler.sampling == TokenSampling(5, 0.5, more_smooth=True)
    assert sampler.attention == "xla"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], "no labels given: expected at least one of 0-9"),
        ([10], "unknown label 10: the model has classes 0-9"),
        ([3, 10**20], f"unknown label {10**20}: the model has"),
        ([0, -1, 1000], "unknown label -1, 1000"),
        (list(range(10, 20)), "unknown label 10, 11, 12, 13, 14, ...: the model"),
        ([1.5], "type float64: expected a list of integers"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (3, r"shape \(\)"),
        (["cat"], "expected a list of integers"),
        ([True], "type bool"),
        ([10**20], "unknown label 100000000000000000000: the model has"),
    ],
)
def test_labels_are_checked(pipe, labels, expected):
    with pytest.raises(UsageError, match=expected):
        pipe.sample(labels, key=KEY)


def test_checked_labels_are_int32():
    labels = TINY_VAR.conditions(np.array([0, 9], np.uint8)).batch(np.arange(3))
    assert labels.dtype == np.int32
    assert labels.tolist() == [0, 9, 0]


def test_options_and_policies_are_checked(pipe):
    with pytest.raises(UsageError, match="top-k must be 0"):
        pipe.sample([1], key=KEY, top_k=-1)
    with pytest.raises(UsageError, match="top-p must lie between"):
        pipe.sample([1], key=KEY, top_p=1.5)
    with pytest.raises(UsageError, match="unknown attention 'flash'"):
        pipe.sample([1], key=KEY, attention="flash")
    with pytest.raises(AmskvError, match=r"layers \[7\]: the model has layers 0-2"):
        pipe.sample([1], key=KEY, policy=AMSKV(demanding_layers=(7,)))


def test_loading_what_is_no_checkpoint(tmp_path):
    with pytest.raises(AmskvError, match="is not a checkpoint"):
        amskv_jax.load(tmp_path)


def test_names_of_the_package():
    for name in amskv_jax.__all__:
        assert getattr(amskv_jax, name) is not None
        assert name in dir(amskv_jax)
    with pytest.raises(AttributeError, match="no attribute 'Paint'"):
        amskv_jax.Paint  # noqa: B018
