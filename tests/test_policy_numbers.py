"""Every policy with every format of cached numbers: in the announced bytes, and drawn with."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from test_policies import CASES, KEYS, MODELS, SHAPES, condition, controls, explicit, params, stats

from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.store import Store
from amskv_jax.generate import Sampler
from amskv_jax.numbers import NUMBERS, Plain
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.sampling import TokenSampling

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CODED = [name for name, numbers in NUMBERS.items() if not isinstance(numbers, Plain)]


def plan_of(name, model, path):
    """The plan of the middle budget."""
    cases = explicit(path) if name == "explicit" else CASES[name]
    return cases[1].plan(SHAPES[model], stats(model))


@pytest.mark.parametrize("name", CASES)
def test_every_format_takes_the_announced_bytes(name, tmp_path):
    for model, shape in SHAPES.items():
        plan = plan_of(name, model, tmp_path)
        for kept, numbers in NUMBERS.items():
            init = partial(CacheLayout.of(plan, Store(numbers)).init, 4)
            caches = jax.eval_shape(partial(init, shape.num_heads, shape.head_dim))
            # The online variant also has a few flags per layer.
            leaves = [leaf for leaf in jax.tree.leaves(caches) if leaf.dtype != bool]
            allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            geometry = CacheGeometry.of(shape, 2, kept)
            assert allocated == MemoryReport.of(plan, geometry).plan, (model, kept)


def draw(model, plan, cache_dtype=None, tokens=None):
    """Draw step by step, which shares all compiled steps; with these tokens, if given."""
    sampling = TokenSampling(top_k=1)
    sampler = Sampler(MODELS[model], plan, sampling=sampling, trace=True, cache_dtype=cache_dtype)
    own = replace(controls(model), forced=tokens)
    with jax.disable_jit():
        return sampler(params(model, "float32"), condition(model), KEYS, own)


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_every_policy_draws_with_codes(number, tmp_path):
    """Formats and models take turns; int8 is nearest to the logits without codes."""
    name, model = list(CASES)[number], list(MODELS)[number % len(MODELS)]
    plan, first = plan_of(name, model, tmp_path), MODELS[model].schedule.tokens[0]
    drawn = draw(model, plan)
    exact = np.asarray(drawn.logits)
    errors = []
    for kept in ("int8", CODED[number % len(CODED)]):
        logits = np.asarray(draw(model, plan, kept, drawn.tokens).logits)
        np.testing.assert_allclose(logits[:, :first], exact[:, :first], rtol=1e-6)
        errors.append(np.sqrt(np.mean((logits - exact) ** 2)))
    assert 0 < errors[0] <= errors[1] < np.std(exact)
