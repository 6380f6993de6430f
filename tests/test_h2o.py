"""H2O: which tokens are heavy hitters, against a slow oracle; and its options."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stats import cache_shape
from selecting_oracle import assert_reads, h2o_positions

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.runtime_rows import SelectingRow
from amskv_jax.plan.selectors import HeavyHitters, attention_mass
from amskv_jax.policies import H2O
from amskv_jax.policies.base import default_budget
from amskv_jax.schedule import VAR_256, ScaleSchedule
from amskv_jax.testing import check_obeyed, draw_records, drive, read_mask

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SMALL = ScaleSchedule.square((1, 2, 3, 4))
OBLONG = ScaleSchedule(((1, 1), (1, 2), (2, 3), (3, 5), (4, 7), (2, 2), (3, 3)))
CASES = [
    (SMALL, (0, 1, 4, 9), 2),
    (SMALL, (0, 1, 3, 3), 0),
    (SMALL, (0, 0, 4, 4), 4),  # nothing at first
    (SMALL, (0, 1, 5, 14), 1),  # nothing is dropped
    (OBLONG, (0, 1, 3, 7, 7, 20, 11), 3),  # more, then less
    (OBLONG, (0, 1, 2, 2, 17, 0, 4), 2),
]


@pytest.mark.parametrize(("schedule", "counts", "recent"), CASES)
def test_kept_tokens_are_those_of_the_oracle(schedule, counts, recent):
    row = SelectingRow(counts, HeavyHitters(recent))
    record = drive(row, schedule, 0.7)
    expected = h2o_positions(record, schedule, counts, recent=recent, scale=0.7)
    assert_reads(row, schedule, record, expected)
    check_obeyed(RetentionPlan(schedule, (row,)), [record], 0.7, 1e-5)


def test_heads_and_batch_rows_choose_for_themselves():
    row = SelectingRow((0, 1, 4, 9), HeavyHitters(2))
    mask = read_mask(row, SMALL, drive(row, SMALL, 0.7), 3).reshape(4, -1)
    assert len(np.unique(mask, axis=0)) > 1


def test_generation_keeps_what_the_oracle_keeps():
    plan = H2O(6, recent=0.4).plan(cache_shape(SMALL, 3))
    records, scale = draw_records(plan)
    row = plan.rows[0]
    assert row.selector.recent == 2
    for record in records:
        expected = h2o_positions(record, SMALL, row.counts, recent=2, scale=scale)
        assert_reads(row, SMALL, record, expected)
    check_obeyed(plan, records, scale, 1e-5)


@pytest.mark.parametrize("limit", [1, 4 * 4 * 2 * 11, 3 * 4 * 4 * 2 * 11, 10**9])
def test_attention_mass_in_chunks(limit):
    query, key = (
        jax.random.normal(jax.random.key(i), (2, length, 4, 8)) for i, length in enumerate((7, 11))
    )
    logits = 0.3 * np.einsum("btnh,bsnh->bnts", query, key)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)).sum(2)
    found = attention_mass(query, key, 0.3, limit)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@given(st.integers(0, 500), st.floats(0, 1))
@settings(deadline=None)
def test_counts_are_the_budget_or_everything(budget, recent):
    plan = H2O(budget, recent).plan(cache_shape(VAR_256, 3))
    assert plan.rows[0].counts == tuple(min(budget, offset) for offset in VAR_256.offsets[:-1])
    assert 0 <= plan.rows[0].selector.recent <= budget
    assert RetentionPlan.from_json(plan.to_json()) == plan


def test_default_budget_is_that_of_ams():
    assert H2O().plan(cache_shape(VAR_256, 30)).rows[0].capacity == default_budget(
        cache_shape(VAR_256, 30)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H2O(-1), "budget must be 0 or more tokens, not -1"),
        (lambda: H2O(recent=1.5), "recent share must lie between 0 and 1, not 1.5"),
        (lambda: HeavyHitters(-1), "recent tokens must be 0 or more, not -1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"counts": [0, 1, 2, 2]}, "step 2 .* 3 recent tokens exceed the 2 that are kept"),
        ({"counts": [0, 1, 6, 9]}, "step 2 .* keeps 6 tokens, but 5 are at hand"),
        ({"counts": [0, 1, -1, 9]}, "step 2 .* keeps -1 tokens"),
        ({"counts": [0, 1, 5]}, "has 3 steps, but the schedule has 4 scales"),
        ({"counts": [0, 1, 5, 9], "selector": {"name": "best"}}, "selector 'best', but there are"),
        ({"counts": [0, 1, 5, 9], "selector": {"name": "heavy_hitters", "x": 1}}, "'x'"),
        ({"counts": [0, 1, 5, 9], "selector": {}}, "name"),
    ],
)
def test_impossible_rows_are_refused(keep, message):
    row = {"kind": "selecting", "selector": {"name": "heavy_hitters", "recent": 3}} | keep
    with pytest.raises(AmskvError, match=message):
        RetentionPlan.from_keep(SMALL, [row])
