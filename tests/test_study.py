"""The study: what it runs and reports, and that it survives being killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_study
from small_evaluation import MEAN_COLOUR
from small_study import COMPARISON, EXTENT, comparable, draw_window, load, run

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.results import add_cells, read_arrays
from amskv_jax.files import read_json_lines
from amskv_jax.study import devices as module
from amskv_jax.study.render import render_study
from amskv_jax.study.study import Extent, run_study


@pytest.fixture(autouse=True)
def kill_nothing(monkeypatch):
    monkeypatch.setattr(small_study.FakeDrawer, "kill_at", -1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory, lines = tmp_path_factory.mktemp("study"), []
    assert run(directory, report=lines.append) == []
    return directory, lines, small_study.FakeDrawer.drawn


def test_every_cell_has_a_result(whole):
    directory, lines, drawn = whole
    records = comparable(directory)
    assert {"real/held-out", "full/full/seed0", "full/full/seed1"} <= records.keys()
    cells = [record for record in records.values() if "seed" in record]
    assert sum(line.startswith("[") for line in lines) == len(cells)
    distinct = [r for r in read_json_lines(directory / "results.jsonl") if "draw_seconds" in r]
    assert drawn == len([r for r in distinct if "same_as" not in r])
    impossible = records["c/ams-90.0%"]["impossible"]
    assert "the smallest" in impossible
    for record in cells:
        compared = record["section"] != "full" and record["cache_bytes"] < 2560
        assert "frechet_distance" in record
        assert not compared or record["ssim"] < 1


def test_equal_plans_are_drawn_once(whole):
    records = read_json_lines(whole[0] / "results.jsonl")
    twins = [record for record in records if "same_as" in record]
    named = {record["name"]: record for record in records}
    assert twins
    for twin in twins:
        original = named[twin["same_as"]]
        assert twin["cache_bytes"] == original["cache_bytes"]
        assert twin["frechet_distance"] == original["frechet_distance"]


def test_samples_hold_a_picture_per_class(whole):
    samples = read_arrays(whole[0] / "samples.npz")
    assert list(samples.pop("classes")) == []
    assert {pixels.shape for pixels in samples.values()} == {(3, 12, 12, 3)}
    assert "full|full|seed0" in samples


def run_python(code, cwd, *arguments, **environment):
    """Run code, which may import what is here, in a process of its own; return its exit code."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=cwd,  # not where the package's sources would hide the installed one
        check=False,
    ).returncode


TWO_DEVICES = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}


@pytest.mark.parametrize(("kill_at", "devices"), [(1, {}), (4, {}), (5, TWO_DEVICES)])
def test_killed_study_loses_the_cells_it_was_at(whole, tmp_path, kill_at, devices):
    code = f"import small_study as t; t.FakeDrawer.kill_at = {kill_at}; t.run({str(tmp_path)!r})"
    assert run_python(code, tmp_path, **devices) == -signal.SIGKILL
    records = read_json_lines(tmp_path / "results.jsonl")
    finished = [r for r in records if "draw_seconds" in r and "same_as" not in r]
    at_once = 2 if devices else 1
    assert kill_at - (at_once - 1) <= len(finished) <= kill_at
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"name": "half')
    compared = [r for r in finished if r["section"] != "full"]
    originals = list(tmp_path.glob("originals-*.npz"))  # perhaps not measured, but there
    assert run(tmp_path) == []
    assert small_study.FakeDrawer.drawn == whole[2] - len(compared) - len(originals)
    assert comparable(tmp_path) == comparable(whole[0])


def test_devices_share_the_cells(whole, tmp_path):
    assert (
        run_python(f"from small_study import run; run({str(tmp_path)!r})", tmp_path, **TWO_DEVICES)
        == 0
    )
    assert comparable(tmp_path) == comparable(whole[0])
    records = [r for r in read_json_lines(tmp_path / "results.jsonl") if "seed" in r]
    assert {record["device_id"] for record in records} == {0, 1}
    devices = {}
    for record in records:  # every program draws all its seeds on one device
        arm = record["name"].rpartition("/")[0]
        assert (
            "same_as" in record
            or devices.setdefault(arm, record["device_id"]) == record["device_id"]
        )


def test_nothing_begins_after_an_error():
    device, begun = jax.devices()[0], []

    def fail():
        begun.append("fails")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        module.run_on_devices([(device, fail), (device, lambda: begun.append("after"))])
    assert begun == ["fails"]


@pytest.mark.slow
def test_pictures_do_not_depend_on_the_device(tmp_path):
    code = "import sys; from small_study import *; assert draw_window(Path(sys.argv[1])) == [0, 1]"
    assert run_python(code, tmp_path, tmp_path / "two", **TWO_DEVICES) == 0
    assert draw_window(tmp_path / "one") == [0, 0]
    assert comparable(tmp_path / "one") == comparable(tmp_path / "two")
    assert comparable(tmp_path / "one")["d/window-75%/seed0"]["ssim"] < 1


def test_time_limit_leaves_the_rest(whole, tmp_path):
    left = run(tmp_path, extent=Extent(sections="cdg", batch=5, stop_after=0.0))
    assert left[0].name == "full/full/seed0"
    assert run(tmp_path) == []
    assert comparable(tmp_path) == comparable(whole[0])


def test_lost_originals_are_drawn_again(whole, tmp_path):
    run(tmp_path, extent=Extent(sections="c", batch=5))
    for path in tmp_path.glob("originals-*"):
        path.unlink()
    run(tmp_path)
    assert comparable(tmp_path) == comparable(whole[0])


