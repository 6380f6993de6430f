"""Per-head plans: blocks chosen and lent against a slow oracle, attention per head, options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stats import cache_shape

from amskv_jax.attention import QKV
from amskv_jax.cache.layout import slots_of
from amskv_jax.cache.store import Store
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.numbers import NUMBERS
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import HeadRow, Segment, StaticRow
from amskv_jax.plan.stats import TOP_COUNTS, LayerStats
from amskv_jax.policies import Explicit, Full, Heads
from amskv_jax.policies.heads import choose_blocks, head_mass, head_row
from amskv_jax.schedule import VAR_256, ScaleSchedule
from amskv_jax.testing import (
    LayerRecord,
    check_obeyed,
    dense_attention,
    draw_records,
    drive,
    read_mask,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SMALL = ScaleSchedule.square((1, 2, 3, 4))
OBLONG = ScaleSchedule(((1, 1), (2, 3), (3, 5), (2, 2), (4, 7), (3, 3)))


def make_stats(schedule, layers, heads, seed=0):
    """Made-up statistics in which every head attends in its own way."""
    random = np.random.default_rng(seed)
    scales = schedule.num_scales
    density = np.tril(random.random((layers, heads, scales, scales)) ** 4)
    density /= density.sum(-1, keepdims=True)
    numbers, top = np.zeros((layers, scales)), np.zeros((layers, scales, len(TOP_COUNTS)))
    return LayerStats(schedule, numbers, numbers, density, top)


def kept_by_oracle(stats, budget, protected):
    """The scales read per layer, head and step, by explicit loops."""
    tokens = stats.schedule.tokens
    scales = len(tokens)
    layers, heads = stats.head_density.shape[:2]
    blocks, chosen, left = [], {}, budget * layers * heads
    for layer in range(layers):
        for head in range(heads):
            chosen[layer, head] = set(range(min(protected, scales - 1)))
            left -= sum(tokens[scale] for scale in chosen[layer, head])
            for scale in range(protected, scales - 1):
                mass = 0.0
                for later in range(scale + 1, scales):
                    mass += stats.head_density[layer, head, later, scale]
                mass /= scales - 1 - scale
                blocks.append((-mass / tokens[scale], layer, head, scale))
    for _, layer, head, scale in sorted(blocks):
        if tokens[scale] <= left:
            left -= tokens[scale]
            chosen[layer, head].add(scale)

    kept = {}
    for owner, final in chosen.items():
        capacity = sum(tokens[scale] for scale in final)
        alive, kept[owner] = set(), [set()]
        for step in range(1, scales):
            alive.add(step - 1)
            reads = alive & final
            room = capacity - sum(tokens[scale] for scale in reads)
            for scale in sorted(alive - final, reverse=True):
                if tokens[scale] <= room:
                    room -= tokens[scale]
                    reads.add(scale)
            alive = set(reads)
            kept[owner].append(reads)
    return kept


@pytest.mark.parametrize(
    ("schedule", "budget", "protected"),
    [(SMALL, 5, 2), (SMALL, 9, 0), (OBLONG, 20, 1), (OBLONG, 11, 2), (VAR_256, 150, 2)],
    ids=str,
)
def test_kept_scales_are_those_of_the_oracle(schedule, budget, protected):
    stats = make_stats(schedule, 3, 4)
    plan = Heads(budget, protected).plan(cache_shape(schedule, 3, 4), stats)
    oracle = kept_by_oracle(stats, budget, protected)
    found = {
        (layer, head): [{segment.scale for segment in step} for step in static.keep]
        for layer, row in enumerate(plan.rows)
        for head, static in enumerate(row.heads)
    }
    assert found == oracle


@given(st.integers(1, 12), st.integers(5, 60), st.integers(0, 2), st.integers(1, 6), st.integers(0))
@settings(deadline=None)
def test_choices_keep_budget_protection_and_patterns(heads, budget, protected, patterns, seed):
    random = np.random.default_rng(seed)
    tokens = np.array([1, 4, 9, 16, 25])
    mass = random.random((heads, 5)) ** random.integers(1, 9)
    chosen = choose_blocks(mass, tokens, budget, protected, patterns)
    assert chosen[:, :protected].all()
    assert len(np.unique(chosen, axis=0)) <= patterns
    spent = (chosen @ tokens).sum()
    assert spent <= budget * heads
    free = choose_blocks(mass, tokens, budget, protected)
    missing = np.broadcast_to(tokens, free.shape)[~free]
    left = budget * heads - (free @ tokens).sum()
    assert not (missing <= left).any(), "another block fits"
    if len(np.unique(free, axis=0)) <= patterns:
        return
    # Heads that have to share few patterns do at least as well as if all were alike.
    alike = choose_blocks(mass.mean(0, keepdims=True), tokens, budget, protected, 1)
    assert (mass * chosen).sum() >= (mass * alike).sum() - 1e-9


def test_one_pattern_is_that_of_the_average_head():
    stats = make_stats(VAR_256, 4, 3)
    plan = Heads(150, patterns=1).plan(cache_shape(VAR_256, 4, 3), stats)
    mass = head_mass(stats.head_density).reshape(12, -1)
    tokens = np.array(VAR_256.tokens[:-1])
    expected = choose_blocks(mass.mean(0, keepdims=True), tokens, 150, 2, 1)[0]
    assert {row for heads in plan.rows for row in heads.heads} == {head_row(VAR_256, expected)}
    assert "1 different sets of scales" in plan.note


def test_the_budget_is_the_mean_of_what_is_allocated():
    stats = make_stats(VAR_256, 8, 4)
    for budget in (5, 50, 200, 423):
        for patterns in (2, 8, None):
            plan = Heads(budget, patterns=patterns).plan(cache_shape(VAR_256, 8, 4), stats)
            slots = sum(row.head_slots(4) for row in plan.rows)
            assert 32 * budget - 256 < slots <= 32 * budget


def test_everything_is_the_full_cache():
    plan = Heads(424).plan(cache_shape(VAR_256, 2, 3), make_stats(VAR_256, 2, 3))
    full = Full().plan(cache_shape(VAR_256, 1))
    assert [row.groups for row in plan.rows] == [{full.rows[0]: (0, 1, 2)}] * 2


def test_every_head_attends_to_its_own_scales():
    stats = make_stats(OBLONG, 1, 5, seed=3)
    plan = Heads(14, 1, patterns=3).plan(cache_shape(OBLONG, 1, 5), stats)
    row = plan.rows[0]
    groups = list(row.groups.values())
    assert len(groups) > 1
    assert np.concatenate(groups).tolist() != [0, 1, 2, 3, 4], "heads are put in order again"
    check_obeyed(plan, [drive(row, OBLONG, 0.7, heads=5)], 0.7, 1e-5)


def test_generation_obeys_the_plan():
    plan = Heads(7, 1).plan(cache_shape(SMALL, 3, 2), make_stats(SMALL, 3, 2))
    assert len(set(plan.rows)) > 1
    records, scale = draw_records(plan)
    check_obeyed(plan, records, scale, 1e-5)


def test_plan_files_name_every_pattern_once():
    plan = Heads(150).plan(cache_shape(VAR_256, 4, 3), make_stats(VAR_256, 4, 3))
    assert RetentionPlan.from_json(plan.to_json()) == plan


def test_bytes_are_those_of_the_heads_together():
    whole = StaticRow.from_scales(SMALL, [range(i) for i in range(4)])
    little = StaticRow.from_scales(SMALL, [[], [0], [0], [0]])
    plan = RetentionPlan(SMALL, (HeadRow((whole, little, little)),) * 2)
    report = MemoryReport.of(plan, CacheGeometry(4, 3, 8, NUMBERS["bfloat16"]))
    assert report.plan == 2 * 4 * (14 + 1 + 1) * 2 * 8 * 2


def test_what_one_head_drops_another_fills():
    """Slots of all heads together are the most that any step reads, and all kinds of parts fit."""
    early = StaticRow.from_scales(OBLONG, [[], [0], [0, 1], [1, 2], [1], []])
    late = StaticRow.from_scales(OBLONG, [[], [], [], [], [3], [3, 4]])
    parts = [[], [], [(1, 1, 3), (1, 4, 6)], [(1, 4, 6), (2, 3, 9)], [(2, 3, 9)], [(4, 5, 27)]]
    cut = StaticRow(tuple(tuple(Segment(*part) for part in step) for step in parts))
    row = HeadRow((early, late, cut, late, early))
    assert row.head_slots(5) == 2 * (28 + 4) + 22 < sum(head.capacity for head in row.heads)
    slots = slots_of((row,) * 3, OBLONG, Store(NUMBERS["bfloat16"]))
    buffers = jax.tree.leaves(slots.init(3, 2, 5, 8))
    report = MemoryReport.of(RetentionPlan(OBLONG, (row,) * 3), CacheGeometry(2, 5, 8))
    assert sum(leaf.nbytes for leaf in buffers) == report.plan
    check_obeyed(RetentionPlan(OBLONG, (row,)), [drive(row, OBLONG, 0.7, heads=5)], 0.7, 1e-5)


@st.composite
def head_rows(draw, heads):
    """Rows whose heads drop whole scales and single tokens at random."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(heads):
        alive, kept = np.zeros(SMALL.total, bool), []
        for step in range(SMALL.num_scales):
            kept.append(alive.copy())
            alive[SMALL.slice(step)] = True
            alive[random.random(SMALL.total) < 0.2] = False
            for scale in np.flatnonzero(random.random(SMALL.num_scales) < 0.3):
                alive[SMALL.slice(scale)] = False
        rows.append(StaticRow.from_positions(SMALL, kept))
    return HeadRow(tuple(rows))


