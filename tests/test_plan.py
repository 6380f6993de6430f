"""Retention plans, slot assignment and the static policies."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stats import cache_shape

from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.static import StaticSlots
from amskv_jax.cache.store import Store
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.numbers import NUMBERS
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import StaticRow
from amskv_jax.policies import AMSKV, Explicit, Full, Sink, Window, policy_class
from amskv_jax.schedule import VAR_256, VAR_512, ScaleSchedule
from amskv_jax.words import GIB

SMALL = ScaleSchedule.square((1, 2, 3, 4))
STORE = Store(NUMBERS["float32"])


@st.composite
def schedules_and_rows(draw):
    sides = st.tuples(st.integers(1, 5), st.integers(1, 5))
    schedule = ScaleSchedule(tuple(draw(st.lists(sides, min_size=1, max_size=6))))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    alive = np.zeros(schedule.total, bool)
    kept = []
    for step in range(schedule.num_scales):
        kept.append(alive.copy())
        alive[schedule.slice(step)] = True
        alive &= random.random(schedule.total) < random.choice([0.0, 0.5, 0.9, 1.0])
    return schedule, StaticRow.from_positions(schedule, kept)


@given(schedules_and_rows())
@settings(deadline=None)
def test_slots_hold_exactly_what_the_row_keeps_in_the_fewest_slots(case):
    schedule, row = case
    slots = StaticSlots.of(row, schedule, STORE)
    memory = np.full(slots.capacity, -1)  # the position of the token in each slot
    for step in range(schedule.num_scales):
        seen = []
        for scale, start, slot, length in slots.held[step]:
            expected = schedule.offsets[scale] + start + np.arange(length)
            np.testing.assert_array_equal(memory[slot : slot + length], expected)
            seen += expected.tolist()
        assert len(set(seen)) == len(seen)
        np.testing.assert_array_equal(np.sort(seen), np.flatnonzero(row.positions(schedule, step)))
        for scale in range(step):
            assert all(run.scale == scale for run in slots.where(step, scale))
        for scale, start, slot, length in slots.writes[step]:
            assert scale == step
            memory[slot : slot + length] = schedule.offsets[step] + start + np.arange(length)
    assert slots.capacity == max(
        int(row.positions(schedule, i).sum()) for i in range(len(row.keep))
    )


@given(schedules_and_rows())
@settings(deadline=None)
def test_json_round_trip(case):
    schedule, row = case
    plan = RetentionPlan(schedule, (row, row), "a note")
    again = RetentionPlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.note == plan.note


def test_interchange_format_of_whole_scales():
    keep = [[[], [0], [0, 1], [0, 2]], [[], [], [1], [2]]]
    plan = RetentionPlan.from_json(json.dumps({"keep": keep}), SMALL)
    assert json.loads(plan.to_json())["keep"] == keep
    assert [row.kept_tokens for row in plan.rows] == [(0, 1, 5, 10), (0, 0, 4, 9)]
    assert plan.group_of == (0, 1)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([[[], [], [0], [0]]], r"layer 0, step 2 .* tokens 0:1 of scale 0, which were dropped"),
        ([[[], [0], [0, 1], [[1, 0, 2]]], [[], [0], [], [1]]], r"layer 1, step 3 .* scale 1"),
        ([[[], [0], [0, 2], []]], "scale 2, which is not an earlier scale"),
        ([[[], [0], [[1, 0, 5]], []]], "tokens 0:5 of scale 1, which has 4"),
        ([[[], [0], [0, 0], []]], "scale 0 twice"),
        ([[[], [0], []]], "has 3 steps, but the schedule has 4 scales"),
        ([[[], [0], [0, 7], []]], "below 4 or"),
        ([[[], ["x"], [], []]], r"expected lists of scale ids"),
        ([], "at least one layer"),
    ],
)
def test_impossible_plans_are_refused(keep, message):
    with pytest.raises(AmskvError, match=message):
        RetentionPlan.from_keep(SMALL, keep)


def test_plan_files(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(AmskvError, match="cannot read the retention plan"):
        Explicit(str(path)).plan(cache_shape(SMALL, 2))
    path.write_text("{}")
    with pytest.raises(AmskvError, match="no retention plan"):
        Explicit(str(path)).plan(cache_shape(SMALL, 2))
    path.write_text(Full().plan(cache_shape(SMALL, 2)).to_json())
    assert Explicit(str(path)).plan(cache_shape(SMALL, 2)) == Full().plan(cache_shape(SMALL, 2))
    with pytest.raises(AmskvError, match="has 2 layers, the model 3"):
        Explicit(str(path)).plan(cache_shape(SMALL, 3))
    with pytest.raises(AmskvError, match="was made for the scales 1, 2, 3, 4; the model has"):
        Explicit(str(path)).plan(cache_shape(VAR_256, 2))
    path.write_text('{"keep": [[[]]]}')
    with pytest.raises(AmskvError, match="names no schedule"):
        RetentionPlan.load(path)


def test_window_and_sink_cut_inside_a_scale():
    window = Window(6).plan(cache_shape(SMALL, 1)).rows[0]
    assert window.keep[3] == ((2, 3, 9),)
    assert window.kept_tokens == (0, 1, 5, 6)
    sink = Sink(2, 3).plan(cache_shape(SMALL, 1)).rows[0]
    assert sink.keep[3] == ((0, 0, 1), (1, 0, 1), (2, 6, 9))
    assert sink.kept_tokens == (0, 1, 5, 5)


def test_ams_takes_layers_and_says_when_they_are_a_default():
    plan = AMSKV(5, 10, 1, demanding_layers=(1,)).plan(cache_shape(SMALL, 2))
    assert [[segment.scale for segment in row.keep[3]] for row in plan.rows] == [[0, 1], [0, 2]]
    assert "not by measurement" not in plan.note
    assert "not by measurement" in AMSKV().plan(cache_shape(VAR_256, 30)).note
    capacities = [row.capacity for row in AMSKV().plan(cache_shape(VAR_256, 30)).rows]
    assert capacities == [338] * 10 + [174] * 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AMSKV(c_min=10, c_max=9), r"C_max \(9 tokens\) is below C_min \(10\)"),
        (lambda: AMSKV(c_min=400).plan(cache_shape(VAR_256, 2)), None),
        (lambda: AMSKV(c_min=-1), "C_min must be 0 or more"),
        (lambda: AMSKV(condensed=-1), "condensed must be 0 or more"),
        (
            lambda: AMSKV(c_min=3, condensed=2).plan(cache_shape(VAR_256, 2)),
            "condensed scales need 5",
        ),
        (
            lambda: AMSKV(demanding_layers=(0, 7)).plan(cache_shape(VAR_256, 4)),
            r"\[7\]: the model has layers 0-3",
        ),
        (lambda: AMSKV(demanding_layers=(0,), theta=1.0), "not both"),
        (lambda: AMSKV(theta=1.0).plan(cache_shape(VAR_256, 4)), "calibration"),
        (lambda: Window(-1), "window must be 0 or more"),
        (lambda: Sink(-1), "sink must be 0 or more"),
        (lambda: policy_class("best"), "unknown policy 'best': expected full, ams"),
    ],
)
def test_policy_options_are_checked(make, message):
    if message is None:
        make()
        return
    with pytest.raises((AmskvError, UsageError), match=message):
        make()


def test_memory_arithmetic_of_the_published_models():
    d30 = CacheGeometry(rows=128, num_heads=30, head_dim=64)
    report = MemoryReport.of(Full().plan(cache_shape(VAR_256, 30)), d30)
    assert round(report.full / GIB, 2) == 18.68
    assert report.plan == report.stored
    assert round(report.saving(report.full), 3) == 0.376
    assert report.reference == report.full * 3 // 2
    d36 = MemoryReport.of(Full().plan(cache_shape(VAR_512, 36)), CacheGeometry(128, 36, 64))
    assert round(d36.full / GIB, 2) == 88.59
    assert round(d36.saving(d36.full), 3) == 0.457
    ams = MemoryReport.of(AMSKV().plan(cache_shape(VAR_256, 30)), d30)
    assert round(ams.plan / GIB, 2) == 6.28


@pytest.mark.parametrize("policy", [Full(), AMSKV(), Window(7), Sink(2, 3)])
def test_allocated_bytes_are_the_announced_ones(policy):
    plan = policy.plan(cache_shape(SMALL, 3))
    geometry = CacheGeometry(rows=4, num_heads=2, head_dim=8, numbers=NUMBERS["float32"])
    caches = CacheLayout.of(plan, STORE).init(4, 2, 8)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(caches)) == (
        MemoryReport.of(plan, geometry).plan
    )
