"""How weights lie in files, and how they are read one by one.

In a checkpoint's folder every part has a folder of its own, ``params/<part>``, and in it numbered
folders, each an orbax checkpoint of some parameters. So neither who writes nor who reads ever holds
much more than the largest parameter. Version 1 had one orbax checkpoint, ``params``, of everything.
"""

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from amskv_jax.checkpoints.weights import Shape
from amskv_jax.errors import AmskvError
from amskv_jax.packed_weight import PackedWeight

GROUP_BYTES = 2**28
"""A folder of weights gets no further parameter when it holds as much."""


class Storage(Protocol):
    """Where the weights of a checkpoint lie."""

    path: Path

    def shapes(self, part: str) -> dict[str, Shape]:
        """Return the shapes of a part's parameters, without reading these.

        Raises:
          AmskvError: if they cannot be read.
        """
        ...

    def leaves(self, part: str) -> Iterator[tuple[str, np.ndarray | PackedWeight]]:
        """Yield the parameters of a part with their paths, read one after the other.

        Raises:
          AmskvError: if they cannot be read.
        """
        ...


class GroupedFolders:
    """The folder ``params`` of a checkpoint.

    Shapes are read once, which takes longer than to read small parameters.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._known: dict[Path, dict[str, Shape]] = {}

    def shapes(self, part: str) -> dict[str, Shape]:
        """See ``Storage.shapes``."""
        groups = self._groups(part)
        return {path: shape for group in groups for path, shape in self._shapes(group).items()}

    def leaves(self, part: str) -> Iterator[tuple[str, np.ndarray]]:
        """See ``Storage.leaves``."""
        for group in self._groups(part):
            yield from _restore(group, self._shapes(group))

    def write(self, part: str, number: int, leaves: Mapping[str, np.ndarray]) -> None:
        """Write some parameters of a part as its folder of that number."""
        # Weights hardly compress, and compressing them holds them in memory twice more.
        with _quiet(), ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
            folder = self.path / part / str(number)
            checkpointer.save(folder, unflatten_dict(dict(leaves), sep="/"))

    def _shapes(self, group: Path) -> dict[str, Shape]:
        if group not in self._known:
            self._known[group] = _shapes(group)
        return self._known[group]

    def _groups(self, part: str) -> list[Path]:
        folder = self.path / part
        groups = [path for path in folder.glob("*") if path.name.isdecimal()]
        if not groups:
            raise _unreadable(folder, "there are none")
        return sorted(groups, key=lambda path: int(path.name))


class SingleTree:
    """The folder ``params`` of a checkpoint of version 1."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def shapes(self, part: str) -> dict[str, Shape]:
        """See ``Storage.shapes``."""
        return _below(part, self._all_shapes)

    def leaves(self, part: str) -> Iterator[tuple[str, np.ndarray]]:
        """See ``Storage.leaves``; all parts are read at once."""
        yield from _below(part, self._tree).items()

    @cached_property
    def _all_shapes(self) -> dict[str, Shape]:
        return _shapes(self.path)

    @cached_property
    def _tree(self) -> dict[str, np.ndarray]:
        return dict(_restore(self.path, self._all_shapes))


def _restore(path: Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the parameters in an orbax checkpoint, which are read at once, as NumPy arrays."""
    arguments = unflatten_dict(
        {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}, sep="/"
    )
    with _reading(path), _checkpointer() as checkpointer:
        restored = checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=arguments))
    leaves = flatten_dict(restored, sep="/")
    del restored
    while leaves:  # so that whoever takes them decides how long they are held
        yield leaves.popitem()


def _shapes(path: Path) -> dict[str, Shape]:
    with _reading(path), _checkpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        tree = None if metadata is None else metadata.tree
    if tree is None:
        raise _unreadable(path, "the list of parameters is missing or damaged")
    return {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()}


def _checkpointer() -> ocp.Checkpointer:
    """Return what reads in this process, and does not wait for others that work beside it."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=alone)


def _below(part: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{part}/"
    return {name[len(start) :]: leaf for name, leaf in flat.items() if name.startswith(start)}


def _unreadable(path: Path, reason: str) -> AmskvError:
    return AmskvError(
        f"the weights in {path} cannot be read: {reason}. Convert or copy the checkpoint again"
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        raise _unreadable(path, str(error).partition("\n")[0] or repr(error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax's threads from printing hundreds of lines beside the error that it raises."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    disabled, logger.disabled = logger.disabled, True
    sys.unraisablehook = without_closed_loops
    try:
        yield
        sys.unraisablehook = hook  # after an error it stays: stragglers complain later
    finally:
        logger.disabled = disabled
