"""The cells of a study: what they cache, their names and their order."""

import hashlib
import json
from pathlib import Path

import pytest
from small_evaluation import LARGE, TRANSFORMER, make_stats

from amskv_jax.configs import get
from amskv_jax.errors import UsageError
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.budgets import memory_report
from amskv_jax.study.cells import IMPORTANCE, order_cells, plan_arms, study_arms
from amskv_jax.study.sections import SECTIONS

RECORDED = json.loads((Path(__file__).parent / "golden/study/plans.json").read_text())
STATS = Path(__file__).parents[1] / "docs/study/stats.npz"


def planned(config, stats):
    arms = study_arms("abcdefg", config.cache_shape, "bfloat16")
    return arms, *plan_arms(arms, config.cache_shape, stats)


@pytest.fixture(scope="module")
def study():
    arms, plans, impossible = planned(LARGE, make_stats(LARGE))
    assert not impossible
    return arms, plans


@pytest.fixture(scope="module")
def arms(study):
    return study[0]


@pytest.fixture(scope="module")
def plans(study):
    return study[1]


def saving(plan):
    report = memory_report(plan, LARGE.cache_shape)
    return report.saving(report.full)


@pytest.mark.parametrize("name", RECORDED)
def test_arms_and_plans_are_those_that_were_recorded(name):
    """Labels, policies, dtypes, plans and refusals of before there were sections."""
    config, stats = {
        "var-cifar10": lambda: (get("var-cifar10").model.transformer, LayerStats.load(STATS)),
        "made": lambda: (LARGE, make_stats(LARGE)),
        "three-scales": lambda: (TRANSFORMER, make_stats(TRANSFORMER)),
    }[name]()
    arms, plans, impossible = planned(config, stats)
    found = {
        name: [
            *(arms[name].label, arms[name].policy, arms[name].dtype),
            hashlib.sha256(plan.to_json().encode()).hexdigest(),
        ]
        for name, plan in plans.items()
    }
    assert found == RECORDED[name]["arms"]
    assert impossible == RECORDED[name]["impossible"]
    assert list(found) == list(RECORDED[name]["arms"])  # the positions in the results


def test_every_section_has_arms_with_names_of_their_own(arms):
    assert {arm.section for arm in arms.values()} == {"full", *SECTIONS}
    assert sorted(IMPORTANCE) == list(SECTIONS)
    for name in arms:
        assert name.count("/") == 1
        assert " " not in name


def test_arms_save_what_their_names_say(arms, plans):
    for name, arm in arms.items():
        if arm.section in "cd":
            target = float(arm.label.rpartition(" ")[2].rstrip("%")) / 100
            assert arm.facts["target"] == pytest.approx(target)
            assert target <= saving(plans[name]) < target + 0.06, name


def test_dropped_scales_are_never_cached(plans):
    row = plans["a/drop-3-intermediate"].rows[0]
    assert [segment.scale for segment in row.keep[-1]] == [0, 1, 2, 6, 7, 8]
    row = plans["a/drop-1-local"].rows[0]
    assert [segment.scale for segment in row.keep[-1]] == [0, 1, 2, 3, 4, 5, 6, 7]
    row = plans["a/drop-1-condensed"].rows[0]
    assert [segment.scale for segment in row.keep[2]] == [1]


def test_upside_down_gives_the_larger_capacity_to_as_many_other_layers(plans):
    similar, wrong = (
        {i for i, row in enumerate(plans[name].rows) if row.capacity > 105}
        for name in ("b/S2-by-similarity-105-274", "b/S2-upside-down-105-274")
    )
    assert len(similar) == len(wrong) > 0
    assert min(similar) < min(wrong)  # in these statistics later layers are more similar
    assert max(similar) < max(wrong)


def test_theta_sweep_covers_all_numbers_of_demanding_layers(plans):
    bytes_ = [
        memory_report(plans[f"f/{count}-demanding-layers"], LARGE.cache_shape).plan
        for count in range(7)
    ]
    assert bytes_ == sorted(set(bytes_))


def test_other_dtype_costs_twice_the_bytes(arms, plans):
    names = "full/full", "g/full-float32"
    sizes = [memory_report(plans[name], LARGE.cache_shape, arms[name].dtype).plan for name in names]
    assert sizes[1] == 2 * sizes[0]


def test_important_cells_come_first(arms, plans):
    cells = [cell.name for cell in order_cells(arms, plans, (3, 4))]
    assert cells[:3] == ["full/full/seed3", "full/full/seed4", "c/ams-70.0%/seed3"]
    order = ["c3", "c4", "d3", "d4", "a3", "b3", "b4", "f3", "e3", "g3", "a4", "f4", "e4", "g4"]
    found = list(dict.fromkeys(name[0] + name[-1] for name in cells if "full/full/" not in name))
    assert found == order


def test_unknown_sections_are_refused():
    with pytest.raises(UsageError, match="unknown sections 'cx'"):
        study_arms("cx", LARGE.cache_shape, "bfloat16")
