"""The study's first table: scores that `amskv score` wrote into its folder."""

import json

import pytest
from checks import message

from amskv_jax.study.scores import score_report

FIGURE = {"mean": 0.01234, "error": 0.001, "scales": []}


def record(saving, numbers="float32", mean=0.01234, *, states_formats=False):
    figure = FIGURE | {"mean": mean}
    return {
        "saving": saving,
        "cache_dtype": numbers,
        "states_formats": states_formats,
        "above_full": figure,
        "divergence": figure,
    }


def write(path, policies, **other):
    found = {"fingerprint": "one", "dtype": "float32", "device": "cpu", "pictures": 64}
    path.write_text(json.dumps(found | {"policies": policies} | other))


def test_all_files_make_one_report(tmp_path):
    own = {"explicit:plan.json": record(0.9003, mean=-0.00001, states_formats=True)}
    write(tmp_path / "score-a.json", own, pictures=1000)
    coded = {
        "window:saving=0.4,size=3, int4": record(0.844, "int4"),
        "window:size=3": record(0.5),
        "window:saving=0.85,size=3": record(0.86, mean=0.5),
        "window:saving=0.9,size=3": record(0.894, mean=0.75),
        "window:size=3, int2": record(0.96, "int2", mean=0.625),
    }
    write(tmp_path / "score-b.json", coded)
    heading, text, _, budgets, opening, table, closing, following = score_report(tmp_path, "one")
    assert heading.startswith("## ")
    assert following.startswith("## ")
    assert text.startswith("64 or 1000 held-out pictures")
    assert budgets.splitlines() == [
        "| policy | numbers | 75.0% | 85.0% | 90.0% | 95.0% | 97.5% |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| `explicit:plan.json` | its own |  |  | 0.0000 ± 0.0010 |  |  |",
        "| `window:size=3` | 16 bits |  | 0.5000 ± 0.0010 | 0.7500 ± 0.0010 |  |  |",
        "| `window:size=3` | best | 0.0123 ± 0.0010 `int4` | 0.0123 ± 0.0010 `int4` "
        "| 0.6250 ± 0.0010 `int2` | 0.6250 ± 0.0010 `int2` |  |",
    ]
    assert (opening, closing) == ("<details><summary>All cells</summary>", "</details>")
    rows = table.splitlines()[2:]
    assert len(rows) == 6
    assert rows[:2] == [
        "| `window:size=3` | float32 | 50.0% | 0.0123 ± 0.0010 | 0.0123 ± 0.0010 |",
        "| `window:saving=0.4,size=3` | int4 | 84.4% | 0.0123 ± 0.0010 | 0.0123 ± 0.0010 |",
    ]
    assert (
        rows[4] == "| `explicit:plan.json` | its own | 90.0% | 0.0000 ± 0.0010 | 0.0000 ± 0.0010 |"
    )


def test_a_study_may_have_none(tmp_path):
    assert not list(score_report(tmp_path, "one"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "score.json holds no score: write it with `amskv score --out`"),
        (json.dumps({"fingerprint": "one", "policies": {"a": {}}}), "holds no score"),
        (json.dumps({"fingerprint": "two", "policies": {}}), "is the score of another model (two)"),
    ],
)
def test_files_that_are_none(tmp_path, content, expected):
    (tmp_path / "score.json").write_text(content)
    assert expected in message(list, score_report(tmp_path, "one"))
