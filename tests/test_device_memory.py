"""What drawing needs of a device's memory: predicted, compared with compilers and GPUs, refused."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import given
from hypothesis import strategies as st

from amskv_jax import configs
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.device_memory import (
    DeviceMemory,
    check_memory,
    device_limit,
    largest_batch,
    predict,
    predict_on_gpu,
    weight_bytes,
)
from amskv_jax.drawing import Drawer
from amskv_jax.errors import OutOfMemoryError
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.mesh import MeshShape
from amskv_jax.models.kinds import param_shapes
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.activations import WORK_BYTES, parts
from amskv_jax.plan.memory import MemoryReport
from amskv_jax.policies import Full, Window
from amskv_jax.policies.grammar import parse_policy
from amskv_jax.sampling import TokenSampling
from amskv_jax.testing import TINY_INFINITY, TINY_VAR

GIB = 2**30
MEASURED = [
    ("var-d30", "full", 64, 17.02),
    ("var-d30", "ams", 64, 11.66),
    ("var-d36", "ams", 16, 13.6),
    ("infinity-2b", "full", 1, 7.87),
    ("infinity-2b", "ams:saving=0.85", 1, 5.48),
    ("infinity-2b", "scalekv:saving=0.9", 1, 5.27),
]
"""Model, policy, batch: peak GiB on an H100, bfloat16, guidance on, nothing decoded; see
docs/performance.md."""


def known(name, policy, batch, **options):
    model = configs.get(name).model
    pipe = Pipeline(model, None, model.schedule, "bfloat16", model.drawing, **options)
    plan = parse_policy(policy).plan(pipe.shape, pipe.geometry(batch), None)
    return pipe.sampler(plan, attention="cudnn")


@pytest.mark.parametrize(("name", "policy", "batch", "peak"), MEASURED)
def test_predictions_are_within_five_percent_of_what_was_measured(name, policy, batch, peak):
    sampler = known(name, policy, batch)
    condition = sampler.model.conditions(None).batch(np.arange(batch))
    found = predict(sampler, batch, condition, decode=False)
    assert found.total / GIB == pytest.approx(peak, rel=0.05)


def tiny(model, policy=Full(), **options):  # noqa: B008 (frozen)
    plan = policy.plan(model.cache_shape(model.schedule))
    sampling = TokenSampling(model.drawing.top_k, model.drawing.top_p)
    return Sampler(model, plan, model.guidance(model.drawing), sampling, **options)


def structs(model):
    """Weights without numbers."""
    flat = {
        f"{part}/{path}": jax.ShapeDtypeStruct(shape, np.float32)
        for part in ("transformer", "tokenizer")
        for path, shape in param_shapes(model.parts[part]).items()
    }
    return unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("model", [TINY_VAR, TINY_INFINITY], ids=["var", "infinity"])
def test_compilers_come_to_about_the_same(model):
    """XLA holds more on CPUs, where it fuses less, and what small batches need besides."""
    sampler, ratios = tiny(model, Window(window=4)), []
    for batch in (16, 64):
        condition = model.conditions(None).batch(np.arange(batch))
        keys = jax.eval_shape(lambda batch=batch: picture_keys(jax.random.key(0), batch))
        controls = model.controls(model.schedule, model.drawing)
        analysis = sampler.compile(structs(model), condition, keys, controls).memory_analysis()
        terms = dict(predict(sampler, batch, condition, decode=False).terms)
        weights = sum(weight_bytes(model, part, "float32") for part in ("transformer", "tokenizer"))
        assert weights == terms.pop("weights of the transformer") + terms.pop(
            "weights of the tokenizer"
        )
        del terms["margin"]
        ratios.append(sum(terms.values()) / analysis.temp_size_in_bytes)
    assert 0.6 < ratios[0] < 1 and 0.75 < ratios[1] < 1


def test_terms_are_what_is_really_held():
    sampler = tiny(TINY_VAR, Window(window=4))
    found = predict(sampler, 3)
    params = random_params(TINY_VAR)
    for part in ("transformer", "tokenizer"):
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(params[part]))
        assert found.terms[f"weights of the {part}"] == held
    drawing = predict(sampler, 3, decode=False)
    report = MemoryReport.of(sampler.plan, sampler.geometry(3))
    assert drawing.terms["cache"] == report.plan
    assert drawing.total == sum(drawing.terms.values())
    texts = predict(tiny(TINY_INFINITY), 3, decode=False).terms
    assert "keys and values of texts of 16 tokens" in texts


def test_parts_that_take_turns_are_not_counted_together():
    """And of the transformer, 8 bits and one layer in full."""
    sampler = known("infinity-2b", "ams:saving=0.85", 1)
    terms = predict_on_gpu(sampler, 1, in_turns=True).terms
    whole = predict_on_gpu(sampler, 1).terms["weights of the transformer"]
    assert {name for name in terms if name.startswith("weights")} == {
        "weights of the transformer in 8 bits",
        "weights of a layer in full",
    }
    packed = terms["weights of the transformer in 8 bits"]
    assert 0.5 * whole < packed < 0.53 * whole
    assert 0.9 * whole < 32 * terms["weights of a layer in full"] < whole
    decoding = predict_on_gpu(known("var-d30", "window:window=10", 51), 51, in_turns=True).terms
    assert {name for name in decoding if name.startswith("weights")} == {"weights of the tokenizer"}


def test_the_decoder_counts_where_it_needs_most():
    terms = predict(known("var-d30", "window:window=10", 51), 51).terms
    assert "activations of the decoder" in terms
    assert "cache" not in terms  # which is free again by then


def test_devices_that_share_pictures_need_less_each():
    sampler = tiny(TINY_VAR)
    shared = predict(replace(sampler, mesh=MeshShape(data=2)), 8, decode=False)
    assert shared == predict(sampler, 4, decode=False)


def test_gpus_without_fused_attention_hold_logits():
    sampler = tiny(TINY_VAR, attention="xla")
    plain = predict_on_gpu(sampler, 64).terms["activations of a block"]
    fused = predict_on_gpu(replace(sampler, dtype="bfloat16"), 64).terms["activations of a block"]
    assert plain > 2 * fused


@given(st.integers(1, 4096), st.integers(1, 1024))
def test_parts_are_equal_and_of_a_size(megabytes, pictures):
    size = 2**20 * megabytes * 4
    count = parts(size, pictures)
    assert pictures % count == 0
    assert count == 1 or 4 * size >= count * WORK_BYTES
    if pictures & (pictures - 1) == 0 and pictures * WORK_BYTES >= size:
        assert size <= count * WORK_BYTES


@given(st.integers(1, 100), st.integers(0, 10**6))
def test_the_largest_batch_fits_and_one_more_does_not(each, limit):
    most = largest_batch(lambda count: 10 + each * count, limit)
    assert 10 + each * (most + 1) > limit
    assert most == 0 or 10 + each * most <= limit


def test_half_a_thousand_pictures_fit_an_80_gib_gpu():
    """VAR-d30 with AMS-KV: more than the paper draws at once."""
    assert predict_on_gpu(known("var-d30", "ams", 512), 512).total < 62 * GIB
    full = known("var-d30", "full", 1)
    assert predict_on_gpu(full, 512).total > 80 * GIB


def test_what_cannot_fit_is_refused_before_anything_is_traced(monkeypatch):
    sampler = tiny(TINY_VAR)
    conditions, controls = (
        TINY_VAR.conditions(None),
        TINY_VAR.controls(sampler.plan.schedule, TINY_VAR.drawing),
    )
    monkeypatch.setattr(Sampler, "lower", lambda *arguments: pytest.fail("it was traced"))
    limit = predict(sampler, 5).total
    message = r"6 pictures at once need .*cache.*, and there are .*: draw at most 5 at once"
    with pytest.raises(OutOfMemoryError, match=message):
        Drawer(sampler, structs(TINY_VAR), conditions, controls, 6, device_memory=limit)
    with pytest.raises(OutOfMemoryError, match="not even one fits: take a policy that keeps less"):
        Drawer(sampler, structs(TINY_VAR), conditions, controls, 6, device_memory=1000)
    with pytest.raises(pytest.fail.Exception, match="it was traced"):
        Drawer(sampler, structs(TINY_VAR), conditions, controls, 5, device_memory=limit)


def test_nothing_is_refused_where_nothing_is_known():
    assert device_limit() is None  # CPUs do not say
    check_memory(tiny(TINY_VAR), 10**6, None, None)
    check_memory(tiny(TINY_VAR, mesh=MeshShape(model=2)), 10**6, None, 1)


def test_devices_are_asked(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 123}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert device_limit() == 123
    with pytest.raises(OutOfMemoryError, match="unless XLA_PYTHON_CLIENT_MEM_FRACTION says"):
        check_memory(tiny(TINY_VAR), 2, None, device_limit())


def test_memory_is_shown_by_term():
    assert str(DeviceMemory({"cache": GIB, "margin": GIB // 2})) == (
        "1.50 GiB (cache 1.00 GiB, margin 0.50 GiB)"
    )


def test_plan_predicts_the_largest_batch(amskv):
    sizes = ["--model", "var-d30", "--policy", "ams", "--device-memory", "80GiB"]
    printed = amskv("plan", *sizes, "--batch", "512", "--largest-batch").out
    assert "To draw 512 pictures at once on a GPU with fused attention:" in printed
    assert "weights of the transformer" in printed and "activations of a block" in printed
    assert "They fit in 80.00 GiB." in printed
    words = printed[printed.index("The largest batch within 80.00 GiB: ") :].split()
    assert 600 < int(words[6]) < 800
    assert "do not fit" in amskv("plan", *sizes, "--batch", "2000").out


def test_largest_batch_needs_a_size(amskv):
    finished = amskv("plan", "--model", "var-d30", "--largest-batch")
    assert finished.code == 2 and "--largest-batch needs --device-memory" in finished.err
    finished = amskv("plan", "--model", "var-d30", "--low-memory")
    assert finished.code == 2 and "--low-memory needs --device-memory" in finished.err
    finished = amskv("plan", "--model", "var-d30", "--device-memory", "much")
    assert finished.code == 2 and "'much': expected bytes such as 2GiB" in finished.err


def test_sample_refuses_before_it_loads_weights(amskv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--policy", "ams", "--device-memory", "300MiB", "--labels", "0-9"]
    finished = amskv("sample", *options)
    assert finished.code == 1 and "10 pictures at once need 0.33 GiB" in finished.err
    assert "draw at most 8 at once (--batch-size 8)" in finished.err
    assert not list(tmp_path.iterdir())
