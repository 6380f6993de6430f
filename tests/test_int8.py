"""Products of whole numbers of 8 bits: exact to their definition, in the kernel and without."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import assert_no_races, interpreted, many_threads

from amskv_jax.float8 import float8_weight
from amskv_jax.models.layers import BlockDense, FeedForward
from amskv_jax.stacked import Int8Weight, int8, int8_weight, layer_of
from amskv_jax.stacked.sizes import INT8_SUMMED, SHARED_BYTES, int8_tile


def operands(tokens, inputs, outputs, layers=3):
    random = np.random.default_rng(0)
    x = random.standard_normal((tokens, inputs)) * random.lognormal(size=(tokens, 1))
    kernel = random.standard_normal((layers, inputs, outputs)) / np.sqrt(inputs)
    kernel *= random.lognormal(size=(layers, 1, outputs))
    bias = random.standard_normal(outputs)
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.bfloat16), jnp.asarray(bias)


def rounded(values, axis):
    """Return values as whole numbers of at most 127 times what makes the largest one 127."""
    values = np.asarray(values, np.float32)
    most = np.abs(values).max(axis, keepdims=True)
    factor = np.float32(127) / np.where(most > 0, most, np.float32(127))
    return np.rint(values * factor).astype(np.float64) * (most.astype(np.float64) / 127)


def exact(x, kernel, bias, gelu):
    y = rounded(x, -1) @ rounded(kernel, 0)
    y += np.asarray(bias, np.float64)
    return np.asarray(jax.nn.gelu(jnp.asarray(y), approximate=True)) if gelu else y


def filled(x, size):
    """Stand for ``padded_int8_tokens``, whose dialect this interpreter does not know."""
    rounded, scale = int8.int8_tokens(x)
    missing = size - len(x)
    padding = ((0, missing), (0, 0))
    return jnp.pad(rounded, padding, constant_values=99), jnp.pad(scale, (0, missing), mode="edge")


@pytest.mark.parametrize("gelu", [False, True])
def test_products_are_those_of_numpy(gelu):
    """A token and a channel of zeros among them."""
    x, kernel, bias = operands(12, 64, 48)
    x, kernel = x.at[3].set(0), kernel.at[1, :, 5].set(0)
    weight = int8_weight(kernel)
    assert weight.transposed.shape == (3, 48, 64)
    assert weight.transposed.dtype == jnp.int8
    for layer in range(3):
        own = layer_of(weight, jnp.int32(layer))
        found = own.product(x.reshape(3, 4, 64), bias, gelu=gelu, dtype=jnp.float32)
        assert found.shape == (3, 4, 48)
        expected = exact(x, kernel[layer], bias, gelu)
        np.testing.assert_allclose(found.reshape(12, 48), expected, atol=2e-5, rtol=2e-5)


@interpreted
@many_threads
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "gelu", "dtype", "detect_races"),
    [
        (200, 256, 192, False, jnp.bfloat16, False),  # a tile that ends beyond the tokens
        (128, 1280, 64, True, jnp.float8_e4m3fn, False),  # more steps than stages
        (300, 128, 320, False, jnp.bfloat16, True),  # several tiles for each of two blocks
    ],
)
def test_kernel_computes_the_product(
    monkeypatch, tokens, inputs, outputs, gelu, dtype, detect_races
):
    from jax.experimental.pallas import mosaic_gpu

    from amskv_jax.stacked import int8_kernel

    monkeypatch.setattr(int8, "has_mosaic", lambda: True)
    monkeypatch.setattr(int8_kernel, "processors", lambda: 2)
    monkeypatch.setattr(int8_kernel, "INT8_PADDED", 256)
    monkeypatch.setattr(int8_kernel, "padded_int8_tokens", filled)
    x, kernel, bias = operands(tokens, inputs, outputs)
    x = x.astype(jnp.bfloat16)
    weight = layer_of(int8_weight(kernel), jnp.int32(2))
    parameters = mosaic_gpu.InterpretGPUParams(detect_races=detect_races)
    bias = bias.astype(jnp.bfloat16)
    with mosaic_gpu.force_gpu_interpret_mode(parameters):
        found = weight.product(x, bias, gelu=gelu, dtype=dtype)
    if detect_races:
        assert_no_races()
    assert found.dtype == dtype
    expected = exact(x, kernel[2], bias, gelu)
    step = 2**-8 if dtype == jnp.bfloat16 else 2**-4
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=step, atol=0.002)


def test_the_kernel_serves_sizes_that_fit(monkeypatch):
    weight = Int8Weight(jnp.zeros((2, 192, 256), jnp.int8), jnp.zeros((2, 192)))
    assert not weight._fits(), "a CPU has no use for it"
    monkeypatch.setattr(int8, "has_mosaic", lambda: True)
    assert weight._fits()
    narrow = Int8Weight(jnp.zeros((2, 192, 192), jnp.int8), jnp.zeros((2, 192)))
    assert not narrow._fits()


@interpreted
def test_a_kernel_serves_all_small_numbers_of_tokens(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu

    from amskv_jax.stacked import int8_kernel

    monkeypatch.setattr(int8_kernel, "padded_int8_tokens", filled)

    def products(x, stack, channel_scale, bias):
        def first(count):
            own = stack, channel_scale, jnp.int32(1), bias
            return int8_kernel.int8_product(x[:count], *own, gelu=False, dtype=jnp.bfloat16)

        return first(2), first(18), first(32)

    operands = (
        jnp.zeros((32, 128), jnp.bfloat16),
        jnp.zeros((2, 64, 128), jnp.int8),
        jnp.ones((2, 64)),
        jnp.zeros(64, jnp.bfloat16),
    )
    with mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams()):
        lowered = jax.jit(products).lower(*operands)
    assert lowered.as_text().count("func.func private @_padded_product") == 1


@interpreted
@pytest.mark.parametrize("tokens", [100, 8192, 12500])  # the last is 500 rows of 25 tokens
def test_kernels_are_lowered_for_any_number_of_tokens(tokens):
    from amskv_jax.stacked.int8_kernel import int8_product

    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((tokens, 128), jnp.bfloat16),
            ((2, 192, 128), jnp.int8),
            ((2, 192), jnp.float32),
            ((), jnp.int32),
            ((192,), jnp.bfloat16),
        ]
    ]
    product = jax.jit(partial(int8_product, gelu=False, dtype=jnp.bfloat16))
    text = product.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(("outputs", "columns"), [(5760, 192), (8192, 128), (320, 64)])
def test_tiles_fit_a_processor(outputs, columns):
    found, stages = int8_tile(outputs, jnp.bfloat16)
    assert found == columns
    assert stages >= 4
    assert stages * (128 + columns) * INT8_SUMMED + 2 * 128 * 64 * 2 <= SHARED_BYTES


@interpreted
def test_few_tokens_are_rounded_into_a_larger_array():
    from amskv_jax.stacked.int8_tokens import padded_int8_tokens

    x = operands(7, 96, 32)[0].at[3].set(0).astype(jnp.bfloat16)
    numbers, scale = padded_int8_tokens(x, 16)
    assert (numbers.shape, scale.shape) == ((16, 96), (16,))
    expected = int8.int8_tokens(x)
    np.testing.assert_array_equal(scale[:7], expected[1])
    # A half goes up in the one and to an even number in the other.
    assert np.abs(numbers[:7].astype(np.int32) - expected[0]).max() <= 1
    np.testing.assert_allclose(numbers[:7], np.asarray(x, np.float32) / scale[:7, None], atol=0.501)


def test_numbers_that_float8_does_not_reach_become_its_largest():
    x, kernel, bias = operands(4, 32, 32)
    weight = layer_of(int8_weight(kernel), jnp.int32(0))
    found = weight.product(x, bias + 1e4, gelu=False, dtype=jnp.float8_e4m3fn)
    np.testing.assert_array_equal(found.astype(jnp.float32), 448)


def test_feed_forward_rounds_once():
    """The first product's result goes to the second one in float8, as two layers would have it."""
    x, kernel, bias = operands(6, 32, 64)
    back = jnp.asarray(np.random.default_rng(1).standard_normal((3, 64, 32)) / 8, jnp.bfloat16)
    params = {
        "up": {"kernel": int8_weight(kernel), "bias": jnp.stack([bias] * 3)},
        "down": {"kernel": float8_weight(back), "bias": jnp.zeros((3, 32))},
    }
    own = layer_of(params, jnp.int32(1))
    x = x.reshape(2, 3, 32)
    found = FeedForward(64, jnp.bfloat16).apply({"params": own}, x)
    up = BlockDense(64, jnp.bfloat16, gelu=True, output=jnp.float8_e4m3fn)
    hidden = up.apply({"params": own["up"]}, x)
    assert hidden.dtype == jnp.float8_e4m3fn
    expected = BlockDense(32, jnp.bfloat16).apply({"params": own["down"]}, hidden)
    np.testing.assert_array_equal(found, expected)
