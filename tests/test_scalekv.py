"""ScaleKV: token selection against the golden and a slow oracle, budgets, options."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_stats import cache_shape
from reference_weights import GOLDEN
from selecting_oracle import assert_reads, observing_tokens, scalekv_positions

from amskv_jax import configs
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.models.infinity.schedules import schedule_of
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.runtime_rows import SelectingRow
from amskv_jax.plan.selectors import WindowScores, best
from amskv_jax.plan.stats import TOP_COUNTS, LayerStats
from amskv_jax.policies import ScaleKV
from amskv_jax.policies.scalekv import allocate, fitting_window, published_counts
from amskv_jax.schedule import VAR_256, ScaleSchedule
from amskv_jax.testing import check_obeyed, draw_records, drive, read_mask

pytestmark = pytest.mark.usefixtures("quickly_compiled")

INFINITY = ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
SMALL = ScaleSchedule.square((1, 2, 3, 4))
OBLONG = ScaleSchedule(((1, 1), (2, 3), (3, 5), (5, 4), (4, 7), (3, 3)))
BUDGETS = str(GOLDEN / "scalekv" / "budget_2b.json")
LAYERS = (0, 1, 23)


# The golden of the public code


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "scalekv" / "scalekv_2b.npz") as content:
        return dict(content)


def normal(layer, scale):
    """Keys and queries of one call, [1, T, heads, head_dim]."""
    random = np.random.RandomState(7000 + 100 * layer + scale)
    shape = (1, 2, INFINITY.tokens[scale], 8)
    return [random.standard_normal(shape).astype(np.float32).swapaxes(1, 2) for _ in range(2)]


@pytest.mark.parametrize("scale", range(7, 13))
@pytest.mark.parametrize("layer", LAYERS)
def test_reference_mode_keeps_what_the_public_code_keeps(golden, layer, scale):
    everything = np.concatenate([normal(layer, i)[0] for i in range(scale + 1)], axis=1)
    stored = golden[f"L{layer}_S{scale - 1}_kept"]
    own = np.arange(INFINITY.offsets[scale], INFINITY.offsets[scale + 1])
    at_hand = np.concatenate([stored, np.tile(own, (2, 1))], axis=1)
    assert at_hand.shape[1] == golden["before"][LAYERS.index(layer), scale]
    keys = np.stack([everything[:, at_hand[head], head] for head in range(2)], axis=2)
    count = int(golden["kept"][LAYERS.index(layer), scale])

    selector = WindowScores(mode="reference")
    query, grid = normal(layer, scale)[1], INFINITY.grids[scale]
    rank, _ = selector.rank(jnp.asarray(query), jnp.asarray(keys), 1.0, grid, None, None)
    kept = np.take_along_axis(at_hand, np.asarray(best(rank, count))[0], axis=1)
    for head in range(2):
        name = f"L{layer}_S{scale}"
        found, must = set(kept[head]), set(golden[f"{name}_h{head}_must"])
        assert len(found) == count == golden[f"{name}_kept"].shape[1]
        assert must <= found <= must | set(golden[f"{name}_h{head}_ties"])
        window = own[0] + selector.positions(grid)
        np.testing.assert_array_equal(window, golden[f"{name}_window"][head])


def test_published_budgets_give_the_public_codes_cache_sizes(golden):
    plan = ScaleKV(budget_file=BUDGETS, mode="reference").plan(cache_shape(INFINITY, 32))
    for number, layer in enumerate(LAYERS):
        # The last call of the public code prunes a cache that nobody reads.
        assert plan.rows[layer].counts == (0, *golden["kept"][number, :-1])
    counts = np.array([row.counts for row in plan.rows])
    assert (counts[:, 8:12].mean(0) == 650).all()
    assert plan.rows[5].selector == WindowScores(16, 5, "reference")
    assert "budgets of budget_2b.json" in plan.note


PUBLISHED_8B = {9: (909, 629), 10: (1464, 584), 11: (2463, 503), 12: (4054, 374), 13: (6200, 200)}
"""Tokens of drafters (the layers 0 to 2 of 40) and refiners in the public code's file for 8B."""


@pytest.mark.parametrize(
    ("model", "layers", "expected"), [("infinity-2b", 32, 0.45), ("infinity-8b", 40, 1.12)]
)
def test_published_budgets_on_the_shapes_of_both_models(model, layers, expected, tmp_path):
    path, found = BUDGETS, configs.get(model).model
    if model == "infinity-8b":
        path = tmp_path / "budget_8b.json"
        flags = {f"Block {layer}": int(layer < 3) for layer in range(40)}
        budgets = {
            f"Scale {scale}": {**flags, "Max": most, "Min": least}
            for scale, (most, least) in PUBLISHED_8B.items()
        }
        path.write_text(json.dumps(budgets))
    shape = found.cache_shape(schedule_of())
    plan = ScaleKV(budget_file=str(path), mode="reference").plan(shape)
    assert len(plan.rows) == layers
    counts = np.array([row.counts for row in plan.rows])
    assert (counts[:, 8:12].mean(0) == 650).all()
    report = MemoryReport.of(plan, CacheGeometry.of(shape, 1, "bfloat16"))
    assert round(report.plan / 2**30, 2) == expected


