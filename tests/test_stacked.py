"""Products with stacked weights: in Pallas' interpreter, and wherever they are copied."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import assert_no_races, interpreted

from amskv_jax import hopper
from amskv_jax.models.layers import BlockDense, FeedForward
from amskv_jax.stacked import StackedWeight, in_place, layer_of, weight
from amskv_jax.stacked.sizes import CHUNK, GRANULE, SIZES, splits_for, stages_for


@contextmanager
def interpreter(detect_races):
    """Run kernels for GPUs on the CPU, and let none pass that has a data race."""
    from jax.experimental.pallas import mosaic_gpu

    parameters = mosaic_gpu.InterpretGPUParams(detect_races=detect_races)
    with mosaic_gpu.force_gpu_interpret_mode(parameters):
        yield
    if detect_races:
        assert_no_races()


def operands(tokens, inputs, outputs):
    x, stack, bias = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for seed, shape in enumerate([(tokens, inputs), (3, inputs, outputs), (outputs,)])
    )
    return x, stack / np.sqrt(inputs).astype(jnp.bfloat16), bias


def exact(x, kernel, bias, gelu):
    """Return the product in float32."""
    product = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
    y = product + np.asarray(bias, np.float32)
    return np.asarray(jax.nn.gelu(y, approximate=True)) if gelu else y


@interpreted
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "gelu", "detect_races"),
    [
        (2, 128, 128, False, False),  # padded
        (32, 576, 64, True, False),  # parts of four and five steps
        (100, 320, 64, True, True),  # more steps than stages, written in two chunks
    ],
)
def test_kernel_computes_the_product(tokens, inputs, outputs, gelu, detect_races):
    from amskv_jax.stacked.kernel import product_of_layer

    x, stack, bias = operands(tokens, inputs, outputs)
    with interpreter(detect_races):
        y = product_of_layer(x, stack, jnp.int32(1), bias, gelu=gelu)
    expected = exact(x, stack[1], bias, gelu)
    chex.assert_type(y, jnp.bfloat16)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)


@interpreted
def test_blocks_take_the_kernel_where_it_pays(monkeypatch):
    monkeypatch.setattr(weight, "has_mosaic", lambda: True)
    module = FeedForward(128, jnp.bfloat16)
    x = operands(6, 64, 64)[0].reshape(2, 3, 64)
    params = jax.vmap(lambda key: module.init(key, x)["params"])(
        jax.random.split(jax.random.key(5))
    )
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    own = layer_of(in_place(params), jnp.int32(1))
    assert isinstance(own["down"]["kernel"], StackedWeight)
    with interpreter(detect_races=False):
        text = str(jax.make_jaxpr(lambda own: module.apply({"params": own}, x))(own))
        found = module.apply({"params": own}, x)
    assert text.count("name=_padded_product") == 2
    plain = module.apply({"params": jax.tree.map(lambda leaf: leaf[1], params)}, x)
    np.testing.assert_allclose(found.astype(jnp.float32), plain.astype(jnp.float32), atol=0.02)


@interpreted
def test_a_kernel_serves_all_numbers_of_tokens_of_its_size():
    from amskv_jax.stacked.kernel import product_of_layer

    x, stack, bias = operands(32, 64, 64)

    def products(x, stack, bias):
        few = partial(product_of_layer, stack=stack, layer=jnp.int32(1), bias=bias, gelu=False)
        return few(x), few(x[:18]), few(x[:2])

    with interpreter(detect_races=False):
        lowered = jax.jit(products).lower(x, stack, bias)
    assert lowered.as_text().count("func.func private @_padded_product") == 1


def test_larger_products_copy_their_layer():
    x, stack, bias = operands(3, 64, 128)
    params = {"kernel": StackedWeight(stack), "bias": jnp.broadcast_to(bias, (3, 128))}
    module = BlockDense(128, jnp.float32)
    found = module.apply({"params": layer_of(params, jnp.int32(2))}, x)  # of another type
    plain = module.apply({"params": {"kernel": stack[2], "bias": bias}}, x)
    np.testing.assert_array_equal(found, plain)
    whole = StackedWeight(stack, jnp.int32(2))
    assert whole.pays(jnp.zeros((2, weight.MOST_TOKENS // 2, 64), jnp.bfloat16))
    assert not whole.pays(jnp.zeros((1, weight.MOST_TOKENS + 1, 64), jnp.bfloat16))
    assert not whole.pays(jnp.zeros((weight.MOST_ROWS + 2, 1, 64), jnp.bfloat16))


def test_only_kernels_that_tiles_divide_are_read_in_place(monkeypatch):
    def of(*shape, dtype=jnp.bfloat16):
        return jnp.zeros(shape, dtype)

    weights = {
        "fits": {"kernel": of(2, 64, 128), "bias": of(2, 128)},
        "narrow": {"kernel": of(2, 64, 96)},
        "float32": {"kernel": of(2, 64, 64, dtype=jnp.float32)},
        "table": of(2, 64, 64),
    }
    assert in_place(weights) is weights, "a CPU reads nothing in place"
    monkeypatch.setattr(weight, "has_mosaic", lambda: True)
    found = in_place(weights)
    assert isinstance(found["fits"]["kernel"], StackedWeight)
    kinds = jax.tree.map(
        lambda leaf: isinstance(leaf, StackedWeight), found, is_leaf=weight._is_stacked
    )
    assert sum(jax.tree.leaves(kinds)) == 1
    own = layer_of(found, jnp.int32(1))
    assert own["fits"]["kernel"].stack is weights["fits"]["kernel"], "it stays where it is"
    assert own["table"].shape == (64, 64)


@pytest.mark.parametrize(
    ("width", "splits"), [(1920, (1, 4, 1, 4)), (2048, (1, 4, 1, 4)), (2304, (1, 2, 1, 2))]
)
def test_shares_of_a_block(width, splits):
    sides = (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)
    assert tuple(splits_for(*side) for side in sides) == splits


def test_a_block_fits_a_processor():
    for tokens in SIZES:
        stages = stages_for(tokens, 30)
        tiles = stages * (tokens + GRANULE) * GRANULE * 2 + min(CHUNK, tokens) * GRANULE * 4
        assert tiles + 16 * stages <= 227 * 1024, "tiles and barriers"
        assert stages == 8


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ((0, 12, 1), "9.0", True),
        ((0, 10, 2), "9.0", False),
        ((0, 13, 0), "9.0", False),
        ((0, 12, 0), "8.0", False),
    ],
)
def test_kernels_are_used_where_they_were_tried(monkeypatch, version, capability, expected):
    device = SimpleNamespace(compute_capability=capability)
    fake = SimpleNamespace(devices=lambda: [device], __version_info__=version)
    monkeypatch.setattr(hopper, "jax", fake)
    assert hopper.has_mosaic() == expected
