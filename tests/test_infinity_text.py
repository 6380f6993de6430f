"""Prompts for Infinity: checks, padding, and what the transformer makes of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import message
from infinity_golden import recipe_params

from amskv_jax.models.guidance import UNGUIDED, Guidance
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.prompts import Prompts, TextFeatures, bucket_of
from amskv_jax.models.infinity.schedules import schedule_of
from amskv_jax.models.infinity.transformer import Infinity

CONFIG = InfinityConfig(
    depth=2,
    width=64,
    num_heads=2,
    bits=4,
    schedule=schedule_of("1:1", "0.06M"),
    text_channels=128,
    text_maxlen=100,
)


def features(*lengths, channels=128, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((sum(lengths), channels), np.float32), np.array(lengths)


@pytest.fixture(scope="module")
def prepare():
    params = recipe_params(CONFIG)

    @chex.assert_max_traces(4)  # per guidance, with negative prompts and without, per bucket
    def run(condition, guidance):
        bound = Infinity(CONFIG, CONFIG.schedule).bind({"params": params})
        return bound.prepare(condition, guidance)

    return jax.jit(run, static_argnums=1)


def rows_of(prepared, row):
    """What one row of a batch amounts to, with nothing after the end of its text."""
    length = int(prepared.shared.lengths[row])
    layers = prepared.layers
    return (
        prepared.start[row],
        jax.tree.map(lambda x: x[row], prepared.shared),
        layers.key[:, row, :length],
        layers.value[:, row, :length],
    )


def test_texts_are_padded_to_the_bucket_of_the_longest():
    assert [bucket_of(n, InfinityConfig(1, 128, 1)) for n in (1, 64, 65, 129, 257, 512)] == [
        64,
        64,
        128,
        256,
        512,
        512,
    ]
    assert [bucket_of(n, CONFIG) for n in (64, 65, 100)] == [64, 100, 100]
    assert "101 tokens, expected at most 100" in message(bucket_of, 101, CONFIG)
    given, lengths = features(3, 70, 5)
    prompts = Prompts(CONFIG, TextFeatures(given, lengths, texts=("a", "b", "c")))
    assert (len(prompts), prompts.captions()) == (3, ("a", "b", "c"))
    assert prompts.classes(np.arange(2)) is None
    batch = prompts.batch(np.array([2, 3]))  # both are short, but not the whole
    chex.assert_shape(batch.features, (2, 100, 128))
    np.testing.assert_array_equal(batch.lengths, [5, 3])
    np.testing.assert_array_equal(batch.features[0, :5], given[73:])
    np.testing.assert_array_equal(batch.features[1, :3], given[:3])
    assert not batch.features[0, 5:].any()
    assert batch.negative_features is None
    assert Prompts(CONFIG, TextFeatures(given, lengths)).captions()[2] == "prompt 2"


def test_one_negative_prompt_serves_all():
    negative, lengths = features(66, seed=1)
    wanted = TextFeatures(*features(3, 4), negative, lengths)
    batch = Prompts(CONFIG, wanted).batch(np.arange(2))
    chex.assert_shape((batch.features, batch.negative_features), (2, 100, 128))
    np.testing.assert_array_equal(batch.negative_lengths, [66, 66])
    np.testing.assert_array_equal(batch.negative_features[1, :66], negative)


def test_rows_do_not_depend_on_padding_batch_or_bucket(prepare):
    prompts = Prompts(CONFIG, TextFeatures(*features(3, 64, 5)))
    longer = Prompts(CONFIG, TextFeatures(*features(3, 64, 5, 90)))
    guidance = Guidance()
    batch = prepare(prompts.batch(np.array([0, 2])), guidance)
    chex.assert_shape(batch.start, (4, 1, 64))
    chex.assert_shape(batch.layers.key, (2, 4, 64, 2, 32))
    np.testing.assert_array_equal(batch.shared.lengths, [3, 3, 5, 5])
    same = prepare(longer.batch(np.array([1, 2])), guidance)
    for row in (2, 3):  # the second picture's, with its prompt and without
        chex.assert_trees_all_close(rows_of(batch, row), rows_of(same, row), atol=1e-6)

    dirty = prompts.batch(np.array([0, 2]))
    dirty.features[0, 3:] = 1e4
    dirty = prepare(dirty, guidance)
    for row in range(4):
        chex.assert_trees_all_equal(rows_of(dirty, row), rows_of(batch, row))
    alone = prepare(prompts.batch(np.array([0, 2])), UNGUIDED)
    chex.assert_shape(alone.start, (2, 1, 64))
    chex.assert_trees_all_close(rows_of(alone, 1), rows_of(batch, 2), atol=1e-6)


def test_unconditional_rows_see_as_much_of_the_table_as_their_text_is_long(prepare):
    table = recipe_params(CONFIG)["unconditional_text"]
    prompts = Prompts(CONFIG, TextFeatures(*features(3, 5)))
    found = prepare(prompts.batch(np.arange(2)), Guidance())
    negative = TextFeatures(
        *features(3, 5), np.concatenate([table[:3], table[:5]]), np.array([3, 5])
    )
    expected = prepare(Prompts(CONFIG, negative).batch(np.arange(2)), Guidance())
    for row in range(4):
        chex.assert_trees_all_close(rows_of(found, row), rows_of(expected, row), atol=1e-6)


def test_bfloat16_keeps_the_pooled_text_in_float32():
    bound = Infinity(CONFIG, CONFIG.schedule, jnp.bfloat16)
    condition = Prompts(CONFIG, TextFeatures(*features(3))).batch(np.arange(1))
    prepared = jax.eval_shape(
        lambda params: bound.bind({"params": params}).prepare(condition, Guidance()),
        recipe_params(CONFIG),
    )
    assert prepared.layers.key.dtype == prepared.layers.value.dtype == jnp.bfloat16
    assert prepared.start.dtype == prepared.shared.modulation.dtype == jnp.float32


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (TextFeatures(*features(3, channels=64)), "expected (tokens, 128)"),
        (TextFeatures(features(3)[0][0], np.array([3])), "shape (128,)"),
        (TextFeatures(features(4)[0], np.array([4, 0])), "prompt 1 has 0 tokens"),
        (TextFeatures(*features(101)), "prompt 0 has 101 tokens, expected 1 to 100: cut it"),
        (TextFeatures(features(4)[0], np.array([3])), "add up to 3 tokens, but there are"),
        (TextFeatures(features(4)[0], np.array([4.0])), "expected one integer per prompt"),
        (TextFeatures(features()[0], np.array([], int)), "expected one integer per prompt"),
        (TextFeatures(features(2)[0] * np.nan, np.array([2])), "not all finite"),
        (TextFeatures(*features(2), texts=("a", "b")), "2 texts for 1 features"),
        (TextFeatures(*features(2), features(1)[0]), "both features and lengths"),
        (TextFeatures(*features(2, 2, 2), *features(1, 1)), "2 negative prompts for 3 prompts"),
        (TextFeatures(*features(2), *features(0)), "negative prompt 0 has 0 tokens"),
    ],
)
def test_features_that_do_not_fit_are_refused(wanted, said):
    assert said in message(Prompts, CONFIG, wanted)
