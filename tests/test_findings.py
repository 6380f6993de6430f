"""What reports of studies say in sentences."""

import pytest

from amskv_jax.study.render import closer_than_full, verdict
from amskv_jax.study.sections import SECTIONS
from amskv_jax.study.summary import StudyResults


def record(section, label, seed, distance, recall=0.5, **more):
    return {
        "name": f"{section}/{label}/seed{seed}",
        "section": section,
        "label": label,
        "position": 0,
        "seed": seed,
        "frechet_distance": distance,
        "recall": recall,
        "precision": 0.7,
        "policy": "ams",
        "facts": {},
        "note": "",
        "saving": 0.5,
        "cache_bytes": 1000,
        **more,
    }


FULL = [record("full", "full", seed, distance, 0.4) for seed, distance in ((0, 2.0), (1, 2.1))]


def test_lower_distance_than_the_full_cache_is_explained():
    better = record("c", "ams 70%", 0, 1.5, 0.5)
    within_noise = record("d", "h2o 50%", 0, 1.98, 0.6)
    text = closer_than_full(StudyResults((*FULL, better, within_noise)))
    assert "ams 70% (-25.0%). The full cache has precision 0.700 and recall 0.400" in text
    assert "these have recall 0.500 to 0.500" in text
    assert closer_than_full(StudyResults((*FULL, within_noise))) == ""
    assert closer_than_full(StudyResults((FULL[0], better))) == ""  # noise is not known


@pytest.mark.parametrize(
    ("intermediate", "outcome"),
    [
        (2.1, "here too they are the least missed"),
        (2.42, "here they are missed no more and no less than the local ones"),
        (3.0, "here they are missed more than the local ones"),
    ],
)
def test_intermediate_scales_are_compared_beyond_noise(intermediate, outcome):
    distances = {"condensed": 4.0, "intermediate": intermediate, "local": 2.4}
    arms = [
        record("a", f"drop 1 {kind}", 0, value, facts={"kind": kind, "count": 1})
        for kind, value in distances.items()
    ]
    sentences = SECTIONS["a"].finding(StudyResults((*FULL, *arms)))
    assert SECTIONS["b"].finding(StudyResults((*FULL, *arms))) == []
    assert sentences[1] == f"The paper does without the intermediate scales; {outcome}."


def test_verdict_names_the_accuracy_that_a_saving_costs():
    full = FULL[0] | {"class_accuracy": 0.92}
    arm = record("c", "ams 90%", 0, 2.01, policy="ams", saving=0.9, class_accuracy=0.89)
    lines = verdict(StudyResults((full, arm))).splitlines()
    expected = "`c/ams 90%` (90.0%) saves most while losing at most 1% (+0.5%); accuracy 89.0%, "
    assert len(lines) == 2
    assert all(line.endswith(expected + "full cache 92.0%.") for line in lines)
