"""Pictures for training: a packed file or a folder of class folders, decoded once into memory.

A packed file is an ``.npz`` with the arrays

- ``jpeg`` uint8 [bytes]: the encoded pictures (JPEG, PNG, WebP), one after the other,
- ``offsets`` int64 [N + 1]: picture i is ``jpeg[offsets[i] : offsets[i + 1]]``,
- ``labels`` integer [N]: its class,
- ``classes`` string [classes]: their names.

In a folder, every subfolder is a class, in the order of their names, and holds its pictures.

Grey-scale, palette and CMYK pictures are converted to RGB. A picture which is unreadable,
transparent or has more than 8 bits per channel is refused, and so is one of another size than the
model's, unless cropping is asked for.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from amskv_jax.errors import AmskvError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Files of a class folder which are pictures; others are ignored."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Decoded pictures with their classes.

    Attributes:
      pixels: uint8 [N, H, W, 3].
      labels: int32 [N].
      classes: names of the classes.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def check(self, picture_size: tuple[int, int], num_classes: int | None = None) -> None:
        """Raise AmskvError unless the pictures suit a model of that size and number of classes."""
        found = self.pixels.shape[1:3]
        if found != picture_size:
            raise AmskvError(
                f"the pictures are {_size(found)} pixels (height x width), "
                f"the model's {_size(picture_size)}: load them in the model's size"
            )
        if num_classes is not None and len(self.classes) != num_classes:
            raise AmskvError(
                f"the data has {len(self.classes)} classes, the model {num_classes}: "
                "set num_classes of the model's config, or choose other data"
            )


def load_pictures(path: Path | str, size: tuple[int, int], crop: bool = False) -> Pictures:
    """Load a packed ``.npz`` file or a folder of class folders.

    Args:
      path: the file or folder, see the module's description.
      size: (height, width) of the model's pictures.
      crop: bring pictures of other sizes to ``size``: scaled until they cover it, then cut around
        the centre. Otherwise they are refused.

    Raises:
      AmskvError: if the data is missing, incomplete or unsuitable; the message names the picture.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, size, crop)
    if path.is_file():
        return _load_packed(path, size, crop)
    raise AmskvError(f"no such file or folder: {path}")


def _load_folder(path: Path, size: tuple[int, int], crop: bool) -> Pictures:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if not folders:
        raise AmskvError(f"{path} has no subfolders: expected one per class, holding its pictures")
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        own = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        if not own:
            raise AmskvError(
                f"the class folder {folder} holds no pictures ({', '.join(SUFFIXES)}): "
                "add some or remove the folder"
            )
        files += own
        labels += [label] * len(own)
    pixels = _decode_all(files, [str(file) for file in files], size, crop)
    return Pictures(pixels, np.array(labels, np.int32), tuple(folder.name for folder in folders))


def _load_packed(path: Path, size: tuple[int, int], crop: bool) -> Pictures:
    expected = ("jpeg", "offsets", "labels", "classes")
    try:
        with np.load(path) as archive:
            missing = [name for name in expected if name not in archive]
            if missing:
                raise AmskvError(
                    f"{path} lacks {', '.join(missing)}: a packed file has {', '.join(expected)}"
                )
            packed, offsets, labels, classes = (archive[name] for name in expected)
    except (BadZipFile, EOFError, OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, AmskvError):
            raise
        raise AmskvError(f"{path} is not a readable .npz file ({error})") from error
    if len(labels) == 0:
        raise AmskvError(f"{path} holds no pictures")
    in_order = len(offsets) == len(labels) + 1 and (np.diff(offsets) > 0).all()
    if not (in_order and offsets[0] >= 0 and offsets[-1] <= len(packed)):
        raise AmskvError(
            f"{path}: expected {len(labels) + 1} growing offsets within {len(packed)} bytes"
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise AmskvError(
            f"{path}: labels run from {labels.min()} to {labels.max()}, "
            f"but there are {len(classes)} classes"
        )
    sources = [io.BytesIO(packed[start:stop].tobytes()) for start, stop in pairwise(offsets)]
    names = [f"picture {index} of {path}" for index in range(len(sources))]
    pixels = _decode_all(sources, names, size, crop)
    return Pictures(pixels, labels.astype(np.int32), tuple(str(name) for name in classes))


def _decode_all(
    sources: Sequence[Path | BinaryIO], names: Sequence[str], size: tuple[int, int], crop: bool
) -> np.ndarray:
    """Return all pictures, uint8 [N, H, W, 3]; Pillow decodes outside the interpreter's lock."""
    pixels = np.empty((len(sources), *size, 3), np.uint8)

    def decode(index: int) -> None:
        pixels[index] = _decode(sources[index], names[index], size, crop)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, range(len(sources))):
            pass  # brings up the first exception
    return pixels


def _decode(source: Path | BinaryIO, name: str, size: tuple[int, int], crop: bool) -> np.ndarray:
    try:
        with Image.open(source) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise AmskvError(f"{name} is not a readable picture ({error}): replace it") from error
    if image.has_transparency_data:
        raise AmskvError(f"{name} is transparent: flatten it onto a background")
    if image.mode not in ("RGB", "1", "L", "P", "CMYK", "YCbCr"):
        raise AmskvError(f"{name} has mode {image.mode}, expected 8 bits per channel: convert it")
    image = image.convert("RGB")
    height, width = size
    if image.size != (width, height):
        if not crop:
            raise AmskvError(
                f"{name} is {image.height}x{image.width} pixels (height x width), expected "
                f"{_size(size)}: resize it or ask for cropping"
            )
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


class Draw(NamedTuple):
    """Which pictures to take next.

    Attributes:
      rows: int64 [n], numbers of the pictures.
      chance: float64 [n] in [0, 1), a number per picture and epoch that decides how it is varied.
    """

    rows: np.ndarray
    chance: np.ndarray


def draw_pictures(size: int, seed: int, start: int, count: int) -> Draw:
    """Return draws ``start : start + count`` of an endless stream of shuffled epochs.

    The stream depends on its seed alone, so a run that is resumed goes on where it stopped.

    Args:
      size: number of pictures; every epoch holds each of them once.
      seed: of the stream.
      start: number of the first draw.
      count: number of draws.
    """
    parts = []
    while count > 0:
        epoch, position = divmod(start, size)
        generator = np.random.default_rng((seed, epoch))
        order, chance = generator.permutation(size), generator.random(size)
        taken = order[position : position + count]
        parts.append(Draw(taken, chance[taken]))
        start, count = start + len(taken), count - len(taken)
    return Draw(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def spread(total: int, count: int) -> np.ndarray:
    """Return at most ``count`` of ``total`` indices, evenly spread: sets may be sorted by class."""
    return np.arange(min(count, total)) * total // min(count, total)
