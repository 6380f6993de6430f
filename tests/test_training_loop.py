import json
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from line_task import Settings, line_task
from training_helpers import OPTIMIZATION, RUN, comparable, run_python

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.files import read_json_lines
from amskv_jax.training.config import Optimization
from amskv_jax.training.log import plot_log
from amskv_jax.training.loop import TrainingStoppedError, fit
from amskv_jax.training.state import (
    TrainState,
    apply_gradients,
    create_state,
    ema_decay,
    learning_rate,
)

# The loop, with a model that compiles at once.


@pytest.fixture(scope="module")
def whole_line(tmp_path_factory):
    directory = tmp_path_factory.mktemp("line")
    return fit(line_task(Settings(RUN)), directory), comparable(directory)


def test_log_has_a_line_per_call_and_per_evaluation(whole_line):
    _, log = whole_line
    assert [entry["step"] for entry in log] == [4, 8, 8, 12, 16, 16, 20, 24, 24]
    assert set(log[0]) == {"step", "loss", "per_scale", "learning_rate", "gradient_norm"}
    assert len(log[0]["per_scale"]) == 3
    assert set(log[2]) == {"step", "kernel_norm"}


@pytest.mark.parametrize("step", [4, 12])
def test_terminated_run_resumes_exactly(whole_line, tmp_path, step):
    with pytest.raises(TrainingStoppedError, match=f"after step {step + 4} of 24.*start it again"):
        fit(line_task(Settings(RUN, interrupt_at=step)), tmp_path)
    state = fit(line_task(Settings(RUN)), tmp_path)
    chex.assert_trees_all_equal(state, whole_line[0])
    assert comparable(tmp_path) == whole_line[1]


def test_run_that_is_out_of_time_resumes_exactly(whole_line, tmp_path):
    with pytest.raises(TrainingStoppedError, match="after step 0 of 24"):
        fit(line_task(Settings(RUN)), tmp_path, stop_after=0.0)
    chex.assert_trees_all_equal(fit(line_task(Settings(RUN)), tmp_path), whole_line[0])


def test_finished_run_returns_its_state(whole_line, tmp_path):
    fit(line_task(Settings(RUN)), tmp_path)
    again = fit(replace(line_task(Settings(RUN)), batches=None), tmp_path)
    chex.assert_trees_all_equal(again, whole_line[0])


def test_last_call_may_be_shorter(tmp_path):
    run = replace(RUN, steps=10, checkpoint_every=100)
    state = fit(line_task(Settings(run)), tmp_path)
    assert state.step == 10
    assert [entry["step"] for entry in comparable(tmp_path)] == [4, 8, 10, 10]


def test_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    with pytest.raises(AmskvError, match="not finite in the steps up to 16: lower the learning"):
        fit(line_task(Settings(RUN, fail_at=14)), tmp_path)
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["8"]


def test_directory_of_another_run_is_refused(tmp_path):
    fit(line_task(Settings(replace(RUN, steps=4))), tmp_path)
    with pytest.raises(UsageError, match=r"run\.steps \(there 4, now 24\); choose another"):
        fit(line_task(Settings(RUN)), tmp_path)


def test_unfinished_last_line_of_a_log_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [entry["step"] for entry in read_json_lines(path)] == [1, 2]


def test_plot(whole_line, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in whole_line[1]))
    plot_log(path, tmp_path / "log.png")
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AmskvError, match="missing or empty"):
        plot_log(tmp_path / "none.jsonl", tmp_path / "none.png")


TWO_DEVICES = """
import sys
from pathlib import Path
from dataclasses import replace
from line_task import Settings, line_task
from training_helpers import RUN
from amskv_jax.errors import UsageError
from amskv_jax.training.loop import fit
import jax
assert jax.local_device_count() == 2
state = fit(line_task(Settings(RUN)), Path(sys.argv[1]))
assert len(state.params["kernel"].sharding.device_set) == 2
try:
    fit(line_task(Settings(replace(RUN, batch_size=3))), Path(sys.argv[1]) / "odd")
except UsageError as error:
    assert "2 devices cannot share a batch of 3" in str(error)
else:
    raise AssertionError
"""


