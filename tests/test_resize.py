import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_weights import GOLDEN

from amskv_jax.resize import interpolation_matrix, resize
from amskv_jax.schedule import VAR_256, VAR_512

METHODS = ("area", "bicubic", "bilinear")
LENGTHS = st.integers(1, 40)

jitted = jax.jit(resize, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "var/interp.npz") as file:
        return dict(file)


def picture(seed, side):
    values = np.random.RandomState(seed).standard_normal((1, 1, side, side))
    return jnp.asarray(values.astype(np.float32).transpose(0, 2, 3, 1))


@pytest.mark.parametrize(("name", "schedule"), [("256", VAR_256), ("512", VAR_512)])
def test_bicubic_and_area_agree_with_the_reference(golden, name, schedule):
    last = schedule.grids[-1][0]
    for side, _ in schedule.grids:
        larger = jitted(picture(side, side), (last, last), "bicubic")
        smaller = jitted(picture(100 + side, last), (side, side), "area")
        np.testing.assert_allclose(
            larger[0, ..., 0], golden[f"bicubic_{name}_{side}"][0, 0], atol=1e-6
        )
        np.testing.assert_allclose(
            smaller[0, ..., 0], golden[f"area_{name}_{side}"][0, 0], atol=1e-6
        )


def test_bilinear_agrees_with_the_reference(golden):
    names = [name for name in golden if name.startswith("bilinear")]
    assert names
    for name in names:
        source, target = (int(part) for part in name.split("_")[1::2])
        result = jitted(picture(source, source), (target, target), "bilinear")
        # Torch rounds the coordinates to float32.
        np.testing.assert_allclose(result[0, ..., 0], golden[name][0, 0], atol=5e-6)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(source=LENGTHS, target=LENGTHS)
def test_rows_average_and_mirror(method, source, target):
    matrix = interpolation_matrix(source, target, method)
    chex.assert_shape(matrix, (target, source))
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)
    if method != "bicubic":
        assert (matrix >= 0).all()


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(length=LENGTHS)
def test_matrix_of_an_unchanged_size_is_the_identity(method, length):
    np.testing.assert_array_equal(interpolation_matrix(length, length, method), np.eye(length))


@settings(deadline=None)
@given(target=LENGTHS, factor=st.integers(1, 8))
def test_area_of_a_multiple_averages_disjoint_bins(target, factor):
    matrix = interpolation_matrix(target * factor, target, "area")
    np.testing.assert_allclose(
        matrix, np.repeat(np.eye(target), factor, axis=1) / factor, atol=1e-7
    )


def test_area_bins_overlap():
    np.testing.assert_allclose(
        interpolation_matrix(5, 3, "area"),
        [[1 / 2, 1 / 2, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1 / 2, 1 / 2]],
        atol=1e-7,
    )


@pytest.mark.parametrize("method", METHODS)
def test_axes_and_channels_are_independent(method):
    x = np.random.RandomState(0).standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    result = resize(jnp.asarray(x), (7, 3), method)
    chex.assert_shape(result, (2, 3, 7, 3, 6))
    rows, columns = interpolation_matrix(4, 7, method), interpolation_matrix(5, 3, method)
    expected = np.einsum("Hh,Ww,abhwc->abHWc", rows, columns, x)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_unchanged_size_changes_no_value_and_gives_float32():
    x = jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(1, 2, 3, 2)
    result = resize(x, (2, 3), "bicubic")
    chex.assert_type(result, jnp.float32)
    np.testing.assert_array_equal(result, x.astype(jnp.float32))


def test_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'nearest'.*'area', 'bicubic' or 'bilinear'"):
        resize(jnp.zeros((1, 2, 2, 1)), (4, 4), "nearest")
