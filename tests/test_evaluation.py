"""Drawing, budgets, and the resumable evaluation, with a model that compiles quickly."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from reference_weights import recipe_params
from small_evaluation import MEAN_COLOUR, MODEL, TOKENIZER, TRANSFORMER

from amskv_jax.drawing import Drawer
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.evaluation.evaluate import Evaluation, evaluate
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.results import Results, read_arrays
from amskv_jax.files import read_json_lines
from amskv_jax.pipeline import Pipeline
from amskv_jax.policies.grammar import parse_policies

EVALUATION = Evaluation(num=10, shard=4, top_k=8, dtype="float32")


@pytest.fixture(scope="module")
def model():
    params = {"transformer": recipe_params(TRANSFORMER), "tokenizer": recipe_params(TOKENIZER)}
    return Pipeline(MODEL, params, MODEL.schedule, "float32", MODEL.drawing, "weights")


@pytest.fixture(scope="module")
def judge():
    real = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3)).astype(np.uint8)
    return Judge.of(MEAN_COLOUR, real)


REQUESTS = parse_policies("full,window:saving=0.75")


@pytest.fixture(scope="module")
def whole(model, judge, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, evaluate(EVALUATION, model, REQUESTS, judge, directory, batch=3)


def pictures(directory, name):
    return read_arrays(directory / f"{name}.npz")["arr_0"]


def assert_same(pixels, expected):
    """Programs for other batch sizes round otherwise, which may show where a level ends."""
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_pictures_are_those_of_the_pipeline(model, whole):
    directory, _ = whole
    labels = np.arange(10) % 3
    expected = model.sample(labels, key=jax.random.key(0), cfg=1.5, top_k=8, top_p=0.96)
    assert_same(pictures(directory, "full"), np.rint(255 * np.asarray(expected.pictures)))


def test_a_picture_has_the_same_number_in_every_batch(model):
    drawer, controls = model.drawer(model.sampler(), model.conditions(None), 4), model.controls()
    together = drawer.draw(model.params, 5, 0, 7, controls)
    assert together.shape == (7, 12, 12, 3)
    assert_same(drawer.draw(model.params, 5, 2, 3, controls), together[2:5])
    alone = model.drawer(model.sampler(), model.conditions(None), 1)
    assert_same(alone.draw(model.params, 5, 6, 1, controls), together[6:])


def test_files_are_in_the_layout_of_the_adm_evaluator(whole):
    directory, _ = whole
    with np.load(directory / "window-75%.npz") as content:
        assert content.files[0] == "arr_0"
        assert content["arr_0"].dtype == np.uint8
        assert content["arr_0"].shape == (10, 12, 12, 3)
        np.testing.assert_array_equal(content["arr_1"], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    assert not list(directory.glob("*.shard-*"))


def test_records_hold_bytes_and_figures(whole, judge):
    directory, records = whole
    assert [record["name"] for record in records] == ["full", "window-75%"]
    full, window = records
    assert "psnr" not in full
    assert full["cache_bytes"] == 2 * 2 * 5 * 2 * 32 * 4  # rows, layers, tokens, K and V, width
    assert window["saving"] >= 0.75
    labels = np.arange(10) % 3
    originals = pictures(directory, "full")
    figures = judge.figures(pictures(directory, "window-75%"), labels, originals)
    assert {name: window[name] for name in figures} == figures
    assert read_json_lines(directory / "results.jsonl") == records


def test_stopped_evaluation_goes_on_with_the_shard_it_was_at(
    model, judge, whole, tmp_path, monkeypatch
):
    batches, drawn = Drawer.batches, []

    def interrupted(self, *arguments):
        for batch in batches(self, *arguments):
            if len(drawn) == 6:  # in the second shard of the second policy
                raise KeyboardInterrupt
            drawn.append(batch.first)
            yield batch

    monkeypatch.setattr(Drawer, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(EVALUATION, model, REQUESTS, judge, tmp_path, batch=3)
    assert drawn == [0, 3, 6, 9, 0, 3]
    assert [path.name for path in tmp_path.glob("*.shard-*")] == ["window-75%.shard-00000.npz"]
    drawn.clear()
    records = evaluate(EVALUATION, model, REQUESTS, judge, tmp_path, batch=3)
    assert drawn == [3, 6, 9]
    for ours, theirs in zip(records, whole[1], strict=True):
        assert {**ours, "draw_seconds": 0} == {**theirs, "draw_seconds": 0}
    np.testing.assert_array_equal(
        pictures(tmp_path, "window-75%"), pictures(whole[0], "window-75%")
    )


def test_finished_evaluation_only_reads(model, judge, whole, monkeypatch):
    monkeypatch.setattr(Pipeline, "drawer", None)
    directory, records = whole
    assert evaluate(EVALUATION, model, REQUESTS, judge, directory) == records


def test_evaluation_without_features_compares_with_the_full_cache(model, tmp_path):
    same = parse_policies("full,window:saving=0")
    records = evaluate(EVALUATION, model, same, None, tmp_path, batch=10)
    assert "frechet_distance" not in records[0]
    assert records[1]["psnr"] is None  # equal pictures
    assert records[1]["ssim"] == pytest.approx(1)


def test_folder_of_another_evaluation_is_refused(model, judge, whole):
    directory, _ = whole
    with pytest.raises(UsageError, match=r"other settings: conditions\.seed \(there 0, now 1\)"):
        evaluate(replace(EVALUATION, seed=1), model, REQUESTS, judge, directory)


def test_model_in_another_dtype_is_refused(model, judge, tmp_path):
    other = replace(EVALUATION, dtype="bfloat16")
    with pytest.raises(UsageError, match="the model is in float32, expected bfloat16"):
        evaluate(other, model, REQUESTS, judge, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_too_few_pictures_are_refused_before_any_work(model, judge, tmp_path):
    with pytest.raises(UsageError, match="3 pictures are too few for a Frechet distance on 3"):
        evaluate(replace(EVALUATION, num=3), model, REQUESTS, judge, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_unfinished_last_line_of_results_is_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"name": "a", "x": 1}\n{"name": "b", "x"')
    results = Results(path)
    assert list(results.records) == ["a"]
    results.add({"name": "c"})
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_damaged_pictures_are_reported(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    with pytest.raises(AmskvError, match=r"is damaged .*remove it"):
        read_arrays(tmp_path / "x.npz")
