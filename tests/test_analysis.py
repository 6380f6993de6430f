"""Figures and tables of what calibration measured."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import AMSKV
from amskv_jax.reports.analysis import Analysis
from amskv_jax.reports.heatmaps import FIGURES
from amskv_jax.schedule import VAR_256, ScaleSchedule

WIDE = ScaleSchedule(((1, 1), (2, 4), (4, 8), (8, 14), (10, 20), (14, 26), (18, 32), (22, 40)))
DEMANDING = (0, 1, 2, 5)


def make_stats(schedule=VAR_256, layers=9, heads=3):
    random = np.random.default_rng(0)
    scales = schedule.num_scales
    level = np.where(np.isin(np.arange(layers), DEMANDING), -0.9, -0.4)
    similarity = level[:, None] + random.normal(0, 0.03, (layers, scales))
    similarity[:, 0] = np.nan
    weights = np.tril(random.random((layers, heads, scales, scales)))
    density = weights / weights.sum(-1, keepdims=True)
    top = np.full((layers, scales, 5), 0.5)
    return LayerStats(schedule, similarity, similarity / 2, density, top)


@pytest.fixture(scope="module")
def stats():
    return make_stats()


@pytest.fixture
def stats_file(stats, tmp_path):
    stats.save(tmp_path / "stats.npz")
    return tmp_path / "stats.npz"


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_command_writes_pictures_and_numbers(amskv, stats, stats_file, tmp_path):
    out = tmp_path / "analysis"
    done = amskv("analyze", "--stats", stats_file, "--out", out)
    assert (done.code, done.err) == (0, "")
    names = {"density", "similarity", "kept_tokens", "heads"}
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.png" for name in names),
        *(f"{name}.csv" for name in (*names, "layers")),
    }
    for name in names:
        assert f"wrote {out / name}.png" in done.out
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 500
            assert len(picture.convert("RGB").getcolors(2**20)) > 50

    rows = read(out / "density.csv")
    assert len(rows) == 9 * 55
    for row in rows:
        index = tuple(int(row[key]) for key in ("layer", "target_scale", "source_scale"))
        assert float(row["probability"]) == stats.density[index]
    rows = read(out / "heads.csv")
    assert len(rows) == 9 * 3 * 55
    assert float(rows[-1]["probability"]) == stats.head_density[-1, -1, -1, -1]
    rows = read(out / "similarity.csv")
    found = [[float(row["similarity"]), float(row["cosine"])] for row in rows]
    expected = np.stack([stats.similarity, stats.cosine], -1)[:, 1:].reshape(-1, 2)
    np.testing.assert_array_equal(found, expected)
    assert [int(row["scale"]) for row in rows[:9] if row["overflows"] == "1"] == [7, 8]
    rows = read(out / "layers.csv")
    assert tuple(int(row["layer"]) for row in rows if row["demanding"] == "1") == DEMANDING
    assert [row["expands_at"] for row in rows[2:4]] == ["7", ""]
    kept = np.zeros((9, 10), int)
    for row in read(out / "kept_tokens.csv"):
        kept[int(row["layer"]), int(row["step"])] = row["kept_tokens"]
    plan = AMSKV().plan(stats.shape, stats)
    np.testing.assert_array_equal(kept, [row.kept_tokens for row in plan.rows])


def test_nothing_is_overwritten_unasked(amskv, stats_file, tmp_path):
    arguments = ("analyze", "--stats", stats_file, "--out", tmp_path, "--layers", "0")
    (tmp_path / "heads.csv").write_text("mine")
    done = amskv(*arguments)
    assert done.code == 1
    assert "heads.csv exists: choose another name, or replace it with --force" in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"stats.npz", "heads.csv"}
    assert amskv(*arguments, "--force").code == 0
    assert len(read(tmp_path / "heads.csv")) == 9 * 3 * 55


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--layers", "3,9-10"), 2, "cannot show layers 9-10: the model has layers 0-8"),
        (("--layers", "all"), 2, "--layers 'all': expected numbers"),
        (("--stats", "nowhere.npz"), 1, "cannot read the layer statistics nowhere.npz"),
        (("--out", "nowhere/out"), 1, "the folder nowhere/out does not exist"),
        (("--out", "stats.npz"), 1, "stats.npz"),
    ],
)
def test_command_refuses(amskv, stats_file, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    given = {"--stats": stats_file, "--out": "out"} | dict([arguments])
    done = amskv("analyze", *(part for option in given.items() for part in option))
    assert done.code == code
    assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]


def test_without_matplotlib_the_extra_is_named(amskv, stats_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = amskv("analyze", "--stats", stats_file, "--out", tmp_path / "out")
    assert done.code == 1
    assert "pip install 'amskv-jax[plot]'" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "stats",
    [
        make_stats(),
        make_stats(layers=30, heads=16),
        make_stats(WIDE, 33, 20),
        make_stats(ScaleSchedule.square((1, 2, 3)), 2, 2),
    ],
    ids=["small", "deep", "wide maps", "few scales"],
)
@pytest.mark.parametrize("name", FIGURES)
def test_no_label_covers_another(name, stats, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    drawn, draw = [], Text.draw

    def record(text, renderer):
        if text.get_text().strip():
            drawn.append(text.get_window_extent(renderer).extents)
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", record)
    analysis = Analysis(stats)
    canvas = FigureCanvasAgg(FIGURES[name](analysis, analysis.chosen_layers()))
    canvas.draw()
    low, high = np.split(np.array(drawn), 2, axis=1)
    overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    assert not np.triu((overlap > 1).all(-1), 1).any()
    assert (low > -1).all()
    assert (high < np.array(canvas.get_width_height()) + 1).all()


def test_demanding_layers_are_marked(stats):
    analysis = Analysis(stats)
    assert analysis.classes.demanding == DEMANDING
    for name in ("similarity", "kept_tokens"):
        figure = FIGURES[name](analysis, [0])
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        marked = [i for i, label in enumerate(labels) if not label.isdigit()]
        assert tuple(marked) == DEMANDING


def test_layers_to_show(stats):
    assert Analysis(stats).chosen_layers() == [0, 2, 4, 6, 8]
    assert Analysis(make_stats(layers=3)).chosen_layers() == [0, 1, 2]
    assert Analysis(stats).chosen_layers([7, 3]) == [7, 3]
    with pytest.raises(UsageError, match="cannot show layers none"):
        Analysis(stats).chosen_layers([])


def test_one_scale_is_nothing_to_analyze():
    with pytest.raises(AmskvError, match="one scale only"):
        Analysis(make_stats(ScaleSchedule.square((1,)), 2))
