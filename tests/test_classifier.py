from dataclasses import replace

import jax
import numpy as np
import pytest
from training_helpers import optimized_programs

from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.classifier import load_classifier, save_classifier
from amskv_jax.evaluation.features import inception
from amskv_jax.files import read_json_lines
from amskv_jax.training.classifier import (
    Classifier,
    ClassifierConfig,
    ClassifierTraining,
    apply_classifier,
    train_classifier,
    vary,
)
from amskv_jax.training.config import Optimization, Run
from amskv_jax.training.data import Pictures

CONFIG = ClassifierConfig(3, width=1, blocks=1)
TRAINING = ClassifierTraining(
    CONFIG,
    Optimization(learning_rate=3e-3, warmup_steps=4, ema_decay=0.9),
    Run(steps=40, batch_size=8, steps_per_call=10, checkpoint_every=20, dtype="float32"),
    shift=1,
    cutout=2,
)


def coloured(count, seed=0):
    """Pictures whose class is their brightest channel."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count).astype(np.int32)
    pixels = generator.integers(0, 120, (count, 8, 8, 3)).astype(np.uint8)
    pixels[np.arange(count), :, :, labels] += 100
    return Pictures(pixels, labels, ("red", "green", "blue"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with optimized_programs():
        found = train_classifier(TRAINING, coloured(60), directory, validation=coloured(30, 1))
    return found, read_json_lines(directory / "log.jsonl")


def test_training_learns_and_logs(trained):
    variables, log = trained
    assert log[-1]["step"] == 40
    assert log[-1]["validation_accuracy"] > 0.9
    held_out = coloured(50, seed=2)
    features, logits = apply_classifier(CONFIG, variables, held_out.pixels)
    assert features.shape == (50, CONFIG.dimension)
    assert features.dtype == logits.dtype == np.float32
    assert (logits.argmax(1) == held_out.labels).mean() > 0.9


def test_default_shape_is_wide_resnet_16_4():
    config = ClassifierConfig(10)
    shapes = jax.eval_shape(
        Classifier(config).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)
    )
    convolutions = [s for s in jax.tree.leaves(shapes["params"]) if len(s.shape) == 4]
    assert len([s for s in convolutions if s.shape[0] == 3]) == 13
    assert config.dimension == 256
    assert 2.7e6 < sum(s.size for s in jax.tree.leaves(shapes["params"])) < 2.8e6


def test_pictures_that_do_not_suit_are_refused(tmp_path):
    wrong = replace(coloured(4), classes=("red", "green"))
    with pytest.raises(AmskvError, match="2 classes, the model 3"):
        train_classifier(TRAINING, wrong, tmp_path)


def test_varied_pictures_are_mirrored_shifted_and_cut():
    pictures = np.tile(np.arange(8.0)[None, None, :, None], (64, 8, 1, 3)) + 1
    varied = np.asarray(vary(TRAINING, jax.random.key(0), pictures))
    assert varied.shape == pictures.shape
    cut = (varied == 0).all(-1)
    assert 1 <= cut.sum((1, 2)).min() <= cut.sum((1, 2)).max() <= 4
    falling = [
        np.median(np.diff(row[~hole])) < 0
        for row, hole in zip(varied[:, 7, :, 0], cut[:, 7], strict=True)
    ]
    assert 0.2 < np.mean(falling) < 0.8


def test_a_saved_classifier_sees_the_same(trained, tmp_path):
    variables, _ = trained
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, CONFIG, variables)
    assert sorted(tmp_path.iterdir()) == [path]
    network = load_classifier(path)
    assert (network.num_classes, network.dimension, network.name) == (3, 64, "classifier")
    assert len(network.fingerprint) == 32
    with pytest.raises(AmskvError, match="the classifier knows 3 classes, the model 4"):
        network.check_classes(4)
    pixels = coloured(20).pixels
    for found, expected in zip(
        network.look(pixels), apply_classifier(CONFIG, variables, pixels), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=0.05, rtol=0.02)


def test_files_that_are_no_classifiers_are_refused(trained, tmp_path):
    variables, _ = trained
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(AmskvError, match="cannot read the classifier"):
        load_classifier(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(AmskvError, match="cannot read the classifier"):
        load_classifier(path)
    save_classifier(path, replace(CONFIG, width=2), variables)
    with pytest.raises(AmskvError, match="do not fit its shape"):
        load_classifier(path)
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, path, {"format": "other", "version": "7"})
    with pytest.raises(AmskvError, match=r"is other, version 7: expected amskv_jax.classifier"):
        load_classifier(path)


def test_inception_without_its_weights_says_what_is_missing(tmp_path):
    with pytest.raises(AmskvError, match=r"torch-fidelity|are not there"):
        inception(tmp_path / "missing.pth")
