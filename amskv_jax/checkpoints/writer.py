"""Writing a checkpoint part after part, without ever holding all of it."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from amskv_jax.checkpoints.info import CheckpointInfo, check_classes, info_to_json
from amskv_jax.checkpoints.storage import GROUP_BYTES, GroupedFolders
from amskv_jax.checkpoints.weights import (
    Fingerprint,
    check_shapes,
    describe_differences,
    model_shapes,
    storage_dtype,
)
from amskv_jax.errors import AmskvError
from amskv_jax.files import check_new_directory, new_directory, write_text
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.protocol import Model

Leaves = Mapping[str, Any] | Iterable[tuple[str, Any]]
"""A part's weights: a tree, or (path, array) in any order, as they come."""


class CheckpointWriter:
    """A checkpoint that is being written; it is there whole or not at all.

        with CheckpointWriter(directory, model, "bfloat16") as writer:
            for part in model.parts:
                writer.add(part, weights_of(part))
        writer.info

    Memory: of weights that come one by one, twice the largest, or a gigabyte or two if it is small.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: Model,
        dtype: str = "float32",
        *,
        classes: Sequence[str] = (),
        drawing: Drawing | None = None,
    ) -> None:
        """Say what will be written.

        Args:
          directory: the folder to make; it must not exist or be empty.
          model: kind and shape of the model, without parts that the checkpoint is to lack.
          dtype: "float32" or "bfloat16", see ``weights.storage_dtype``.
          classes: names of the classes, where they are known.
          drawing: what suits the model; by default what suits models of its kind.

        Raises:
          AmskvError: if the folder exists, or model, type and classes do not fit.
        """
        self._directory = Path(directory)
        check_new_directory(self._directory)
        check_classes(model, classes)
        self._model, self._dtype = model, dtype
        self._shapes = model_shapes(model)
        self._num_bytes = sum(
            math.prod(shape) * storage_dtype(path, dtype).itemsize
            for path, shape in self._shapes.items()
        )
        self._classes, self._drawing = tuple(classes), drawing or model.drawing
        self._fingerprint = Fingerprint()
        self._fingerprints: dict[str, str] = {}
        self._files: list[str] = []
        self._stack = ExitStack()
        self.info: CheckpointInfo
        """What the checkpoint says about itself, once it is written."""

    def __enter__(self) -> "CheckpointWriter":
        """Make the folder under a temporary name."""
        self._folder = self._stack.enter_context(new_directory(self._directory, self._num_bytes))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the folder its name, or remove it after an error."""
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        with self._stack:
            missing = [part for part in self._model.parts if part not in self._fingerprints]
            if missing:
                raise AmskvError(f"{self._directory} lacks the weights of its {missing[0]}")
            self.info = CheckpointInfo(
                self._model,
                self._dtype,
                self._fingerprint.of_model(self._model),
                self._fingerprints,
                self._classes,
                self._drawing,
                tuple(self._files),
            )
            write_text(self._folder / "config.json", info_to_json(self.info))

    def add(self, part: str, leaves: Leaves) -> None:
        """Write the weights of a part.

        Args:
          part: one of the model's.
          leaves: NumPy or JAX arrays of the types that ``weights.storage_dtype`` wants.

        Raises:
          AmskvError: if they are not the model's, of another type, or cannot be written.
        """
        items = flatten_dict(leaves, sep="/").items() if isinstance(leaves, Mapping) else leaves
        folders = GroupedFolders(self._folder / "params")
        found: dict[str, tuple[int, ...]] = {}
        group: dict[str, np.ndarray] = {}
        number = 0
        for path, leaf in items:
            array = self._check(f"{part}/{path}", leaf)
            found[f"{part}/{path}"] = array.shape
            self._fingerprint.add(f"{part}/{path}", array)
            held = sum(other.nbytes for other in group.values())
            if group and held + array.nbytes > GROUP_BYTES:
                folders.write(part, number, group)
                number, group = number + 1, {}
            group[path] = array
            del leaf, array  # or the last one is held while the next is made
        check_shapes(model_shapes(self._model, [part]), found, f"what was given for the {part}")
        folders.write(part, number, group)
        self._fingerprints[part] = self._fingerprint.of_part(part)

    def add_file(self, name: str, content: bytes) -> None:
        """Write a small file which a part needs besides its weights, under a plain name."""
        (self._folder / name).write_bytes(content)
        self._files.append(name)

    def _check(self, path: str, leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        expected = {path: self._shapes[path]} if path in self._shapes else {}
        problems = describe_differences(expected, {path: array.shape})
        dtype = storage_dtype(path, self._dtype)
        if array.dtype != dtype:
            problems.append(f"cannot store {path} as {array.dtype}: expected {dtype}")
        if problems:
            raise AmskvError("\n  ".join(["these weights do not fit the model:", *problems]))
        return array
