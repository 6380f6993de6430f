"""Tensors in files, read one at a time: shapes and types are known at once, values when wanted."""

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from amskv_jax.errors import AmskvError

BFLOAT16 = np.dtype(jnp.bfloat16)
SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
TORCH_DTYPES = {
    "torch.float64": np.dtype(np.float64),
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16),
    "torch.bfloat16": BFLOAT16,
    "torch.int64": np.dtype(np.int64),
    "torch.int32": np.dtype(np.int32),
    "torch.int16": np.dtype(np.int16),
    "torch.int8": np.dtype(np.int8),
    "torch.uint8": np.dtype(np.uint8),
    "torch.bool": np.dtype(np.bool_),
}
MAPPED_BYTES = 2**28
"""Bytes that are read of a mapped file before its memory is given back, by mapping it anew."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array in a file: ``np.asarray(tensor)`` reads it.

    Attributes:
      shape: its shape.
      dtype: its type; object for a tensor that NumPy cannot hold.
      read: reads the file.
      description: what it is, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    description: str = "tensor"

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the values, for ``np.asarray``."""
        array = self.read()
        return array if dtype is None else array.astype(dtype)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    It holds 8 bytes with the header's length, the header (JSON), the data.

    Raises:
      AmskvError: if it is another file, truncated or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise AmskvError(f"{path} is truncated, or not a safetensors file")
        header_bytes = file.read(start - 8)
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        entries = {
            key: (value["dtype"], tuple(value["shape"]), *value["data_offsets"])
            for key, value in header.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise AmskvError(f"{path} is damaged, or not a safetensors file") from error
    state = {}
    for key, (dtype_name, shape, begin, end) in entries.items():
        dtype = SAFETENSORS_DTYPES.get(dtype_name)
        if dtype is None:
            raise AmskvError(f"{path}: {key} is of type {dtype_name}, which is not supported")
        if start + end > size:
            raise AmskvError(f"{path} is truncated: {key} ends at byte {start + end} of {size}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise AmskvError(f"{path} is damaged: {key} {shape} has {end - begin} bytes")
        state[key] = Tensor(shape, dtype, _Bytes(path, start + begin, shape, dtype))
    return state


@dataclass(frozen=True)
class _Bytes:
    """Reads one tensor of a safetensors file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __call__(self) -> np.ndarray:
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        try:
            data = np.fromfile(self.path, np.uint8, num_bytes, offset=self.offset)
        except OSError as error:
            raise AmskvError(f"{self.path} cannot be read: {error}") from error
        if len(data) < num_bytes:
            raise AmskvError(f"{self.path} is truncated: it became shorter while it was read")
        return data.view(self.dtype).reshape(self.shape)


def read_torch(path: Path) -> Mapping[str, Any]:
    """Return the content of a file of ``torch.save``, with a ``Tensor`` for each of its tensors.

    Raises:
      AmskvError: if PyTorch is not there, or the file is damaged or holds something else.
    """
    file = _TorchFile(path)
    content = _with_tensors(file, file.content, ())
    if not isinstance(content, Mapping):
        raise AmskvError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


class _TorchFile:
    """A file of ``torch.save``, mapped into memory if it can be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_mapped = zipfile.is_zipfile(path)  # before PyTorch 1.6 there were others
        self.content = self._load()
        self.read_bytes = 0

    def read(self, names: tuple[Any, ...]) -> np.ndarray:
        """Return the tensor to which the names lead."""
        if self.is_mapped and self.read_bytes > MAPPED_BYTES:
            self.content, self.read_bytes = None, 0  # what was read stays in memory until here
            self.content = self._load()
        value = self.content
        for name in names:
            value = value[name]
        array = _to_numpy(value)
        self.read_bytes += array.nbytes
        return array

    def _load(self) -> Any:
        try:
            import torch  # noqa: PLC0415
        except ImportError as error:
            raise AmskvError(
                f"reading {self.path} needs PyTorch: pip install 'amskv-jax[convert]', "
                "or give a .safetensors file"
            ) from error
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.is_mapped)
        except Exception as error:  # the unpickler and the zip reader raise many types
            reason = str(error).strip().partition("\n")[0][:200]
            raise AmskvError(
                f"{self.path} cannot be read: it is truncated, damaged, or holds other Python "
                f"objects than tensors ({reason})"
            ) from error


def _with_tensors(file: _TorchFile, value: Any, names: tuple[Any, ...]) -> Any:
    """Return what a file holds, with a ``Tensor`` in the place of every tensor."""
    if isinstance(value, Mapping):
        return {key: _with_tensors(file, item, (*names, key)) for key, item in value.items()}
    if not hasattr(value, "shape"):
        return value
    dtype = TORCH_DTYPES.get(str(value.dtype), np.dtype(object))
    if str(value.layout) != "torch.strided":
        dtype = np.dtype(object)
    description = f"{value.layout} tensor of {value.dtype}"
    return Tensor(tuple(value.shape), dtype, lambda: file.read(names), description)


def _to_numpy(value: Any) -> np.ndarray:
    """Return a PyTorch tensor as a NumPy array without copying."""
    import torch  # noqa: PLC0415

    value = value.detach()
    if value.dtype == torch.bfloat16:  # unknown to NumPy itself
        array: np.ndarray = value.view(torch.int16).numpy().view(BFLOAT16)
        return array
    array = value.numpy()
    return array
