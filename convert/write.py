"""Writing .safetensors files tensor by tensor, in any order."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from amskv_jax.convert.table import Shape
from amskv_jax.convert.tensors import SAFETENSORS_DTYPES

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_ALIGNMENT = 8


class SafetensorsWriter:
    """The tensors of a file that is being written."""

    def __init__(self, file: BinaryIO, start: int, places: Mapping[str, "_Place"]) -> None:
        self._file, self._start, self._places = file, start, places
        self._missing = set(places)

    def write(self, key: str, value: np.ndarray) -> None:
        """Write a tensor in its place.

        Raises:
          ValueError: if it is not of the shape and type that were announced.
        """
        place = self._places[key]
        if (value.shape, value.dtype) != (place.shape, place.dtype):
            raise ValueError(f"{key} is {value.dtype} {value.shape}, expected {place}")
        self._file.seek(self._start + place.begin)
        # An array's memory is written, whatever its strides.
        self._file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        self._missing.discard(key)

    def check(self) -> None:
        """Raise a ValueError unless every tensor was written."""
        if self._missing:
            raise ValueError(f"{min(self._missing)} was not written")


class _Place:
    def __init__(self, shape: Shape, dtype: np.dtype, begin: int) -> None:
        self.shape, self.dtype, self.begin = shape, dtype, begin
        self.end = begin + math.prod(shape) * dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@contextmanager
def writing_safetensors(
    path: Path, tensors: Mapping[str, tuple[Shape, np.dtype]]
) -> Iterator[SafetensorsWriter]:
    """Make a file, and yield what its tensors are written with.

    Args:
      path: the file.
      tensors: shape and type of every tensor by its name.

    Raises:
      OSError: if it cannot be written.
      ValueError: if a tensor is another one, or is missing at the end.
    """
    places: dict[str, _Place] = {}
    end = 0
    # The largest numbers first, so that every tensor begins at a multiple of its numbers' size.
    for key, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
        places[key] = _Place(shape, dtype, end)
        end = places[key].end
    header = {
        key: {"dtype": _NAMES[p.dtype], "shape": p.shape, "data_offsets": (p.begin, p.end)}
        for key, p in places.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        writer = SafetensorsWriter(file, 8 + len(text), places)
        yield writer
        writer.check()
        file.truncate(8 + len(text) + end)
