"""Products in float8: exact to their definition, near bfloat16's, refused where there are none."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import message

from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.checkpoints.weights import part_structs
from amskv_jax.device_memory import predict_on_gpu
from amskv_jax.eight_bits import rounding_of
from amskv_jax.evaluation.score import score
from amskv_jax.float8 import check_float8, float8_product, float8_weight
from amskv_jax.generate import program
from amskv_jax.models.infinity.prompts import TextFeatures
from amskv_jax.pipeline import Pipeline, load
from amskv_jax.policies import Full, Window
from amskv_jax.precision import FLOAT8
from amskv_jax.testing import TINY_INFINITY, TINY_VAR

MODELS = {"var": TINY_VAR, "infinity": TINY_INFINITY}
PARTS = ("transformer", "tokenizer")


def e4m3(values):
    """Round to four bits of significand, half to even, down to steps of 2^-9; cut off at 448."""
    values = np.clip(np.asarray(values, np.float64), -448, 448)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(values), 1e-30))), -6)
    step = 2 ** (exponent - 3)
    return np.rint(values / step) * step


def test_products_are_those_of_numpy():
    """Of layers of very different magnitude, one of zeros, and inputs beyond the largest number."""
    random = np.random.default_rng(0)
    kernel = random.standard_normal((4, 32, 48)) * np.array([3e-4, 1, 700, 0])[:, None, None]
    kernel, x = jnp.asarray(kernel, jnp.bfloat16), random.standard_normal((2, 5, 32))
    x[0, 0, :3] = 1e-4, 447, -5000
    x = jnp.asarray(x, jnp.bfloat16)
    weights = float8_weight(kernel)
    assert weights.transposed.shape == (4, 48, 32)
    for layer, own in enumerate(np.asarray(kernel, np.float64)):
        scale = 2.0 ** np.floor(np.log2(448 / (np.abs(own).max() or 448)))
        found = float8_product(x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], weights))
        assert found.dtype == jnp.bfloat16
        expected = e4m3(x) @ (e4m3(own * scale) / scale)
        np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-5 / scale)


def pipelines(name, float8):
    model = MODELS[name]
    for dtype in ("bfloat16", float8):
        params = random_params(model, seed=1, dtype=dtype, parts=PARTS)
        yield Pipeline(model, params, model.schedule, dtype, model.drawing)


def scored(pipe, count=4):
    random, shape = np.random.default_rng(0), (count, pipe.schedule.total)
    if pipe.model.takes == "classes":
        codes, wanted = random.integers(0, 64, shape), np.arange(count)
    else:
        codes, lengths = random.integers(0, 2, (*shape, 4)), np.array([3, 5, 2, 4], np.int32)
        features = random.standard_normal((lengths.sum(), 32), np.float32)
        wanted = TextFeatures(features, lengths)
    plans = {"full": pipe.plan(Full()), "window": pipe.plan(Window(2))}
    return score(pipe, plans, codes, pipe.conditions(wanted), batch=2)["full"].entropy


@pytest.mark.parametrize(
    ("name", "dtype"), [("var", "float8"), ("var", "float8-fast"), ("infinity", "float8-fast")]
)
def test_losses_are_near_those_of_bfloat16(name, dtype):
    """And nothing is compiled again for other weights; all that is no product is as in bfloat16."""
    whole, rounded = pipelines(name, dtype)
    losses = [scored(pipe) for pipe in (whole, rounded)]
    difference = losses[1].above(losses[0])
    assert np.abs(difference.values).max() > 0
    assert abs(difference.total.mean) < 0.02
    compiled = program("cpu")._cache_size()
    scored(rounded)
    assert program("cpu")._cache_size() == compiled
    assert rounded.geometry(3) == whole.geometry(3)
    flat = [dict(jax.tree.leaves_with_path(pipe.params)) for pipe in (whole, rounded)]
    changed = {jax.tree_util.keystr(path) for path in flat[0].keys() - flat[1].keys()}
    layers = ["']['".join(layer.split("/")) for layer in FLOAT8[dtype]]
    assert changed == {f"['transformer']['blocks']['{layer}']['kernel']" for layer in layers}
    for path in flat[0].keys() & flat[1].keys():
        np.testing.assert_array_equal(flat[0][path], flat[1][path])


def test_which_products():
    def kind(path, shape, dtype):
        rounding = rounding_of(path, shape, dtype)
        return None if rounding is None else type(rounding(jnp.ones(shape))).__name__

    down = "blocks/mlp/down/kernel"
    assert kind(f"transformer/{down}", (3, 64, 16), "float8") == "Float8Weight"
    assert kind(f"transformer/{down}", (3, 72, 16), "float8") is None  # no multiple of 16
    assert kind(f"text_encoder/{down}", (3, 64, 16), "float8") is None
    for dtype in ("float8", "float8-fast"):
        assert kind("transformer/blocks/attention/out/kernel", (3, 16, 16), dtype) is None
    for layer in ("mlp/up", "attention/qkv"):
        path = f"transformer/blocks/{layer}/kernel"
        assert kind(path, (3, 16, 48), "float8") == "Int8Weight"
        assert kind(path, (3, 16, 48), "float8-fast") == "Float8Weight"
        assert kind(path, (3, 16, 48), "bfloat16") is None


def test_checkpoints_are_rounded_when_they_are_loaded(checkpoint):
    pipe = load(checkpoint, "float8")
    for part in PARTS:
        found = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pipe.params[part]
        )
        assert found == part_structs(pipe.model, part, "float8")
    said = message(load, checkpoint, "float8", low_memory=True)
    assert "low_memory keeps weights in 8 bits of another kind than float8" in said


def test_memory_is_predicted():
    """Weights of one byte where products are in float8; activations with their copies."""
    terms = {}
    for dtype in ("bfloat16", "float8"):
        pipe = Pipeline(TINY_VAR, None, TINY_VAR.schedule, dtype, TINY_VAR.drawing)
        terms[dtype] = predict_on_gpu(pipe.sampler(), 256).terms
    depth, width = TINY_VAR.transformer.depth, TINY_VAR.transformer.width
    saved = depth * (11 * width**2 - 2 - 4 * 7 * width)  # less scales of layers and channels
    weights = [terms[dtype]["weights of the transformer"] for dtype in terms]
    assert weights[0] - weights[1] == saved
    assert terms["float8"]["cache"] == terms["bfloat16"]["cache"]
    name = "activations of a block"
    assert terms["bfloat16"][name] <= terms["float8"][name] < 1.5 * terms["bfloat16"][name]


def test_devices_without_are_refused(monkeypatch, checkpoint, amskv, tmp_path):
    for words in (
        ["sample", "--checkpoint", checkpoint, "--labels", "1", "--out", tmp_path / "a.png"],
        ["bench", "--model", "var-tiny"],
    ):
        done = amskv(*words, "--dtype", "float8")
        assert done.code == 1
        assert "cpu (cpu) has no float8 products: expected an NVIDIA GPU" in done.err
        assert "--dtype bfloat16" in done.err
    pipe = load(checkpoint, "float8")
    said = message(pipe.sample, np.arange(2), key=jax.random.key(0))
    drawer = message(pipe.drawer, pipe.sampler(), pipe.conditions(None), 2)
    assert said == drawer and said.startswith("cpu (cpu) has no float8 products")

    def on(capability, platform="gpu", kind="NVIDIA A100-SXM4-80GB"):
        device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda: [device])

    on("8.0")
    said = message(check_float8, "float8")
    assert "NVIDIA A100-SXM4-80GB, of compute capability 8.0, has no float8 products" in said
    check_float8("bfloat16")
    for capability in ("8.9", "9.0", "10.0", "12.0"):
        on(capability)
        check_float8("float8-fast")
    said = message(check_float8, "float8")
    assert "found NVIDIA A100-SXM4-80GB, of compute capability 12.0, and JAX" in said
    assert said.endswith("Draw with --dtype float8-fast or bfloat16")
    on("9.0", kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    check_float8("float8")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "such as H100, and JAX 0.11 or later" in message(check_float8, "float8")
    on("gfx942", kind="AMD Instinct MI300X")
    assert message(check_float8, "float8").startswith("AMD Instinct MI300X (gpu) has no")


def test_low_memory_is_another_way(checkpoint, amskv, tmp_path):
    done = amskv(
        *("plan", "--model", "var-tiny", "--policy", "full", "--device-memory", "1GiB"),
        *("--low-memory", "--dtype", "float8"),
    )
    assert done.code == 2
    assert "--low-memory keeps weights in 8 bits of another kind: leave it out" in done.err