def test_devices_share_the_batch(whole_line, tmp_path):
    flags = "--xla_force_host_platform_device_count=2"
    assert run_python(TWO_DEVICES, tmp_path, XLA_FLAGS=flags).wait() == 0
    for found, expected in zip(comparable(tmp_path), whole_line[1], strict=True):
        chex.assert_trees_all_close(found, expected, rtol=1e-5)


# The optimiser.


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    rate = learning_rate(Optimization(learning_rate=2.0, warmup_steps=10, final_share=0.1), 110)
    steps = np.array([0, 5, 10, 60, 110])
    np.testing.assert_allclose(jax.vmap(rate)(steps), [0, 1, 2, 1.1, 0.2], atol=1e-6)


def test_averaged_weights():
    optimization = Optimization(learning_rate=0.1, warmup_steps=0, ema_decay=0.5)
    decay = jax.vmap(lambda step: ema_decay(optimization, step))(np.array([0, 1, 100]))
    np.testing.assert_allclose(decay, [0.1, 2 / 11, 0.5], rtol=1e-6)
    state = create_state({"kernel": jnp.ones(2)}, optimization, RUN, {})
    after, _ = apply_gradients(state, {"kernel": jnp.ones(2)}, optimization, RUN)
    expected = 0.9 * after.params["kernel"] + 0.1 * state.params["kernel"]
    chex.assert_trees_all_close(after.ema["kernel"], expected, rtol=1e-6)
    assert after.step == 1


def test_weight_decay_concerns_kernels_alone():
    optimization = Optimization(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    params = {"head": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "codebook": jnp.ones(2)}
    state = create_state(params, optimization, RUN, {})
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = apply_gradients(state, zeros, optimization, RUN)[0].params
    assert after["head"]["kernel"][0] == pytest.approx(1 - 0.1 * 0.5)
    chex.assert_trees_all_equal(after["codebook"], after["head"]["bias"], jnp.ones(2))


def test_sgd_has_nesterov_momentum_and_decays_by_the_gradient():
    optimization = Optimization(
        learning_rate=0.1, warmup_steps=0, final_share=1.0, method="sgd", weight_decay=0.5
    )
    params = {"kernel": jnp.ones(1), "bias": jnp.ones(1)}
    state = create_state(params, optimization, RUN, {})
    gradients = {"kernel": jnp.zeros(1), "bias": jnp.full(1, 0.2)}
    first, _ = apply_gradients(state, gradients, optimization, RUN)
    second, _ = apply_gradients(first, gradients, optimization, RUN)
    assert first.params["bias"][0] == pytest.approx(1 - 0.1 * 0.2 * 1.9)
    assert second.params["bias"][0] == pytest.approx(1 - 0.1 * 0.2 * (1.9 + 2.71))
    assert first.params["kernel"][0] == pytest.approx(1 - 0.1 * 0.5 * 1.9)


def test_gradients_are_clipped():
    optimization = Optimization(learning_rate=0.1, warmup_steps=0, clip_norm=1.0)
    state = create_state({"kernel": jnp.zeros(2)}, optimization, RUN, {})
    after, figures = apply_gradients(state, {"kernel": jnp.array([30.0, 40.0])}, optimization, RUN)
    assert figures["gradient_norm"] == pytest.approx(50)
    mean = after.optimizer[1][0].mu["kernel"]
    np.testing.assert_allclose(mean, [0.1 * 0.6, 0.1 * 0.8], rtol=1e-5)


def test_state_is_a_pytree():
    state = create_state({"kernel": jnp.ones(2)}, OPTIMIZATION, RUN, {"hits": jnp.ones(1)})
    assert isinstance(jax.tree.map(lambda leaf: leaf, state), TrainState)
