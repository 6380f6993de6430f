"""Every registered policy on every kind of tiny model, in both types, with three budgets.

Not all combinations of these: each costs seconds of compiling, and most would say the same. All of
policies, formats and models are in ``test_policies_codes``.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import policy_cases
import pytest
from policy_cases import (
    CASES,
    KEYS,
    MODELS,
    SHAPES,
    condition,
    controls,
    draw,
    make_sampler,
    params,
    stats,
)

from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.store import Store
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.generate import Sampler, picture_keys, program
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.numbers import NUMBERS, Plain
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.policies import H2O, REGISTRY, Full, ScaleKV, Window
from amskv_jax.sampling import TokenSampling
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.testing import Recorder, check_obeyed, layer_records

pytestmark = pytest.mark.usefixtures("quickly_compiled")

DTYPES = {"float32": 1e-5, "bfloat16": 0.02}


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    return policy_cases.policies(tmp_path_factory.mktemp("plans"))


def in_turn(name):
    """Which model is a policy's where one for each of them will do."""
    return list(MODELS)[list(CASES).index(name) % len(MODELS)]


TURNS = (
    ("middle", "float32"),
    ("small", "float32"),
    ("everything", "float32"),
    ("small", "bfloat16"),
)
MATRIX = [
    (name, model, *TURNS[(number - index) % len(TURNS)])
    for index, name in enumerate(CASES)
    for number, model in enumerate(MODELS)
]
"""Every policy on every model; budgets and types take turns, so that every policy has them all."""


def test_all_policies_are_in_the_matrix():
    """One that has no budget must say its cases."""
    assert REGISTRY.keys() == CASES.keys()


@pytest.mark.parametrize(("name", "model", "budget", "dtype"), MATRIX)
def test_every_policy_obeys_its_plan_in_the_announced_bytes(name, model, budget, dtype, policies):
    kind, shape = MODELS[model], SHAPES[model]
    plan = policies[name][budget].plan(shape, stats(model))
    samples = draw(plan, model, dtype)
    assert samples.tokens.shape[:2] == (2, kind.schedule.total)
    assert np.isfinite(samples.logits).all()
    assert np.isfinite(samples.latents).all()
    scale = kind.bind({}, kind.schedule, dtype)[0].attention_scale
    check_obeyed(plan, layer_records(samples.observed), scale, DTYPES[dtype])

    caches = CacheLayout.of(plan, Store(NUMBERS[dtype])).init(4, shape.num_heads, shape.head_dim)
    geometry = CacheGeometry.of(shape, 2, dtype)
    # The online variant also has a few flags per layer.
    buffers = [leaf for leaf in jax.tree.leaves(caches) if leaf.dtype != bool]
    assert sum(leaf.nbytes for leaf in buffers) == MemoryReport.of(plan, geometry).plan

    full = draw(Full().plan(shape), model, dtype)
    if name == "full" or budget == "everything":
        if dtype == "float32":
            np.testing.assert_array_equal(samples.tokens, full.tokens)
            np.testing.assert_allclose(samples.logits, full.logits, atol=1e-4)
    else:
        assert (np.asarray(samples.logits) != np.asarray(full.logits)).any()


@pytest.mark.parametrize("name", CASES)
def test_every_policy_compiles_once_and_gives_the_same(name, policies):
    model = in_turn(name)
    shape, weights = SHAPES[model], params(model, "float32")
    samples = draw(policies[name]["middle"].plan(shape, stats(model)), model, "float32")
    compiled, given = program("cpu")._cache_size(), condition(model)
    plan = policies[name]["middle"].plan(shape, stats(model))
    sampler = make_sampler(plan, model, "float32", observe=Recorder())
    again = sampler(weights, given, KEYS, controls(model))
    np.testing.assert_array_equal(again.tokens, samples.tokens)
    given = jax.tree.map(lambda leaf: leaf[::-1], given)
    other = sampler(weights, given, KEYS[::-1], controls(model, 3.0))
    assert (np.asarray(other.tokens) != np.asarray(samples.tokens)).any()
    assert program("cpu")._cache_size() == compiled > 0


@pytest.fixture(scope="module")
def many_layers():
    """A model whose cache needs far more memory than all the rest; and how to measure it."""
    schedule = ScaleSchedule.square((1, 2, 3, 4, 5, 6))
    config = VARConfig(24, 32, 2, schedule, 5, 32, 8)
    tokenizer = VQVAEConfig(schedule, 32, 8, 32, (1, 1), 1)
    geometry = CacheGeometry.of(config.cache_shape, 8, "float32")
    shapes = jax.eval_shape(lambda: random_params(VARModel(config, tokenizer)))

    def measure(policy):
        plan = policy.plan(config.cache_shape)
        model = VARModel(config, tokenizer)
        sampler = Sampler(model, plan, sampling=TokenSampling(top_k=1))
        keys = jax.eval_shape(lambda: picture_keys(jax.random.key(0), 8))
        own = model.controls(schedule, model.drawing)
        memory = sampler.compile(shapes, jnp.zeros(8, int), keys, own).memory_analysis()
        return MemoryReport.of(plan, geometry).plan, memory.temp_size_in_bytes

    announced, needed = measure(Full())
    assert announced > 0.7 * needed, "all layers' buffers are there once, and updated in place"
    return measure, announced, needed


@pytest.mark.parametrize(
    "policy", [H2O(9), ScaleKV(9), Window(9)], ids=["h2o", "scalekv", "window"]
)
def test_compiled_programs_need_less_memory_by_what_is_announced(policy, many_layers):
    measure, full_announced, full_needed = many_layers
    announced, needed = measure(policy)
    saved = full_announced - announced
    assert saved > full_announced / 2
    # Attention to fewer keys needs a little less by itself.
    assert 0.95 * saved < full_needed - needed < 1.15 * saved


CODED = [name for name, numbers in NUMBERS.items() if not isinstance(numbers, Plain)]


@pytest.mark.parametrize("name", CASES)
def test_every_format_takes_the_announced_bytes(name, policies):
    for model, shape in SHAPES.items():
        plan = policies[name]["middle"].plan(shape, stats(model))
        for kept, numbers in NUMBERS.items():
            init = partial(CacheLayout.of(plan, Store(numbers)).init, 4)
            caches = jax.eval_shape(partial(init, shape.num_heads, shape.head_dim))
            leaves = [leaf for leaf in jax.tree.leaves(caches) if leaf.dtype != bool]
            allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            geometry = CacheGeometry.of(shape, 2, kept)
            assert allocated == MemoryReport.of(plan, geometry).plan, (model, kept)


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_every_policy_draws_with_codes(number, policies):
    """Formats and models take turns; what is read first has not been coded yet."""
    name, kept = list(CASES)[number], CODED[number % len(CODED)]
    model = in_turn(name)
    plan = policies[name]["middle"].plan(SHAPES[model], stats(model))
    drawn = draw(plan, model, "float32")
    sampler = make_sampler(plan, model, "float32", cache_dtype=kept)
    own = replace(controls(model), forced=drawn.tokens)
    logits = np.asarray(sampler(params(model, "float32"), condition(model), KEYS, own).logits)
    exact = np.asarray(drawn.logits)
    np.testing.assert_allclose(logits[:, 0], exact[:, 0], rtol=1e-6)
    error = np.sqrt(np.mean((logits - exact) ** 2))
    if name == "optimal":  # its plans say in which formats
        assert error == 0
    else:
        assert 0 < error < np.std(exact)
