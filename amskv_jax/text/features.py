"""Text features, and the files they are kept in between encoding and drawing."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amskv_jax.errors import AmskvError
from amskv_jax.files import replacing
from amskv_jax.models.infinity.prompts import TextFeatures
from amskv_jax.text.prompts import MAX_TOKENS

_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    MemoryError,  # a damaged header can ask for anything
    NotImplementedError,  # a way of compressing that Python does not know
    zipfile.BadZipFile,
    zlib.error,
)


def write_features(path: str | os.PathLike[str], text: TextFeatures) -> None:
    """Write text features as a .npz file, whole or not at all.

    Raises:
      AmskvError: if the arrays do not fit together, or the file cannot be written.
    """
    optional = {name: getattr(text, name) for name in ("negative_features", "negative_lengths")}
    arrays: dict[str, Any] = {"features": text.features, "lengths": text.lengths}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    if text.texts:
        arrays["prompts"] = np.array(text.texts, np.str_)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    _check(arrays, f"cannot write {path}")
    if text.encoder:
        arrays["encoder"] = np.array(text.encoder)
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_features(
    path: str | os.PathLike[str], encoder: str | None = None, channels: int | None = None
) -> TextFeatures:
    """Read text features from a file.

    Args:
      path: a .npz file with ``features`` [sum of lengths, C] float32 and ``lengths`` [B], and
        perhaps ``negative_features`` and ``negative_lengths`` [B] or [1], ``encoder`` (a text)
        and ``prompts`` [B] (texts); other arrays are ignored.
      encoder: fingerprint of the text encoder whose features are wanted. A file which names
        none is taken: those written by hand do not know it.
      channels: C that is wanted.

    Raises:
      AmskvError: if the file is damaged or is none, its arrays do not fit together, or they are
        of another encoder or width.
    """
    try:
        if Path(path).is_file() and not zipfile.is_zipfile(path):
            raise AmskvError(f"{path} holds no text features: it is no .npz file")
        with np.load(path, allow_pickle=False) as content:
            stored = {name: content[name] for name in _NAMES if name in content.files}
            others = ", ".join(content.files[:5]) or "nothing"
    except AmskvError:
        raise
    except _UNREADABLE as error:
        raise AmskvError(f"cannot read the text features {path}: {error}") from error
    missing = [name for name in ("features", "lengths") if name not in stored]
    if missing:
        raise AmskvError(
            f"{path} holds no text features: it has {others}, expected features and lengths, as "
            "`amskv encode` writes them"
        )
    _check(stored, str(path))
    found = str(stored["encoder"]) if "encoder" in stored else ""
    if encoder is not None and found and found != encoder:
        raise AmskvError(
            f"{path} holds features of another text encoder (fingerprint {found}, expected "
            f"{encoder}): encode the prompts with the one that belongs to this model"
        )
    width = stored["features"].shape[1]
    if channels is not None and width != channels:
        raise AmskvError(
            f"{path} holds text features of {width} channels, the model takes {channels}: encode "
            "the prompts with its text encoder"
        )
    return TextFeatures(
        stored["features"],
        stored["lengths"],
        stored.get("negative_features"),
        stored.get("negative_lengths"),
        tuple(map(str, stored.get("prompts", ()))),
        found,
    )


_NAMES = ("features", "lengths", "negative_features", "negative_lengths", "encoder", "prompts")


def _check(arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Raise an AmskvError, which names the source, unless the arrays fit together."""
    _check_pair(arrays, "features", "lengths", source)
    count, width = len(arrays["lengths"]), arrays["features"].shape[1]
    halves = {"negative_features", "negative_lengths"} & arrays.keys()
    if len(halves) == 1:
        raise AmskvError(
            f"{source}: it has {halves.pop()} alone, expected both negative_features and "
            "negative_lengths, or neither"
        )
    if halves:
        _check_pair(arrays, "negative_features", "negative_lengths", source)
        others, channels = len(arrays["negative_lengths"]), arrays["negative_features"].shape[1]
        if others not in (1, count) or channels != width:
            raise AmskvError(
                f"{source}: negative_features has {others} texts of {channels} channels, "
                f"expected one or {count}, of {width} channels as features has"
            )
    prompts = arrays.get("prompts")
    if prompts is not None and (prompts.dtype.kind != "U" or prompts.shape != (count,)):
        raise AmskvError(
            f"{source}: prompts is {prompts.dtype} {prompts.shape}, expected {count} texts"
        )


def _check_pair(arrays: Mapping[str, np.ndarray], name: str, by: str, source: str) -> None:
    features, lengths = arrays[name], arrays[by]
    if features.dtype != np.float32 or features.ndim != 2 or 0 in features.shape:
        raise AmskvError(
            f"{source}: {name} is {features.dtype} {features.shape}, expected float32 (sum of "
            "lengths, channels)"
        )
    if lengths.dtype.kind not in "iu" or lengths.ndim != 1:
        raise AmskvError(
            f"{source}: {by} is {lengths.dtype} {lengths.shape}, expected whole numbers, one for "
            "each prompt"
        )
    wrong = np.flatnonzero((lengths < 1) | (lengths > MAX_TOKENS))
    if len(wrong):
        raise AmskvError(
            f"{source}: {by}[{wrong[0]}] is {lengths[wrong[0]]}, expected 1 to {MAX_TOKENS} tokens"
        )
    total = int(lengths.astype(np.int64).sum())
    if total != len(features):
        raise AmskvError(f"{source}: {by} add up to {total}, but {name} has {len(features)} rows")
    rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(rows):
        prompt = int(np.searchsorted(np.cumsum(lengths), rows[0], side="right"))
        raise AmskvError(f"{source}: {name} has numbers that are not finite, in prompt {prompt}")
