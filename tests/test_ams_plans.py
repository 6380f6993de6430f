"""AMS-KV: the automatic threshold, and capacities found for a budget."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_stats import cache_shape, make_stats, random_stats

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.policies import AMSKV, OnlineAMSKV
from amskv_jax.policies.theta import automatic_theta
from amskv_jax.schedule import VAR_256, VAR_512, ScaleSchedule

SMALL = ScaleSchedule.square((1, 2, 3, 4))


# --- the threshold -----------------------------------------------------------------------------


def test_theta_separates_two_groups_whatever_their_size_scale_and_offset():
    random = np.random.default_rng(0)
    for demanding in (2, 6, 10, 15, 20, 24, 28):
        centres = np.repeat([-0.9, -0.3], [demanding, 30 - demanding])
        values = random.permutation(random.normal(centres, 0.05))
        theta, separation = automatic_theta(values)
        assert (values < theta).sum() == demanding
        assert separation > 0.8
        for factor, offset in ((3.0, 0), (1e-3, 5), (250.0, -7.5)):
            moved, same = automatic_theta(factor * values + offset)
            np.testing.assert_allclose(moved, factor * theta + offset, rtol=1e-6)
            np.testing.assert_allclose(same, separation, rtol=1e-6)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("layers", [8, 16, 30, 36])
def test_one_odd_layer_is_no_class(sign, layers):
    random = np.random.default_rng(layers)
    groups = np.r_[np.full(layers // 3, -0.9), np.full(layers - layers // 3 - 1, -0.3)]
    groups += random.normal(0, 0.03, layers - 1)
    for values in (np.linspace(-1, 0, layers - 1), random.normal(-0.5, 0.3, layers - 1), groups):
        thetas = []
        for distance in (2, 10, 1e6):
            odd = np.r_[values, sign * distance]
            thetas.append(automatic_theta(odd)[0])
            assert 1 < (odd < thetas[-1]).sum() < layers - 1
        assert thetas[0] == thetas[1] == thetas[2]
    np.testing.assert_array_equal(groups < thetas[0], groups < -0.6)
    assert automatic_theta(np.r_[np.full(layers - 1, -0.5), sign]) == (-np.inf, 0)


def test_equal_layers_are_not_demanding():
    assert automatic_theta(np.full(5, -0.4)) == (-np.inf, 0)
    assert automatic_theta(np.array([-0.4])) == (-np.inf, 0)
    assert automatic_theta(np.array([-0.9, -0.3]))[0] == pytest.approx(-0.6)
    similarity = np.full((4, 10), -0.4)
    assert AMSKV().classify(make_stats(similarity)).demanding == ()
    assert (
        "demanding layers none"
        in AMSKV().plan(cache_shape(VAR_256, 4), make_stats(similarity)).note
    )
    room_for_all = AMSKV(c_min=VAR_256.total).classify(random_stats(0, VAR_256, 4))
    assert room_for_all.demanding == ()
    assert np.isinf(room_for_all.lowest).all()


def test_theta_follows_from_the_scales_that_find_no_room():
    similarity = np.full((6, 10), -0.3)
    similarity[:, 3] = -2.0  # fits into C_min everywhere
    similarity[[1, 4], 8] = -0.9
    policy = AMSKV(c_min=160, c_max=360)
    classes = policy.classify(make_stats(similarity))
    assert classes.overflows == (7, 8)
    assert classes.theta == pytest.approx(-0.6)
    assert classes.demanding == (1, 4)
    assert classes.expansions == (None, 8, None, None, 8, None)
    plan = policy.plan(cache_shape(VAR_256, 6), make_stats(similarity))
    assert "demanding layers 1, 4" in plan.note
    assert plan == AMSKV(160, 360, theta=-0.5).plan(cache_shape(VAR_256, 6), make_stats(similarity))
    online = OnlineAMSKV(160, 360).plan(cache_shape(VAR_256, 6), make_stats(similarity))
    assert {row.theta for row in online.rows} == {classes.theta}
    assert RetentionPlan.from_json(online.to_json()) == online


# --- budgets -----------------------------------------------------------------------------------


def attention_kept(plan, stats):
    """Attention of all queries that goes to tokens which the plan keeps."""
    tokens = plan.schedule.tokens
    return sum(
        stats.density[layer, i, segment.scale] * tokens[i]
        for layer, row in enumerate(plan.rows)
        for i, segments in enumerate(row.keep)
        for segment in segments
    )


def held(plan):
    return sum(row.capacity for row in plan.rows)


@given(st.integers(0, 2**32 - 1), st.integers(0, 30 * 3), st.integers(0, 2), st.booleans())
@settings(deadline=None, max_examples=30)
@example(0, 90, 0, False)
@example(0, 0, 0, False)
def test_a_budget_gets_the_plan_that_keeps_most_attention(seed, max_tokens, condensed, uniform):
    stats = random_stats(seed, SMALL, 3)
    allocation = "uniform" if uniform else "similarity"
    locked = sum(SMALL.tokens[:condensed])
    pairs = combinations_with_replacement(range(locked, SMALL.total + 1), 2)
    tried = [
        AMSKV(a, b, condensed, allocation=allocation).plan(cache_shape(SMALL, 3), stats)
        for a, b in pairs
        if a == b or not uniform
    ]
    fitting = [plan for plan in tried if held(plan) <= max_tokens]
    policy = AMSKV(condensed=condensed, max_tokens=max_tokens, allocation=allocation)
    if not fitting:
        with pytest.raises(
            AmskvError, match=f"condensed {condensed} holds {min(map(held, tried))} "
        ):
            policy.plan(cache_shape(SMALL, 3), stats)
        return
    found = policy.plan(cache_shape(SMALL, 3), stats)
    assert held(found) <= max_tokens
    best = max(attention_kept(plan, stats) for plan in fitting)
    assert attention_kept(found, stats) == pytest.approx(best)
    assert policy.classify(stats).expansions is not None


@pytest.mark.parametrize("target", [0.4, 0.6, 0.8, 0.9])
@pytest.mark.parametrize(("schedule", "layers"), [(VAR_256, 30), (VAR_512, 36)])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("allocation", ["similarity", "uniform"])
def test_a_target_saving_is_met(target, schedule, layers, calibrated, allocation):
    stats = random_stats(1, schedule, layers) if calibrated else None
    policy = AMSKV(saving=target, allocation=allocation)
    plan = policy.plan(cache_shape(schedule, layers), stats)
    report = MemoryReport.of(plan, CacheGeometry(2, 16, 64))
    assert report.saving(report.full) >= target
    assert f"fitted to save {target:.1%}" in plan.note
    # A byte budget is the same in other words.
    geometry = CacheGeometry(2, 16, 64)
    tokens = geometry.tokens(int(report.full * (1 - target)) + 1)
    assert (
        AMSKV(max_tokens=tokens, allocation=allocation).plan(cache_shape(schedule, layers), stats)
        == plan
    )


def test_a_target_that_cannot_be_met_names_the_smallest_plan():
    stats = random_stats(0, VAR_256, 4)
    with pytest.raises(AmskvError, match="holds at most 27 tokens in 4 layers") as caught:
        AMSKV(saving=0.99, condensed=3).plan(cache_shape(VAR_256, 4), stats)
    assert "the smallest with condensed 3 holds 56 (97.9% saved" in str(caught.value)
    plan = AMSKV(max_tokens=56, condensed=3).plan(cache_shape(VAR_256, 4), stats)
    assert held(plan) == 56
    with pytest.raises(AmskvError, match="smallest with C_min 250, condensed 2 holds"):
        AMSKV(c_min=250, max_tokens=800).plan(cache_shape(VAR_256, 4), stats)


def test_capacities_that_are_given_stay():
    stats = random_stats(3, VAR_256, 6)
    for given_ in ({"c_min": 64}, {"c_max": 300}, {"c_min": 30, "c_max": 400}):
        fitted = AMSKV(**given_).fit(cache_shape(VAR_256, 6), 2000, stats)
        assert {name: getattr(fitted, name) for name in given_} == given_


def test_both_allocations_have_the_same_sum_of_capacities():
    stats = random_stats(2, VAR_256, 6)
    for policy in (AMSKV(100, 400), AMSKV(100, 400, demanding_layers=(0, 3))):
        classes = policy.classify(stats).demanding if policy.demanding_layers is None else (0, 3)
        uniform = AMSKV(
            100, 400, demanding_layers=policy.demanding_layers, allocation="uniform"
        ).plan(cache_shape(VAR_256, 6), stats)
        each = (400 * len(classes) + 100 * (6 - len(classes))) // 6
        assert f"allocated uniformly: {each} tokens" in uniform.note
        assert len(set(uniform.rows)) == 1
        assert uniform == AMSKV(each, each).plan(cache_shape(VAR_256, 6), stats)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AMSKV(theta=float("nan")), "theta must be a number"),
        (lambda: AMSKV(saving=1.2), "must lie between 0 and 1, not 1.2"),
        (lambda: AMSKV(max_tokens=-1), "must hold 0 or more tokens, not -1"),
        (lambda: AMSKV(saving=0.5, max_tokens=9), "not both"),
        (lambda: AMSKV(allocation="fair"), "unknown allocation 'fair'"),
        (lambda: OnlineAMSKV(9, 3), "C_max .3 tokens. is below C_min"),
        (lambda: OnlineAMSKV(condensed=-1), "condensed must be 0 or more"),
        (
            lambda: OnlineAMSKV().plan(cache_shape(VAR_256, 4)),
            "needs theta, or the statistics of a calibration run",
        ),
        (
            lambda: AMSKV(c_min=9, max_tokens=9, allocation="uniform").plan(
                cache_shape(VAR_256, 4)
            ),
            "not both",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_statistics_of_another_model_are_refused():
    stats = random_stats(0, VAR_256, 4)
    for policy in (AMSKV(), AMSKV(saving=0.5), OnlineAMSKV()):
        with pytest.raises(AmskvError, match="of a model with 4 layers, this one has 5"):
            policy.plan(cache_shape(VAR_256, 5), stats)
        with pytest.raises(AmskvError, match="this one has 1, 2, 3, 4, 6, 9, 13, 18, 24, 32"):
            policy.plan(cache_shape(VAR_512, 4), stats)