@given(head_rows(3))
@settings(deadline=None, max_examples=15)
def test_heads_read_their_own_tokens_whatever_is_dropped(row):
    plan = RetentionPlan(SMALL, (row,))
    check_obeyed(plan, [drive(row, SMALL, 0.7, heads=3)], 0.7, 1e-5)


@pytest.fixture(scope="module")
def exact():
    """A row whose heads keep different scales, and what it does with exact numbers."""
    whole = StaticRow.from_scales(SMALL, [range(i) for i in range(4)])
    little = StaticRow.from_scales(SMALL, [[], [0], [1], [2]])
    row = HeadRow((little, whole, little))
    return row, drive(row, SMALL, 0.7, heads=3, numbers=NUMBERS["float32"])


@pytest.mark.parametrize("numbers", NUMBERS)
def test_codes_of_every_format_reach_their_heads(numbers, exact):
    row, exact = exact
    coded = drive(row, SMALL, 0.7, heads=3, numbers=NUMBERS[numbers])

    def through(part):  # what the cache makes of keys and values
        return np.asarray(NUMBERS[numbers].decode(NUMBERS[numbers].encode(part), "float32"))

    for step in range(SMALL.num_scales):
        mask = read_mask(row, SMALL, exact, step)
        keys, values = (
            [*map(through, parts[:step]), parts[step]] for parts in (exact.key, exact.value)
        )
        record = LayerRecord(exact.query, keys, values, exact.output, exact.cache)
        expected = dense_attention(record, step, mask, 0.7)
        np.testing.assert_allclose(coded.output[step], expected, atol=1e-5)


