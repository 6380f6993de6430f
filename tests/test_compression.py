import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from amskv_jax.checkpoints import compression
from amskv_jax.checkpoints.compression import (
    SMALL,
    CompressedFile,
    compress,
    decompress,
    write_compressed,
)
from amskv_jax.errors import AmskvError
from amskv_jax.packed_weight import widened


def weights(*shape, seed=0):
    """Channels of very different size, as trained kernels have them."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-3, 1, shape[-1])
    return (rng.normal(size=shape) * size).astype(np.float32)


@pytest.fixture
def params():
    return {
        "transformer": {
            "blocks": {"kernel": weights(3, 96, 128), "log_temperature": weights(4, 128, 128)},
            "head": {"kernel": weights(256, 160), "bias": weights(160)},
        },
        "tokenizer": {
            "conv": {"kernel": weights(3, 3, 64, 64)},
            "quantizer": {"codebook": weights(4096, 16), "phi_kernel": weights(4, 3, 3, 16, 64)},
        },
    }


def test_what_is_stored_how(params):
    kinds = {name: array.dtype for name, array in compress(params).items()}
    assert kinds == {
        "transformer/blocks/kernel": np.int8,
        "transformer/blocks/kernel:scale": np.float32,
        "transformer/blocks/log_temperature": np.float32,
        "transformer/head/kernel": np.int8,
        "transformer/head/kernel:scale": np.float32,
        "transformer/head/bias": np.float32,
        "tokenizer/conv/kernel": np.float16,
        "tokenizer/quantizer/codebook": np.float32,
        "tokenizer/quantizer/phi_kernel": np.float32,
    }
    assert params["tokenizer"]["quantizer"]["codebook"].size > SMALL


@pytest.mark.parametrize("shape", [(256, 160), (3, 96, 128)])
def test_integers_err_by_half_a_scale_of_their_own_channel(shape):
    kernel = weights(*shape)
    arrays = compress({"kernel": kernel})
    scale = arrays["kernel:scale"]
    assert scale.shape == (*shape[:-2], 1, shape[-1])
    largest = np.abs(kernel).max(-2, keepdims=True)
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
    error = np.abs(decompress(arrays)["kernel"] - kernel)
    assert (error <= 0.5001 * scale).all()
    assert (np.abs(arrays["kernel"]).max(-2) == 127).all()  # the whole range is used
    assert error.max() > 0.4 * scale.max()  # and the bound is no luxury


def test_halves_err_by_their_last_bit():
    kernel = weights(3, 3, 64, 64)
    error = np.abs(decompress(compress({"kernel": kernel}))["kernel"] - kernel)
    assert (error <= np.abs(kernel) * 2**-11 + 2**-25).all()


def test_small_and_delicate_parameters_are_exact(params):
    found = flatten_dict(decompress(compress(params)), sep="/")
    expected = flatten_dict(params, sep="/")
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.dtype == np.float32
        assert leaf.shape == expected[name].shape
        exact = name.endswith("bias") or "quantizer" in name or "temperature" in name
        assert np.array_equal(leaf, expected[name]) == exact, name


def test_compressing_again_changes_nothing(params):
    once = compress(params)
    again = compress(decompress(once))
    for name, array in once.items():
        if name.endswith(compression.SCALE):
            np.testing.assert_allclose(again[name], array, rtol=1e-6)
        else:
            np.testing.assert_array_equal(again[name], array)


def test_channels_of_zeros_and_half_precision_weights():
    kernel = weights(256, 160)
    kernel[:, 3] = 0
    assert (decompress(compress({"kernel": kernel}))["kernel"][:, 3] == 0).all()
    half = jnp.asarray(kernel, jnp.bfloat16)
    expected = compress({"kernel": np.asarray(half, np.float32)})
    for name, array in compress({"kernel": half}).items():
        np.testing.assert_array_equal(array, expected[name])


def test_weights_that_cannot_be_compressed():
    kernel = weights(256, 160)
    kernel[0, 0] = np.nan
    with pytest.raises(AmskvError, match="the weights a/kernel are not all finite"):
        compress({"a": {"kernel": kernel}})
    with pytest.raises(AmskvError, match="too large for float16"):
        compress({"kernel": 1e6 * weights(3, 3, 64, 64)})


def test_file(params, tmp_path):
    path, arrays = tmp_path / "weights.safetensors", compress(params)
    write_compressed(path, arrays, "what this is")
    assert CompressedFile(path).description() == "what this is"
    found = {
        f"{part}/{name}": leaf
        for part in params
        for name, leaf in CompressedFile(path).leaves(part)
    }
    assert found.keys() == flatten_dict(params, sep="/").keys()
    for name, leaf in flatten_dict(decompress(arrays), sep="/").items():
        np.testing.assert_array_equal(widened(found[name]), leaf)
    assert path.stat().st_size < 1.01 * sum(array.nbytes for array in arrays.values())
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]


def test_files_that_are_something_else(params, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text("hello")
    for read in (CompressedFile.description, lambda file: file.shapes("transformer")):
        with pytest.raises(AmskvError, match=r"weights\.safetensors.*(damaged|cannot be read)"):
            read(CompressedFile(path))
    path.write_bytes(compression.save({"a": np.zeros(3, np.float32)}))
    with pytest.raises(AmskvError, match="not a packed checkpoint of this package"):
        CompressedFile(path).description()
    arrays = compress(params)
    del arrays["transformer/head/kernel:scale"]
    write_compressed(path, arrays, "")
    with pytest.raises(AmskvError, match="the scales of transformer/head/kernel are missing"):
        list(CompressedFile(path).leaves("transformer"))


def test_a_file_that_cannot_be_written_leaves_nothing_behind(params, tmp_path, monkeypatch):
    def write_a_part_and_fail(path, content):
        path.write_text("part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", write_a_part_and_fail)
    with pytest.raises(AmskvError, match=r"cannot write .*No space left"):
        write_compressed(tmp_path / "weights.safetensors", compress(params), "")
    assert list(tmp_path.iterdir()) == []
