import signal
import time
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_helpers import (
    OPTIMIZATION,
    RUN,
    SCHEDULE,
    TOKENIZER,
    TRANSFORMER,
    comparable,
    run_python,
    token_set,
    transformer_run,
)

from amskv_jax.errors import AmskvError
from amskv_jax.models.var import transformer
from amskv_jax.models.var.transformer import VAR
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.training.config import TransformerTraining
from amskv_jax.training.transformer import train_transformer


@pytest.fixture(scope="module")
def trained_transformer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("transformer")
    return transformer_run(directory), directory


def test_backward_pass_keeps_less_than_all(monkeypatch):
    config = replace(TRANSFORMER, depth=4)
    model = VAR(config)
    inputs = jnp.zeros(8, int), jnp.zeros((8, SCHEDULE.total - 1, config.latent_channels))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    sizes = []
    for kept in (transformer._is_kept_for_gradients, jax.checkpoint_policies.everything_saveable):
        monkeypatch.setattr(transformer, "_is_kept_for_gradients", kept)
        gradient = jax.grad(lambda params: jnp.square(model.apply(params, *inputs)).sum())
        program = jax.jit(gradient).lower(params).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[0] < sizes[1] / 2


def test_transformer_learns_what_depends_on_the_class(trained_transformer):
    params, directory = trained_transformer
    chex.assert_tree_all_finite(params)
    log = comparable(directory)
    assert log[0]["loss"] == pytest.approx(np.log(32), abs=0.5)
    assert log[-2]["loss"] < 0.6 * log[0]["loss"]
    assert log[-2]["accuracy"] > 0.5
    assert len(log[-2]["loss_per_scale"]) == len(log[-2]["accuracy_per_scale"]) == 3
    weights = np.array(SCHEDULE.tokens) / SCHEDULE.total
    assert log[-2]["loss"] == pytest.approx(np.dot(weights, log[-2]["loss_per_scale"]), rel=1e-5)
    assert log[-1]["validation_loss"] < log[0]["loss"]


KILLED = """
import sys
from pathlib import Path
from training_helpers import transformer_run
from amskv_jax.training import log
write = log.Log.write
def slowly(self, step, figures):
    import time
    write(self, step, figures)
    if step >= 16:
        time.sleep(60)  # to be killed here, after checkpoint 8 and before checkpoint 16
log.Log.write = slowly
transformer_run(Path(sys.argv[1]))
"""


def test_killed_transformer_resumes_exactly(trained_transformer, tmp_path):
    process = run_python(KILLED, tmp_path)
    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "checkpoints/8"
    try:
        deadline = time.monotonic() + 50
        while not (checkpoint.exists() and '"step": 16' in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    params, directory = trained_transformer
    chex.assert_trees_all_equal(transformer_run(tmp_path), params)
    assert comparable(tmp_path) == comparable(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 64}, "codebook entries of the tokenizer: 32; of the transformer: 64"),
        ({"latent_channels": 4}, "latent channels of the tokenizer: 8; of the transformer: 4"),
        ({"num_classes": 10}, "3 classes, the model 10"),
        ({"schedule": ScaleSchedule.square((1, 4))}, "scales of the tokenizer: 1, 2, 4"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, changes, message):
    model = replace(TRANSFORMER, **changes)
    config = TransformerTraining(model, TOKENIZER, OPTIMIZATION, RUN)
    with pytest.raises(AmskvError, match=message):
        train_transformer(config, token_set(), {"quantizer": {}}, tmp_path)


def test_default_model_is_small_enough_to_ship():
    from amskv_jax.configs import var_cifar10
    from amskv_jax.models.var.transformer import VAR

    def create():
        model, tokenizer = var_cifar10.MODEL.transformer, var_cifar10.MODEL.tokenizer
        key = jax.random.key(0)
        features = jnp.zeros((1, 679, model.latent_channels))
        return (
            VAR(model).init(key, jnp.zeros(1, jnp.int32), features)["params"],
            VQVAE(tokenizer).init(key, jnp.zeros((1, 32, 32, 3)))["params"],
        )

    shapes = jax.eval_shape(create)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 36e6
