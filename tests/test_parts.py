"""A batch taken in parts: the same pictures, less memory; and caches that nothing copies."""

import re
from collections.abc import Iterable
from functools import partial

import jax
import numpy as np
import pytest

from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.parts import apart, in_parts, together
from amskv_jax.cache.store import Store
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.models.guidance import Drawing
from amskv_jax.numbers import NUMBERS
from amskv_jax.plan import activations
from amskv_jax.plan.mixed import mixed_row
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.policies import H2O, Full
from amskv_jax.sampling import TokenSampling
from amskv_jax.testing import SCHEDULE, TINY_INFINITY, TINY_VAR

BATCH = 32
DRAWING = Drawing(cfg=3.0, guide=(0,), top_k=20, top_p=0.9)


def call(sampler, model):
    """Compile and run a sampler anew: what a step is taken in is decided when it is traced."""
    params = random_params(model)
    condition = model.conditions(None).batch(np.arange(BATCH))
    keys = picture_keys(jax.random.key(5), BATCH)
    arguments = params, condition, keys, model.controls(sampler.plan.schedule, DRAWING)
    program = jax.jit(partial(sampler.generate))  # a function of its own, which is traced anew
    compiled = program.lower(*arguments).compile()
    return compiled, compiled(*arguments)


MIXED = [
    mixed_row(SCHEDULE, [["int4", one], [other, "float32"]])
    for one in ("float32", "int8", None)
    for other in ("int4", None)
]
"""Rows of which no two are alike, in several formats; by turns heads hold equally many tokens."""


PLANS = {
    "var, heads": (TINY_VAR, RetentionPlan(SCHEDULE, tuple(MIXED[:3]))),
    "var": (TINY_VAR, Full().plan(TINY_VAR.cache_shape(SCHEDULE))),
    "var, selecting": (TINY_VAR, H2O(budget=3).plan(TINY_VAR.cache_shape(SCHEDULE))),
    "infinity": (TINY_INFINITY, Full().plan(TINY_INFINITY.cache_shape(TINY_INFINITY.schedule))),
}


@pytest.mark.parametrize("name", PLANS)
def test_parts_draw_what_the_whole_draws(monkeypatch, name):
    model, plan = PLANS[name]
    sampling = TokenSampling(DRAWING.top_k, DRAWING.top_p)
    sampler = Sampler(model, plan, model.guidance(DRAWING), sampling)
    whole, expected = call(sampler, model)
    monkeypatch.setattr(activations, "WORK_BYTES", 2**18)
    last = plan.schedule.num_scales - 1
    share = sampler.shares(last, sampler.geometry(BATCH), sampler.activations)
    assert share.blocks > 1
    parted, found = call(sampler, model)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.latent, expected.latent, atol=1e-5)
    sizes = [one.memory_analysis().temp_size_in_bytes for one in (parted, whole)]
    assert sizes[0] < 0.9 * sizes[1]


def test_buffers_are_viewed_by_parts():
    buffers = {"keys": np.arange(2 * 6 * 3).reshape(2, 6, 3)}
    some = apart(buffers, 3)
    np.testing.assert_array_equal(some["keys"][3 + 1], buffers["keys"][1, 2:4])
    jax.tree.map(np.testing.assert_array_equal, together(some, 3), buffers)


def test_a_batch_in_parts_is_a_batch():
    numbers, missing = np.arange(6.0).reshape(6, 1), None

    def double(numbers, missing):
        assert missing is None
        return 2 * numbers, numbers[..., 0]

    for parts in (1, 2, 6):
        twice, flat = in_parts(double, parts, numbers, missing)
        np.testing.assert_array_equal(twice, 2 * numbers)
        np.testing.assert_array_equal(flat, numbers[:, 0])


def copies(text: str, shapes: Iterable[tuple[int, ...]]) -> int:
    """Return how many instructions of a compiled program copy an array of one of these shapes."""
    names = {f"[{','.join(map(str, shape))}]" for shape in shapes}
    found = re.findall(r" = \w+(\[[0-9,]+\])\S* copy\(", text)
    return sum(shape in names for shape in found)


@pytest.mark.parametrize(
    "rows", [(0, 1, 0, 1, 0, 1), (0, 1, 2, 0, 1, 2), (0, 1, 2, 3, 4, 5), MIXED]
)
def test_no_layer_copies_the_cache(rows):
    """Layers that pick their group's attention while the program runs write it in place.

    So do those whose heads differ, in one program for all of them.
    """
    keeps = ([0, 1], [1], [0], [0, (1, 0, 2)], [0, (1, 1, 4)], [(1, 2, 4)])
    if rows == MIXED:
        plan = RetentionPlan(SCHEDULE, tuple(MIXED))
    else:
        plan = RetentionPlan.from_keep(SCHEDULE, [[[], [0], keeps[row]] for row in rows])
    config = type(TINY_VAR.transformer)(6, 128, 2, SCHEDULE, 10, 64, 16)
    model = type(TINY_VAR)(config, TINY_VAR.tokenizer)
    sampler = Sampler(model, plan, model.guidance(DRAWING), TokenSampling(1))
    compiled, _ = call(sampler, model)
    layout = CacheLayout.of(plan, Store(NUMBERS["float32"]))
    assert len(layout.groups) == (1 if rows == MIXED else len(set(rows)))
    buffers = jax.tree.leaves(jax.eval_shape(lambda: layout.init(2 * BATCH, 2, 64)))
    assert copies(compiled.as_text(), {leaf.shape for leaf in buffers}) <= len(buffers)
