"""Files of studies and evaluations: results as JSON lines, pictures as .npz, never in part."""

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amskv_jax.errors import AmskvError
from amskv_jax.files import read_json_lines, replacing

CELLS_FILE = "cells.json"
"""What a study was asked for, in its folder."""

Record = dict[str, Any]
"""What is known of one cell: its name, its settings and its figures."""


class Results:
    """The JSON lines of a study, one per finished cell.

    Attributes:
      path: the file.
      records: name of the cell -> its record, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; a last line which was not finished is dropped, there and here."""
        self.path = path
        self.records = {record["name"]: record for record in read_json_lines(path)}
        if path.exists():
            lines = (json.dumps(record) + "\n" for record in self.records.values())
            with replacing(path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")

    def add(self, record: Record) -> None:
        """Append a record and wait until it is on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["name"]] = record


def read_cells(directory: Path) -> list[str]:
    """Return the names of all cells which a study was asked for, in their order.

    Raises:
      AmskvError: if the file is damaged.
    """
    path = directory / CELLS_FILE
    if not path.exists():
        return []
    try:
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]
    except ValueError as error:
        raise AmskvError(f"{path} is damaged ({error}): remove it") from error


def add_cells(directory: Path, names: Iterable[str]) -> None:
    """Note that a study was asked for these cells too."""
    every = list(dict.fromkeys([*read_cells(directory), *names]))
    with replacing(directory / CELLS_FILE) as temporary:
        temporary.write_text(json.dumps(every, indent=0) + "\n", encoding="utf-8")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a .npz file under a temporary name, then rename it.

    Raises:
      AmskvError: if it cannot be written.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a .npz file; empty if there is none.

    Raises:
      AmskvError: if it is damaged.
    """
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise AmskvError(f"{path} is damaged ({error}): remove it") from error
