"""AMS-KV against the reference's runs and a sequential walk: plans, and the online variant."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_stats import cache_shape, make_stats
from reference_weights import GOLDEN, recipe_params

from amskv_jax.cache.online import DecisionObserver, OnlineCache, OnlineSlots
from amskv_jax.cache.store import KVCache, Store
from amskv_jax.generate import picture_keys
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.numbers import NUMBERS
from amskv_jax.plan.rows import StaticRow
from amskv_jax.plan.runtime_rows import OnlineRow
from amskv_jax.policies import AMSKV, OnlineAMSKV
from amskv_jax.policies.walk import adaptive_walk, distinct_capacities
from amskv_jax.schedule import VAR_256, ScaleSchedule
from amskv_jax.testing import sample, with_pictures

FEW = [ScaleSchedule.square(sides) for sides in ((1, 2, 3, 4), (1, 2, 2, 3, 3), (2, 1, 3))]
CONFIG, TOKENIZER = VARConfig(2, 128, 2, VAR_256, 10, 64), VQVAEConfig(VAR_256, 64, 32, 32)
MODEL = VARModel(CONFIG, TOKENIZER)
STORE = Store(NUMBERS["float32"])


def sequential_decisions(tokens, similarity, c_min, c_max, condensed, theta):
    """Algorithm 1 for one layer, step by step: the ids cached after every scale, and expansion."""
    budget, expanded_at, cached, history = c_min, -1, [], []
    for scale, size in enumerate(tokens):
        used = 0
        locked = 0
        for other in cached:
            used += tokens[other]
            if other < condensed:
                locked += tokens[other]
        overflow = used + size > budget
        if overflow and expanded_at < 0 and scale >= 1 and similarity[scale] < theta:
            budget, expanded_at = c_max, scale
        if locked + size <= budget:
            position = 0
            while used + size > budget:
                while cached[position] < condensed:
                    position += 1
                used -= tokens[cached[position]]
                del cached[position]
            cached.append(scale)
        history.append(list(cached))
    return history, expanded_at


# --- the reference's runs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "var" / "ams.npz", allow_pickle=False) as data:
        return dict(data)


@pytest.fixture(scope="module")
def params():
    return {"transformer": recipe_params(CONFIG), "tokenizer": recipe_params(TOKENIZER)}


def recorded(golden, name):
    """The policy of a recorded run."""
    c_min, c_max, condensed, theta = golden[f"{name}_params"]
    return OnlineAMSKV(int(c_min), int(c_max), int(condensed), float(theta))


def generate(params, golden, name, plan, **options):
    labels = jnp.asarray(golden[f"{name}_labels"])
    keys = picture_keys(jax.random.key(0), len(labels))
    out = sample(MODEL, plan, params, labels, keys, trace=True, **options)
    np.testing.assert_array_equal(out.tokens, golden[f"{name}_tokens"])
    logits = out.logits[:, golden["positions"]]
    np.testing.assert_allclose(logits, golden[f"{name}_logits"], atol=2e-5)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A1", "A2", "A3", "A4", "A5"])
def test_online_runs_decide_as_recorded(params, golden, name):
    plan = recorded(golden, name).plan(CONFIG.cache_shape)
    out = generate(params, golden, name, plan, observe=DecisionObserver())
    seen = [scans[0] for scans in out.observed]
    cached = json.loads(str(golden["decisions"]))[name]["cached"]
    for layer in range(CONFIG.depth):
        found = [np.flatnonzero(step.visible[layer]).tolist() for step in seen]
        assert found == cached[layer]
        expanded = [bool(step.expanded[layer]) for step in seen]
        first = expanded.index(True) if True in expanded else -1
        assert first == golden[f"{name}_expanded_step"][layer]
        found = [step.similarity[layer] for step in seen]
        np.testing.assert_allclose(found, golden[f"{name}_neg_l2"][layer], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A1", "A2", "A3", "A4", "A5"])
def test_plans_from_recorded_similarities_draw_what_was_recorded(params, golden, name):
    policy = AMSKV(**vars(recorded(golden, name)))
    stats = make_stats(golden[f"{name}_neg_l2"], heads=CONFIG.num_heads)
    plan = policy.plan(CONFIG.cache_shape, stats)
    attended = np.array([row.kept_tokens for row in plan.rows]) + VAR_256.tokens
    np.testing.assert_array_equal(attended, golden[f"{name}_attended_tokens"])
    out = with_pictures(MODEL, plan, params, generate(params, golden, name, plan))
    picture = np.rint(255 * np.moveaxis(np.asarray(out.pictures[:1]), -1, 1))
    np.testing.assert_allclose(picture, golden[f"{name}_image"], atol=1)


def test_the_oracle_decides_as_recorded(golden):
    decisions = json.loads(str(golden["decisions"]))
    for name in ("A1", "A2", "A3", "A4", "A5"):
        for layer in range(CONFIG.depth):
            history, expanded = sequential_decisions(
                VAR_256.tokens, golden[f"{name}_neg_l2"][layer], *golden[f"{name}_params"]
            )
            assert history == decisions[name]["cached"][layer]
            assert expanded == golden[f"{name}_expanded_step"][layer]


# --- the walk ----------------------------------------------------------------------------------


@st.composite
def adaptive_cases(draw, few=False):
    grids = st.tuples(st.integers(1, 6), st.integers(1, 4))
    schedule = draw(
        st.sampled_from(FEW)
        if few
        else st.lists(grids, min_size=1, max_size=8).map(tuple).map(ScaleSchedule)
    )
    condensed = draw(st.integers(0, 3))
    locked = sum(schedule.tokens[:-1][:condensed])
    c_min = draw(st.integers(locked, max(locked, schedule.total)))
    c_max = draw(st.integers(c_min, c_min + schedule.total))
    values, scales = st.floats(-2, 0, width=32), schedule.num_scales
    layers = draw(st.integers(1, 4))
    shape = st.lists(values, min_size=scales, max_size=scales)
    similarity = draw(st.lists(shape, min_size=layers, max_size=layers))
    theta = draw(st.one_of(values, st.sampled_from([-np.inf, np.inf])))
    return schedule, similarity, (c_min, c_max, condensed, theta)


@given(adaptive_cases())
@settings(deadline=None, max_examples=200)
def test_plans_are_what_the_sequential_walk_does(case):
    schedule, similarity, (c_min, c_max, condensed, theta) = case
    policy = AMSKV(c_min, c_max, condensed, theta=theta)
    stats = make_stats(similarity, schedule)
    plan, classes = (
        policy.plan(cache_shape(schedule, len(similarity)), stats),
        policy.classify(stats),
    )
    for layer, row in enumerate(plan.rows):
        history, expanded = sequential_decisions(
            schedule.tokens, similarity[layer], c_min, c_max, condensed, theta
        )
        assert row == StaticRow.from_scales(schedule, [[], *history[:-1]])
        if expanded == schedule.num_scales - 1:  # it changes nothing any more
            expanded = -1
        assert (classes.expansions[layer], layer in classes.demanding) == (
            (None, False) if expanded < 0 else (expanded, True)
        )


@given(adaptive_cases(few=True))
@settings(deadline=None, max_examples=20)
def test_online_decisions_are_what_the_sequential_walk_does(case):
    schedule, similarity, setting = case
    slots = OnlineSlots(STORE, schedule, OnlineRow(schedule.tokens, *setting))
    # Keys are flat maps whose distance from scale to scale is minus the wanted similarity.
    levels = np.cumsum([0, *(-value for value in similarity[0][1:])]).astype(np.float32)
    keys = [
        np.full((1, size, 1, 1), level) for size, level in zip(schedule.tokens, levels, strict=True)
    ]
    distance = np.diff(levels, prepend=np.nan)
    assume(np.isinf(setting[3]) or np.nanmin(np.abs(distance + setting[3]), initial=1) > 1e-5)
    history, expanded = sequential_decisions(schedule.tokens, -distance, *setting)
    stored = np.concatenate([np.zeros((1, 0, 1, 1)), *keys[:-1]], axis=1)[None]
    stored = jnp.asarray(stored, jnp.float32)
    visible, proved = jnp.zeros((1, schedule.num_scales), bool), jnp.zeros(1, bool)
    for step, key in enumerate(keys):
        cache = OnlineCache(KVCache(stored, stored), visible, proved)
        decision = slots.decide(cache, jnp.int32(0), step, jnp.asarray(key))
        assert np.flatnonzero(decision.visible).tolist() == history[step]
        assert bool(decision.expanded) == (0 <= expanded <= step)
        visible, proved = decision.visible[None], decision.expanded[None]


@given(adaptive_cases())
@settings(deadline=None, max_examples=50)
def test_distinct_capacities_are_all_there_are(case):
    schedule, _, (_, _, condensed, _) = case
    start = sum(schedule.tokens[:-1][:condensed])
    found = distinct_capacities(lambda c: adaptive_walk(schedule, c, c, condensed), start)
    walks = [adaptive_walk(schedule, c, c, condensed).held for c in found]
    tried = range(start, schedule.total + 1)
    for held in (adaptive_walk(schedule, c, c, condensed).held for c in tried):
        assert held in walks
