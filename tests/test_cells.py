"""The cells of a study: what they cache, their names and their order."""

import pytest
from test_evaluation import LARGE, make_stats

from amskv_jax.errors import UsageError
from amskv_jax.policies.budgets import memory_report
from amskv_jax.study.cells import SECTIONS, order_cells, study_arms


@pytest.fixture(scope="module")
def arms():
    arms, impossible = study_arms(LARGE.cache_shape, make_stats(LARGE), "abcdefg")
    assert not impossible
    return {arm.name: arm for arm in arms}


def saving(arm):
    report = memory_report(arm.plan, LARGE.cache_shape)
    return report.saving(report.full)


def test_every_section_has_arms_with_names_of_their_own(arms):
    assert {arm.section for arm in arms.values()} == {"full", *SECTIONS}
    for name in arms:
        assert name.count("/") == 1
        assert " " not in name


def test_arms_save_what_their_names_say(arms):
    for name, arm in arms.items():
        if arm.section in "cd":
            target = float(arm.label.rpartition(" ")[2].rstrip("%")) / 100
            assert target <= saving(arm) < target + 0.06, name


def test_dropped_scales_are_never_cached(arms):
    row = arms["a/drop-3-intermediate"].plan.rows[0]
    assert [segment.scale for segment in row.keep[-1]] == [0, 1, 2, 6, 7, 8]
    row = arms["a/drop-1-local"].plan.rows[0]
    assert [segment.scale for segment in row.keep[-1]] == [0, 1, 2, 3, 4, 5, 6, 7]
    row = arms["a/drop-1-condensed"].plan.rows[0]
    assert [segment.scale for segment in row.keep[2]] == [1]


def test_upside_down_gives_the_larger_capacity_to_as_many_other_layers(arms):
    similar, wrong = (
        {i for i, row in enumerate(arms[name].plan.rows) if row.capacity > 105}
        for name in ("b/S2-by-similarity-105-274", "b/S2-upside-down-105-274")
    )
    assert len(similar) == len(wrong) > 0
    assert min(similar) < min(wrong)  # in these statistics later layers are more similar
    assert max(similar) < max(wrong)


def test_theta_sweep_covers_all_numbers_of_demanding_layers(arms):
    bytes_ = [
        memory_report(arms[f"f/{count}-demanding-layers"].plan, LARGE.cache_shape).plan
        for count in range(7)
    ]
    assert bytes_ == sorted(set(bytes_))


def test_other_dtype_costs_twice_the_bytes(arms):
    full, other = arms["full/full"], arms["g/full-float32"]
    sizes = [memory_report(arm.plan, LARGE.cache_shape, arm.dtype).plan for arm in (full, other)]
    assert sizes[1] == 2 * sizes[0]


def test_important_cells_come_first(arms):
    cells = [cell.name for cell in order_cells(arms.values(), (3, 4))]
    assert cells[:3] == ["full/full/seed3", "full/full/seed4", "c/ams-70.0%/seed3"]
    order = ["c3", "c4", "d3", "d4", "a3", "b3", "b4", "f3", "e3", "g3", "a4", "f4", "e4", "g4"]
    found = list(dict.fromkeys(name[0] + name[-1] for name in cells if "full/full/" not in name))
    assert found == order


def test_unknown_sections_are_refused():
    with pytest.raises(UsageError, match="unknown sections 'cx'"):
        study_arms(LARGE.cache_shape, make_stats(LARGE), "cx")
