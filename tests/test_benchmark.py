"""Speed and memory of policies: what is measured, and what is said about it."""

import json
import os

import jax
import pytest

from amskv_jax import benchmark
from amskv_jax.benchmark import Measurement, measure, measure_in_new_process
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.errors import OutOfMemoryError
from amskv_jax.generate import Sampler
from amskv_jax.policies import Full
from amskv_jax.sampling import TokenSampling
from amskv_jax.testing import TINY_VAR, TRANSFORMER

SAMPLER = Sampler(TINY_VAR, Full().plan(TRANSFORMER.cache_shape), sampling=TokenSampling(top_k=1))


def test_every_arm_has_a_process_of_its_own():
    found = measure_in_new_process(SAMPLER, batch=2, repeats=2, decode=False)
    assert (found.device, found.attention) == ("cpu", "xla")
    assert len(found.seconds) == 2
    assert found.pictures_per_second == 2 / max(found.seconds)  # the upper one of two
    assert found.compile_seconds > 0.1
    params = random_params(TINY_VAR, parts=["transformer"])
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert found.predicted_bytes > weights
    assert found.peak_bytes is None  # CPUs report none


def die(*arguments):
    os._exit(9)


def test_a_killed_process_is_reported(monkeypatch):
    monkeypatch.setattr(benchmark, "measure", die)
    before = dict(os.environ)
    with pytest.raises(OutOfMemoryError, match="was killed, most likely for want of memory"):
        measure_in_new_process(SAMPLER, 2)
    assert os.environ == before


def test_too_little_memory_is_told_from_other_errors(monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError(reason)

    monkeypatch.setattr(benchmark, "_measure", fail)
    reason = "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"
    with pytest.raises(OutOfMemoryError, match="not enough memory for 7 pictures at once"):
        measure(SAMPLER, 7)
    reason = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        measure(SAMPLER, 7)


@pytest.fixture
def arms(monkeypatch):
    """Replace the measurements by known ones; return the samplers that were to be measured."""
    seen = []

    def measured(sampler, batch, repeats, decode, trace):
        seen.append((sampler, batch, repeats, decode))
        if len(seen) == 3:
            raise OutOfMemoryError("not enough memory for 8 pictures at once")
        count = len(seen)
        return Measurement("GPU", "cudnn", 10.0 * count, (0.1,), 5.0, 2**30, 2**31 // count)

    monkeypatch.setattr(benchmark, "measure_in_new_process", measured)
    return seen


def test_bench_compares_policies_and_plan_files(amskv, arms, tmp_path):
    plan, path = tmp_path / "plan.json", tmp_path / "bench.json"
    amskv("plan", "--model", "var-tiny", "--policy", "window:window=3", "--save", plan)
    options = (
        "--policies",
        f"full,explicit:path={plan},sink",
        "--batch",
        8,
        "--repeats",
        5,
        "--no-decode",
    )
    done = amskv("bench", "--model", "var-tiny", *options, "--save", path)
    assert (done.code, done.err) == (0, "")
    assert [arm[1:] for arm in arms] == [(8, 5, False)] * 3
    sampler = arms[1][0]
    assert sampler.dtype == "bfloat16"
    assert sampler.plan.rows[0].kept_tokens == (0, 1, 3, 3)

    lines = [line.split() for line in done.out.splitlines()]
    assert "GPU, attention cudnn, random weights" in done.out
    full = "full 10.00 1.00 5.0 s 1.00 1.00 GiB 1.00 2.00 GiB 1.00"
    from_file = f"explicit:path={plan} 20.00 2.00 5.0 s 1.00 1.00 GiB 1.00 1.00 GiB 0.50"
    assert full.split() in lines
    assert from_file.split() in lines
    assert ["sink", "no", "memory", "-", "-", "-", "-", "-", "-", "-"] in lines

    saved = json.loads(path.read_text())
    assert (saved["model"], saved["batch"], saved["decode"]) == ("var-tiny", 8, False)
    assert saved["arms"]["full"]["pictures_per_second"] == 10
    assert saved["arms"]["sink"]["error"] == "not enough memory for 8 pictures at once"


def test_bench_refuses_what_cannot_work_before_measuring(amskv, arms, tmp_path):
    def refused(code, *options):
        done = amskv("bench", *options)
        assert done.code == code
        assert done.err.count("error:") == 1
        return done.err

    tiny = ("--model", "var-tiny")
    assert "unknown policy 'best'" in refused(2, *tiny, "--policies", "full,best")
    assert "an empty name" in refused(2, *tiny, "--policies", "full,,ams")
    assert "spelled explicit:path=no.json" in refused(2, *tiny, "--policies", "no.json")
    assert "unknown model 'var-d99'" in refused(2, "--model", "var-d99")
    assert "cannot read the retention plan" in refused(
        1, *tiny, "--policies", "explicit:path=no.json"
    )
    (tmp_path / "bench.json").write_text("{}")
    assert "bench.json exists" in refused(1, *tiny, "--save", tmp_path / "bench.json")
    assert "unknown type" in refused(2, *tiny, "--save", tmp_path / "bench.txt")
    assert not arms