def test_one_attention_serves_all_heads():
    """Two products, of queries with keys and of weights with values, however many patterns."""
    random = np.random.default_rng(0)
    chosen = random.random((12, 3)) < 0.5
    row = HeadRow(tuple(head_row(SMALL, scales) for scales in chosen))
    assert len(row.groups) > 4
    slots = slots_of((row,), SMALL, Store(NUMBERS["float32"]))
    cache = slots.init(1, 2, 12, 8)
    for step, tokens in enumerate(SMALL.tokens):
        qkv = QKV(*[jnp.zeros((2, tokens, 12, 8))] * 3)
        program = jax.make_jaxpr(slots.attend, static_argnums=(2, 4, 5))
        text = str(program(cache, jnp.int32(0), step, qkv, 0.7, "xla"))
        assert text.count("dot_general[") == 2


def plan_of(heads):
    return RetentionPlan(SMALL, (HeadRow(heads),))


def test_plans_for_another_number_of_heads_are_refused(tmp_path):
    plan = Heads(7).plan(cache_shape(SMALL, 2, 3), make_stats(SMALL, 2, 3))
    message = "is for 3 heads a layer, the model has 2: make one from this model's calibration"
    with pytest.raises(AmskvError, match=message):
        draw_records(plan)
    with pytest.raises(AmskvError, match=message):
        MemoryReport.of(plan, CacheGeometry(2, 2, 8))
    with pytest.raises(AmskvError, match=message):
        plan.check(cache_shape(SMALL, 2, 2))
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert Explicit(str(path)).plan(cache_shape(SMALL, 2, 3)) == plan
    with pytest.raises(AmskvError, match=rf"plan\.json: .*{message}"):
        Explicit(str(path)).plan(cache_shape(SMALL, 2, 2))
    with pytest.raises(AmskvError, match="a model with 3 heads a layer, this one has 2: calibrate"):
        Heads(7).plan(cache_shape(SMALL, 2, 2), make_stats(SMALL, 2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heads(-1), "budget must be 0 or more tokens, not -1"),
        (lambda: Heads(protected=-1), "protected must be 0 or more scales, not -1"),
        (lambda: Heads(patterns=0), "patterns must be 1 or more, not 0"),
        (lambda: Heads(7).plan(cache_shape(SMALL, 2)), "needs the attention of a calibration run"),
        (
            lambda: Heads(4).plan(cache_shape(SMALL, 2, 2), make_stats(SMALL, 2, 2)),
            "budget is 4 tokens, but the 2 protected scales need 5: raise the budget",
        ),
        (
            lambda: Heads(7).plan(cache_shape(SMALL, 3, 2), make_stats(SMALL, 2, 2)),
            "statistics are of a model with 2 layers, this one has 3",
        ),
        (
            lambda: Heads(7).plan(cache_shape(SMALL, 2, 2), make_stats(OBLONG, 2, 2)),
            "statistics are of a model with the scales 1, 2x3",
        ),
        (lambda: plan_of(()), "layer 0 of the retention plan has no heads"),
        (
            lambda: plan_of((StaticRow(((), (), (), ())), StaticRow(((), ((1, 0, 1),), (), ())))),
            "layer 0, head 1, step 1 .* scale 1, which is not an earlier scale",
        ),
        (
            lambda: RetentionPlan.from_keep(
                SMALL, [{"kind": "heads", "rows": [[[], [], [], []]], "heads": [1]}]
            ),
            "layer 0 of the retention plan: expected",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises((AmskvError, UsageError), match=message):
        make()