# The slow oracle


CASES = [
    # The window fills what is kept, is a part of it, or is one token; scores are pooled or not.
    (SMALL, (0, 1, 5, 7), {"window": 4, "kernel": 5}),
    (SMALL, (0, 1, 4, 4), {"window": 4, "kernel": 3}),
    (SMALL, (0, 1, 2, 6), {"window": 1, "kernel": 1}),
    (SMALL, (0, 1, 5, 14), {"window": 9, "kernel": 5}),  # nothing is dropped
    (OBLONG, (0, 1, 5, 17, 11, 16), {"window": 4, "kernel": 5}),  # less, then more
    (OBLONG, (0, 1, 7, 9, 9, 12), {"window": 9, "kernel": 7}),
    (OBLONG, (0, 1, 7, 0, 16, 17), {"window": 16, "kernel": 3}),
]


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize(("schedule", "counts", "options"), CASES)
def test_kept_tokens_are_those_of_the_oracle(schedule, counts, options, mode):
    row = SelectingRow(counts, WindowScores(**options, mode=mode))
    record = drive(row, schedule, 0.6)
    expected = scalekv_positions(record, schedule, counts, scale=0.6, mode=mode, **options)
    assert_reads(row, schedule, record, expected)
    check_obeyed(RetentionPlan(schedule, (row,)), [record], 0.6, 1e-5)


def test_heads_and_batch_rows_choose_for_themselves():
    row = SelectingRow((0, 1, 5, 7), WindowScores(4))
    mask = read_mask(row, SMALL, drive(row, SMALL, 0.7), 3).reshape(4, -1)
    assert len(np.unique(mask, axis=0)) > 1


def test_generation_keeps_what_the_oracle_keeps():
    plan = ScaleKV(7).plan(cache_shape(SMALL, 3))
    records, scale = draw_records(plan)
    for row, record in zip(plan.rows, records, strict=True):
        options = {"window": row.selector.window, "kernel": 5, "mode": "paper"}
        expected = scalekv_positions(record, SMALL, row.counts, scale=scale, **options)
        assert_reads(row, SMALL, record, expected)
    check_obeyed(plan, records, scale, 1e-5)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 4, 9, 16]))
def test_window_positions(height, width, window):
    assume(window <= min(height, width) ** 2)
    found = WindowScores(window).positions((height, width)).tolist()
    assert found == observing_tokens((height, width), window)
    assert sorted(set(found)) == found


# Budgets


@st.composite
def schedules(draw):
    sides = st.tuples(st.integers(1, 6), st.integers(1, 6))
    return ScaleSchedule(tuple(draw(st.lists(sides, min_size=1, max_size=6))))


