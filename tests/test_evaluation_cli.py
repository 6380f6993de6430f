"""``amskv eval`` and ``amskv study run`` with files."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image
from small_evaluation import TOKENIZER, TRANSFORMER

from amskv_jax.checkpoints.initialize import init_checkpoint
from amskv_jax.evaluation.classifier import save_classifier
from amskv_jax.evaluation.results import read_arrays
from amskv_jax.models.var.model import VARModel
from amskv_jax.training.classifier import Classifier, ClassifierConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, a classifier, real pictures."""
    directory = tmp_path_factory.mktemp("files")
    config = VARModel(TRANSFORMER, TOKENIZER)
    init_checkpoint(config, directory / "checkpoint")
    shape = ClassifierConfig(3, width=1, blocks=1)
    variables = Classifier(shape).init(jax.random.key(0), np.zeros((1, 12, 12, 3), np.float32))
    save_classifier(directory / "classifier.safetensors", shape, variables)
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(70):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (12, 12, 3)).astype(np.uint8)).save(file, "png")
        encoded.append(np.frombuffer(file.getvalue(), np.uint8))
    np.savez(
        directory / "real.npz",
        jpeg=np.concatenate(encoded),
        offsets=np.cumsum([0, *map(len, encoded)]),
        labels=np.arange(70) % 3,
        classes=["a", "b", "c"],
    )
    return directory


def options(files, out):
    return [
        *("--checkpoint", files / "checkpoint", "--out", out),
        *("--classifier", files / "classifier.safetensors", "--real", files / "real.npz"),
        *("--batch-size", 33, "--dtype", "float32"),
    ]


def test_eval_command(amskv, files, tmp_path):
    arguments = [*options(files, tmp_path), "--num", 66, "--policies", "full,window:saving=0.75"]
    finished = amskv("eval", *arguments)
    assert (finished.code, finished.err) == (0, "")
    assert "Features of: classifier" in finished.out
    records = json.loads((tmp_path / "metrics.json").read_text())
    assert [record["name"] for record in records] == ["full", "window-75%"]
    assert records[1]["ssim"] < 1
    assert read_arrays(tmp_path / "full.npz")["arr_0"].shape == (66, 12, 12, 3)
    assert amskv("eval", *arguments).out == finished.out


def test_eval_command_refuses_what_cannot_work(amskv, files, tmp_path):
    given = options(files, tmp_path / "out")
    for extra, message in {
        ("--num", "40"): "40 pictures are too few for a Frechet distance on 64 features",
        ("--num", "66", "--policies", "full,lru"): "unknown policy 'lru'",
        (
            "--num",
            "66",
            "--policies",
            "h2o:saving=99",
        ): "saving '99': expected a share of at least 0 and below 1",
        ("--num", "66", "--classifier", files / "no.safetensors"): "cannot read the classifier",
        ("--num", "66", "--cfg", "nan"): "expected a finite number, not nan",
    }.items():
        finished = amskv("eval", *given, *extra)
        assert finished.code in (1, 2)
        assert message in finished.err
    finished = amskv("eval", "--checkpoint", files / "checkpoint", "--out", tmp_path / "out")
    assert (finished.code, "no classifier of the model's classes" in finished.err) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_study_command_draws_and_reports(amskv, files, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = [*options(files, tmp_path / "study"), "--num", 66, "--sections", "a", "--seeds", 0]
    arguments += ["--only", "drop-1-local", "--calibration", 4, "--held-out", files / "real.npz"]
    finished = amskv("study", "run", *arguments, "--report", tmp_path / "study.md")
    assert (finished.code, finished.err) == (0, "")
    assert "[2/2] a/drop-1-local/seed0: saves 92.9%, Frechet " in finished.out
    assert "| drop 1 local |" in (tmp_path / "study.md").read_text()
    again = amskv("study", "run", *arguments)
    assert (again.code, again.out) == (0, "")
    finished = amskv("study", "run", *options(files, tmp_path / "study"), "--num", 64)
    assert "64 pictures are too few" in finished.err