def test_only_chosen_cells_run(tmp_path):
    run(tmp_path, extent=Extent(sections="cdg", only="d/window-75%", seeds=(1,), batch=5))
    names = [r["name"] for r in read_json_lines(tmp_path / "results.jsonl") if "seed" in r]
    assert names == ["full/full/seed1", "d/window-75%/seed1"]


def test_cells_that_fail_do_not_stop_the_others(whole, tmp_path, monkeypatch):
    class Failing(small_study.FakeDrawer):
        def __init__(self, sampler, params, conditions, controls, batch, **how):
            if "sliding" in sampler.plan.note:
                raise RuntimeError("RESOURCE_EXHAUSTED: too large\nand more")
            super().__init__(sampler, params, conditions, controls, batch)

    monkeypatch.setattr(small_study, "FakeDrawer", Failing)
    with pytest.raises(AmskvError, match=r"cells failed:\n  d/window-.*: RESOURCE_EXHAUSTED"):
        run(tmp_path)
    monkeypatch.undo()
    assert "d/h2o-75%/seed0" in comparable(tmp_path)
    run(tmp_path)
    assert comparable(tmp_path) == comparable(whole[0])


def test_all_fail_whose_originals_cannot_be_drawn(whole, tmp_path, monkeypatch):
    class Failing(small_study.FakeDrawer):
        def draw(self, params, seed, first, count, controls):
            if small_study.FakeDrawer.drawn == 0:
                small_study.FakeDrawer.drawn += 1
                raise RuntimeError("RESOURCE_EXHAUSTED")
            return super().draw(params, seed, first, count, controls)

    monkeypatch.setattr(small_study, "FakeDrawer", Failing)
    lines = []
    with pytest.raises(AmskvError, match=r"cells failed:\n  full/full/seed0: RESOURCE_EXHAUSTED"):
        run(tmp_path, report=lines.append)
    monkeypatch.undo()
    names = {name for name in comparable(whole[0]) if "/seed" in name}
    assert {line.partition(" ")[0] for line in lines if "failed" in line} == {
        name for name in names if name.endswith("/seed0")
    }
    assert {name for name in comparable(tmp_path) if "/seed" in name} == {
        name for name in names if name.endswith("/seed1")
    }
    run(tmp_path)
    assert comparable(tmp_path) == comparable(whole[0])


def test_full_disk_stops_the_study(tmp_path, monkeypatch):
    def write_arrays(path, arrays):
        raise AmskvError(f"cannot write {path.name}: no space left")

    monkeypatch.setattr("amskv_jax.study.study.write_arrays", write_arrays)
    with pytest.raises(AmskvError, match=r"^cannot write originals-seed0\.npz: no space left$"):
        run(tmp_path)


def test_folder_of_another_study_is_refused(whole):
    real = np.zeros((40, 12, 12, 3), np.uint8)
    judge = Judge.of(MEAN_COLOUR, real[:39])
    with pytest.raises(UsageError, match=r"other settings: real_pictures \(there 40, now 39\)"):
        run_study(COMPARISON, EXTENT, load, judge, whole[0])


def test_report_has_a_row_per_arm(whole, tmp_path):
    pytest.importorskip("matplotlib")
    report = tmp_path / "study.md"
    render_study(whole[0], report)
    text = report.read_text()
    assert "colour Frechet distance" in text
    assert "FID," not in text
    assert "| ams 50% |" in text
    assert "`c/ams-90.0%` cannot be: " in text
    assert text.count("Not run yet.") == 4
    assert "Noise: " in text
    assert "--sections d --seeds 0,1 --num 12" in text
    assert "20 held-out real pictures" in text
    for name in ("pareto.png", "pictures.png"):
        assert f"(study/{name})" in text
        assert (tmp_path / "study" / name).stat().st_size > 1000


def test_report_of_the_recorded_study_is_the_one_that_is_shown(tmp_path):
    """Its records are older than the facts of arms."""
    pytest.importorskip("matplotlib")
    docs = Path(__file__).parents[1] / "docs"
    render_study(docs / "study", tmp_path / "study.md")
    assert (tmp_path / "study.md").read_bytes() == (docs / "study.md").read_bytes()


def test_records_of_unknown_arms_are_named(whole, tmp_path):
    for name in ("settings.json", "stats.npz"):
        (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
    known = (whole[0] / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(known + '{"name":"d/lru/seed0","section":"d","seed":0}')
    with pytest.raises(AmskvError, match="holds d/lru/seed0, which no study of this version draws"):
        render_study(tmp_path, tmp_path / "study.md")


def test_records_hold_what_arms_are_known_by(whole):
    records = comparable(whole[0])
    facts = {name.rpartition("/")[0]: record.get("facts") for name, record in records.items()}
    assert facts["d/window-50%"] == facts["d/ams-50%"] == {"target": 0.5}


def test_report_names_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path, extent=Extent(sections="cd", only="d/window", seeds=(1,), batch=5))
    add_cells(tmp_path, ["d/window-50%/seed1", "d/window-50%/seed7"])
    render_study(tmp_path, tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    assert "Not run yet: `d/window-50%/seed7`." in text
    assert text.count("Not run yet") == 6  # and the five sections that nobody asked for


def test_report_command(amskv, whole, tmp_path):
    pytest.importorskip("matplotlib")
    finished = amskv("study", "report", "--out", whole[0], "--report", tmp_path / "study.md")
    assert (finished.code, finished.err) == (0, "")
    assert (tmp_path / "study.md").exists()
    finished = amskv("study", "report", "--out", whole[0], "--report", tmp_path / "study.txt")
    assert finished.code == 2
    assert "study.txt is of an unknown type: expected .md" in finished.err


def test_report_without_results_is_refused(tmp_path):
    with pytest.raises(AmskvError, match="no result of the full cache"):
        render_study(tmp_path, tmp_path / "study.md")