@given(schedules(), st.integers(0, 90), st.integers(1, 7), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_every_scale_gets_the_mean_budget(schedule, budget, layers, seed):
    random = np.random.default_rng(seed)
    drafters = random.random((layers, schedule.num_scales)) < random.random()
    last, first = np.sort(random.random(2))
    counts = allocate(schedule, budget, drafters, (first, last))
    expected = np.minimum(budget, schedule.offsets[:-1])
    assert (counts.mean(0) <= expected).all()
    assert (counts.mean(0) > expected - 1).all()
    for step in range(1, schedule.num_scales):
        assert (counts[:, step] <= counts[:, step - 1] + schedule.tokens[step - 1]).all()
        alike = counts[~drafters[:, step], step]
        if alike.size and (alike < counts[~drafters[:, step], step - 1].min()).all():
            assert np.ptp(alike) == 0


@given(schedules(), st.integers(0, 90), st.integers(1, 5))
@settings(deadline=None)
def test_every_budget_has_a_window_that_fits(schedule, budget, layers):
    plan = ScaleKV(budget).plan(cache_shape(schedule, layers))
    counts = np.array([row.counts for row in plan.rows])
    window = plan.rows[0].selector.window
    assert window in (1, 4, 9, 16)
    assert window == fitting_window(schedule, counts)
    assert RetentionPlan.from_json(plan.to_json()) == plan


def test_drafters_grow_and_refiners_shrink():
    schedule, drafters = INFINITY, np.zeros((32, 13), bool)
    drafters[[0, 23], :12] = True
    drafters[0, 12] = True
    counts = allocate(schedule, 650, drafters, (600 / 650, 320 / 650))
    # Equal layers get equal budgets, so less than a token per layer is left over.
    assert (np.ceil(counts[:, 8:].mean(0)) == 650).all()
    assert (np.diff(counts[0, 7:]) > 0).all()
    assert (np.diff(counts[1, 8:12]) < 0).all()
    # Where drafters cannot take what refiners leave, it goes back to the refiners.
    assert counts[0, 8] == 521 + 400 == schedule.offsets[8]
    assert counts[1, 8] == (650 * 32 - 2 * 921) // 30


def make_stats(own, history):
    """Statistics with this attention to the own map and to the top earlier tokens, [layers, S]."""
    layers, scales = np.shape(own)
    density = np.zeros((layers, 1, scales, scales))
    index = np.arange(scales)
    density[:, 0, index, index] = own
    top = np.repeat(np.array(history, float)[..., None], len(TOP_COUNTS), axis=2)
    numbers = np.zeros((layers, scales))
    return LayerStats(VAR_256, numbers, numbers, density, top)


def test_drafters_are_the_layers_of_least_selectivity():
    random = np.random.default_rng(0)
    own, history = random.random((2, 8, 10))
    policy = ScaleKV(60, drafters=0.2)
    plan = policy.plan(cache_shape(VAR_256, 8), make_stats(own, history))
    compressed = [6, 7, 8, 9]  # the scales which find more than 60 tokens
    index = (own * history)[:, compressed]
    scores = sorted(
        ((index[layer, i] - index[:, i].mean()) / index[:, i].std(), layer, scale)
        for i, scale in enumerate(compressed)
        for layer in range(8)
    )
    drafters = np.zeros((8, 10), bool)
    for _, layer, scale in scores[:6]:
        drafters[layer, scale] = True
    expected = allocate(VAR_256, 60, drafters, (0.92, 0.49))
    np.testing.assert_array_equal([row.counts for row in plan.rows], expected)
    assert "6 of 32 layer-scale pairs, by selectivity" in plan.note
    assert "not by measurement" in policy.plan(cache_shape(VAR_256, 8)).note


# Options and files


def write_budgets(path, change):
    data = json.loads((GOLDEN / "scalekv" / "budget_2b.json").read_text())
    change(data)
    path.write_text(json.dumps(data))
    return str(path)


@pytest.mark.parametrize(
    ("change", "layers", "message"),
    [
        (lambda data: None, 30, "scale 9 has budgets for 32 layers, the model has 30"),
        (lambda data: data.update({"Scale 14": data["Scale 13"]}), 32, "scale 14, but .* 1-13"),
        (lambda data: data["Scale 9"].pop("Max"), 32, r"cannot read .*KeyError\('Max'\)"),
        (lambda data: data["Scale 9"].pop("Block 4"), 32, r"KeyError\('Block 4'\)"),
        (lambda data: data.update(x=1), 32, "cannot read the budget file .* expected"),
        (lambda data: data["Scale 9"].update(Min=9), 32, "16 tokens exceeds the 9"),
    ],
)
def test_budget_files_that_do_not_fit_are_refused(tmp_path, change, layers, message):
    path = write_budgets(tmp_path / "budget.json", change)
    with pytest.raises(AmskvError, match=message):
        ScaleKV(budget_file=path, window=16).plan(cache_shape(INFINITY, layers))


def test_budget_files_must_be_there_and_for_the_schedule(tmp_path):
    with pytest.raises(AmskvError, match="cannot read the budget file"):
        published_counts(str(tmp_path / "no.json"), INFINITY, 32)
    with pytest.raises(AmskvError, match=r"has budgets for scale 11, but the schedule has .* 1-10"):
        ScaleKV(budget_file=BUDGETS).plan(cache_shape(VAR_256, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 15}, r"must be a square grid of tokens \(1, 4, 9, 16, ...\), not 15"),
        ({"window": 0}, "must be a square grid of tokens .*, not 0"),
        ({"kernel": 4}, "kernel must be odd and positive, not 4"),
        ({"mode": "best"}, "unknown mode 'best' of ScaleKV: expected paper or reference"),
        ({"budget": -1}, "budget must be 0 or more tokens, not -1"),
        ({"budget": 5, "budget_file": BUDGETS}, "either a budget or a budget file, not both"),
        ({"drafters": 0.0}, "share of drafters must be above 0 and at most 1, not 0.0"),
        ({"refiners_first": 0.4}, "must shrink between 1 and 0, not go from 0.4 to 0.49"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        ScaleKV(**options)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (
            SMALL,
            {"budget": 3, "window": 9},
            "step 2 .*: the window of 3x3 tokens does not fit the 2x2",
        ),
        (VAR_256, {"budget": 12, "window": 16}, "window of 4x4 .* 3x3 map: take a smaller window"),
        (VAR_256, {"budget": 30, "window": 16}, "window of 16 tokens exceeds the 15 that are kept"),
    ],
)
def test_windows_that_do_not_fit_are_refused(schedule, options, message):
    with pytest.raises(AmskvError, match=message):
        ScaleKV(**options).plan(cache_shape(schedule, 16))


def test_statistics_that_do_not_fit_are_refused():
    stats = make_stats(np.ones((8, 10)), np.ones((8, 10)))
    with pytest.raises(AmskvError, match="statistics are of a model with 8 layers, this one has 9"):
        ScaleKV(60).plan(cache_shape(VAR_256, 9), stats)
    with pytest.raises(AmskvError, match="statistics are of a model with the scales"):
        ScaleKV(60).plan(cache_shape(INFINITY, 8), stats)
    with pytest.raises(UsageError, match="the 3 top tokens was not measured: expected 1, 4, 16"):
        ScaleKV(60, top=3).plan(cache_shape(VAR_256, 8), stats)
