"""Weights in few bytes: 8-bit integers with a scale per output channel, half precision, float32.

What is how exact follows from what the parameter does:

- kernels of linear layers and large embeddings, nearly all bytes of a transformer: 8-bit integers.
  Every output channel (last axis; stacked layers have channels of their own) has a scale, so that
  weight = integer * scale with an error of half a scale at most;
- other large parameters, the convolutions of a tokenizer: float16, to 11 significant bits;
- whatever is small, and what turns one token into another (codebook, phi, attention temperatures):
  float32, exactly.

The integers lie under the parameter's own path, the scales beside them under path + ":scale".
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from amskv_jax.checkpoints.weights import EXACT, SMALL
from amskv_jax.errors import AmskvError
from amskv_jax.files import replacing
from amskv_jax.packed_weight import PackedWeight, widened

SCALE = ":scale"
FILE = "file:"
"""Before the names of small files that lie beside the weights."""
LARGEST = 127
DESCRIPTION = "amskv_jax"
"""Key of the description among a file's metadata."""


def compress(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return parameters in fewer bytes.

    Args:
      params: a tree of NumPy or JAX arrays, float32 or bfloat16.

    Returns:
      Path -> int8, float16 or float32 array; path + ":scale" -> float32 [..., 1, channels].

    Raises:
      AmskvError: if a weight is not finite, or too large for float16.
    """
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        weights = np.asarray(leaf, np.float32)
        if not np.isfinite(weights).all():
            raise AmskvError(f"the weights {path} are not all finite: train or convert them again")
        if EXACT & set(path.split("/")) or weights.size < SMALL:
            arrays[path] = weights
        elif weights.ndim in (2, 3):
            scale = np.abs(weights).max(-2, keepdims=True) / np.float32(LARGEST)
            scale[scale == 0] = 1
            arrays[path] = np.rint(weights / scale).astype(np.int8)
            arrays[path + SCALE] = scale
        elif np.abs(weights).max() > np.finfo(np.float16).max:
            raise AmskvError(f"the weights {path} are too large for float16")
        else:
            arrays[path] = weights.astype(np.float16)
    return arrays


def decompress(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the tree of float32 weights that ``compress`` was given, up to rounding.

    Raises:
      AmskvError: if scales are missing.
    """
    weights = {
        path: _decompress(path, array, arrays.get(path + SCALE))
        for path, array in arrays.items()
        if not path.endswith(SCALE)
    }
    return unflatten_dict(weights, sep="/")


def _decompress(path: str, array: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    weights: np.ndarray = widened(_read(path, array, scale))
    return weights


def _read(path: str, array: np.ndarray, scale: np.ndarray | None) -> np.ndarray | PackedWeight:
    """Return an array of a file in float32, or packed."""
    if array.dtype != np.int8:
        return array.astype(np.float32)
    if scale is None:
        raise AmskvError(f"the scales of {path} are missing")
    return PackedWeight(array, scale)


def pack_weight(path: str, leaf: np.ndarray) -> PackedWeight:
    """Return a parameter of which ``compress`` makes 8-bit integers packed.

    Raises:
      AmskvError: if a weight is not finite.
    """
    arrays = compress({path: leaf})
    return PackedWeight(arrays[path], arrays[path + SCALE])


def write_compressed(path: Path, arrays: Mapping[str, np.ndarray], description: str) -> None:
    """Write a .safetensors file, which is there whole or not at all.

    Args:
      path: the file; one that exists is replaced.
      arrays: what ``compress`` returned.
      description: any text that says what the weights are.

    Raises:
      AmskvError: if the file cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with replacing(path) as temporary:
        # Not `save_file`: it makes files which only their owner may read.
        temporary.write_bytes(save(contiguous, {DESCRIPTION: description}))


class CompressedFile:
    """A file of ``write_compressed``, read array by array; see ``storage.Storage``.

    The parameters of a part lie under "part/path", small files beside them under "file:name".
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def description(self) -> str:
        """Return what the weights are.

        Raises:
          AmskvError: if it cannot be read, or is another file.
        """
        with self._open("{path} is not a checkpoint, or damaged: {error}") as file:
            metadata = file.metadata() or {}
        if DESCRIPTION not in metadata:
            raise AmskvError(
                f"{self.path} is not a packed checkpoint of this package. "
                "Weights of the PyTorch reference are to be converted first"
            )
        return str(metadata[DESCRIPTION])

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a part's parameters.

        Raises:
          AmskvError: if they cannot be read.
        """
        start = f"{part}/"
        with self._open() as file:
            return {
                name[len(start) :]: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118
                if name.startswith(start) and not name.endswith(SCALE)
            }

    def leaves(self, part: str) -> Iterator[tuple[str, np.ndarray | PackedWeight]]:
        """Yield the parameters of a part with their paths, in float32 or packed.

        Raises:
          AmskvError: if they cannot be read, or scales are missing.
        """
        for path in self.shapes(part):
            name = f"{part}/{path}"
            with self._open() as file:
                scale = name + SCALE
                scales = file.get_tensor(scale) if scale in file.keys() else None  # noqa: SIM118
                array = file.get_tensor(name)
            yield path, _read(name, array, scales)

    def file(self, name: str) -> bytes:
        """Return a small file.

        Raises:
          AmskvError: if it is not there.
        """
        with self._open() as file:
            content: bytes = file.get_tensor(FILE + name).tobytes()
            return content

    @contextmanager
    def _open(
        self, message: str = "the weights in {path} cannot be read: {error}"
    ) -> Iterator[Any]:
        try:
            with safe_open(self.path, "numpy") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise AmskvError(message.format(path=self.path, error=error)) from error
