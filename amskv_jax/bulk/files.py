"""Files of shards of pictures: their names, what is in them, and whether they are whole."""

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from amskv_jax.errors import AmskvError

_DAMAGED = (
    ValueError,
    TypeError,
    EOFError,
    KeyError,
    SyntaxError,  # Pillow's on a broken PNG, and NumPy's on a broken header
    NotImplementedError,
    RuntimeError,  # zipfile's on what is encrypted
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_ENCODERS = min(8, os.cpu_count() or 1)
"""Threads that compress PNG files."""


@dataclass(frozen=True)
class ShardFiles:
    """Where the pictures of one run lie, and how.

    Attributes:
      path: the .npz file that is there in the end; shards lie beside it.
      num: pictures.
      size: height and width of a picture.
      shard: pictures per shard.
      labels: whether the pictures have classes.
      tokens: whether tokens are kept.
      png: whether pictures are PNG files.
    """

    path: Path
    num: int
    size: tuple[int, int]
    shard: int = 1000
    labels: bool = True
    tokens: bool = False
    png: bool = False

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return self.path.parent

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.num // self.shard)

    @property
    def picture_bytes(self) -> int:
        """Bytes of a picture which is not compressed."""
        return 3 * self.size[0] * self.size[1]

    @property
    def names(self) -> list[str]:
        """Names of the arrays in a .npz file."""
        kept = {"numbers": self.png, "arr_0": not self.png, "arr_1": self.labels}
        return [name for name, there in {**kept, "tokens": self.tokens}.items() if there]

    def numbers(self, index: int) -> range:
        """Return the numbers of the pictures of a shard."""
        return range(index * self.shard, min(self.num, (index + 1) * self.shard))

    def shard_path(self, index: int) -> Path:
        """Return the file of a shard."""
        return self.path.with_name(f"{self.path.stem}.shard-{index:05d}.npz")

    def picture_path(self, number: int) -> Path:
        """Return the PNG file of a picture."""
        return self.folder / f"{number:06d}.png"

    def beside(self, name: str) -> Path:
        """Return a hidden file that belongs to this run."""
        return self.path.with_name(f".{self.path.stem}.{name}")

    @staticmethod
    def compact_tokens(tokens: np.ndarray) -> np.ndarray:
        """Return tokens as they are kept: bits, [B, total, bits], in a byte each."""
        return tokens.astype(np.uint8) if tokens.ndim > 2 else tokens

    # What is there

    def missing(self, own: Iterable[int], tell: Callable[[str], object]) -> list[int]:
        """Return the shards of ``own`` which are not there whole.

        Args:
          own: the shards to look at.
          tell: takes a line for each that is damaged.

        Raises:
          AmskvError: if a file cannot be read, or that of all pictures is damaged.
        """
        whole = self.whole()
        return [index for index in own if not self._is_there(index, whole, tell)]

    def whole(self) -> bool:
        """Return whether the file of all pictures is there.

        Raises:
          AmskvError: if it is damaged; it is not for us to remove it.
        """
        damage = _look(self.path, self._npz_damage, self.num)
        if damage:
            raise AmskvError(f"{self.path} is damaged ({damage}): remove it to draw it again")
        return damage is not None

    def _is_there(self, index: int, whole: bool, tell: Callable[[str], object]) -> bool:
        checks: list[tuple[Path, Callable[[Path, int], str], int]] = []
        if not whole:
            checks.append((self.shard_path(index), self._npz_damage, len(self.numbers(index))))
        if self.png:  # looked at only if their shard is there, as that is written after them
            checks += [(self.picture_path(n), self._png_damage, 1) for n in self.numbers(index)]
        for path, check, count in checks:
            damage = _look(path, check, count)
            if damage:
                tell(f"{path} is damaged ({damage}): drawing it again")
            if damage != "":
                return False
        return True

    def _npz_damage(self, path: Path, count: int) -> str:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
            if wrong:
                return f"the checksum of {wrong} differs"
            if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in self.names):
                return f"it holds {', '.join(archive.namelist())}"
            for name in self.names:
                with archive.open(f"{name}.npy") as member:
                    shape, _ = _read_header(member)
                expected = (count, *self.size, 3) if name == "arr_0" else (count, *shape[1:])
                if shape != expected:
                    return f"{name} is {list(shape)}, expected {list(expected)}"
        return ""

    def _png_damage(self, path: Path, _: int) -> str:
        with Image.open(path) as picture:
            height, width = self.size
            if (picture.format, picture.mode, picture.size) != ("PNG", "RGB", (width, height)):
                return f"it is {picture.format}, {picture.mode}, {picture.size}"
            picture.verify()
        return ""

    def _listed(self) -> list[str]:
        with os.scandir(self.folder) as entries:
            return [entry.name for entry in entries]

    def _is_ours(self, name: str) -> bool:
        """Return whether a file has a name which this class gives."""
        shard = re.fullmatch(re.escape(self.path.stem) + r"\.shard-(\d{5,})\.npz", name)
        if shard:
            index = int(shard[1])
            return index < self.count and name == self.shard_path(index).name
        if self.png and re.fullmatch(r"\d{6,}\.png", name):
            number = int(name[:-4])
            return number < self.num and name == self.picture_path(number).name
        return name == self.path.name

    def refuse_strangers(self) -> None:
        """Raise an AmskvError if there are files which would be taken for pictures of this run."""
        start = f"{self.path.stem}.shard-"
        strange = sorted(
            name
            for name in self._listed()
            if not self._is_ours(name)
            and (
                (name.startswith(start) and name.endswith(".npz"))
                or (self.png and name.lower().endswith(".png") and not name.startswith("."))
            )
        )
        if strange:
            raise AmskvError(
                f"{self.folder} holds {_some(strange)}, not of these {self.num} pictures: "
                "move such files elsewhere"
            )

    def refuse_existing(self) -> None:
        """Raise an AmskvError if there are files of names that will be written."""
        existing = sorted(filter(self._is_ours, self._listed()))
        if existing:
            raise AmskvError(
                f"{self.folder} holds {_some(existing)}, but no settings.json that says how they "
                "were drawn: choose another folder, or move them elsewhere"
            )

    def remove_remains(self, own: range) -> None:
        """Remove unfinished files of killed processes, which drew these shards."""
        for name in self._listed():
            if not (name.startswith(".") and name.endswith(".tmp") and self._is_ours(name[1:-4])):
                continue
            number = re.search(r"(\d+)\.(?:npz|png)\.tmp$", name)
            index = int(number[1]) if number else -1
            if number and name.endswith(".png.tmp"):
                index //= self.shard
            if index in own:
                (self.folder / name).unlink(missing_ok=True)

    # Writing

    def write(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a shard.

        Args:
          index: which.
          arrays: "arr_0" uint8 [n, H, W, 3], and "arr_1" and "tokens" as there are.

        Raises:
          AmskvError: if it cannot be written; nothing of it is there then, or the old file.
        """
        numbers = self.numbers(index)
        if self.png:
            with ThreadPoolExecutor(_ENCODERS) as pool:
                list(pool.map(self._write_png, numbers, arrays["arr_0"]))
        kept = {**arrays, "numbers": np.array(numbers)}
        with _writing(self.shard_path(index)) as file:
            np.savez(file, **{name: kept[name] for name in self.names})  # type: ignore[arg-type]

    def _write_png(self, number: int, pixels: np.ndarray) -> None:
        with _writing(self.picture_path(number)) as file:
            # A third of the usual level's time, and a few per cent more bytes.
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)

    def merge(self) -> bool:
        """Write the file of all pictures, a shard at a time; return False if shards are missing.

        Raises:
          AmskvError: if a shard is damaged, or the file cannot be written; all shards are left.
        """
        shards = [self.shard_path(index) for index in range(self.count)]
        if not all(path.exists() for path in shards):
            return False
        with _writing(self.path) as file, zipfile.ZipFile(file, "w") as archive:
            for name in self.names:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    for path in shards:
                        array = _read_array(path, name)
                        if path == shards[0]:
                            _write_header(member, (self.num, *array.shape[1:]), array.dtype)
                        member.write(np.ascontiguousarray(array).data)
        return True

    def remove_shards(self) -> None:
        """Remove the shards, all of which are in the file of all pictures."""
        for index in range(self.count):
            self.shard_path(index).unlink(missing_ok=True)


def _look(path: Path, check: Callable[[Path, int], str], count: int) -> str | None:
    """Return what is wrong with a file: nothing if it is whole, None if there is none."""
    if path.is_dir():
        raise AmskvError(f"{path} is in the way: it is a folder; move it elsewhere")
    try:
        return check(path, count)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise AmskvError(f"cannot read {path}: {error}") from error
    except (OSError, *_DAMAGED) as error:  # Pillow says by an OSError that a file is cut off
        return str(error) or type(error).__name__


@contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file which becomes ``path`` when all went well.

    The name is always the same: only one process at a time writes a shard.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise AmskvError(
            f"cannot write {path}: {error}; what was drawn before is kept: make room, and give the "
            "same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array in a .npy file."""
    version = np.lib.format.read_magic(member)
    if version != (1, 0):
        raise ValueError(f"a header of version {version}, expected (1, 0)")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
    if fortran_order:
        raise ValueError("the array is in Fortran order")
    return shape, dtype


def _write_header(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"shape": shape, "fortran_order": False, "descr": descr}
    np.lib.format.write_array_header_1_0(member, header)


def _read_array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as content:
            array: np.ndarray = content[name]
            return array
    except _DAMAGED as error:
        raise AmskvError(
            f"{path} is damaged ({error}): give the same command again to draw it again"
        ) from error


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
