"""Drawing many pictures into a folder: in shards, killed at any moment, going on where it was.

Beside each other lie NAME.shard-00000.npz, ..., and in the end NAME.npz in their place, in the
layout that OpenAI's ADM evaluator reads: ``arr_0`` uint8 [N, H, W, 3], and ``arr_1``, the labels;
``tokens`` too if they are wanted. Pictures may be PNG files instead, 000000.png, ...: the .npz
files then hold the rest. Everything is written under a temporary name and renamed.

Batches begin at multiples of their size, whatever is there already: a picture has the same
neighbours in every run, and so the same bytes.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amskv_jax.bulk.files import ShardFiles
from amskv_jax.errors import AmskvError
from amskv_jax.files import check_settings, locked, require_space, say

if TYPE_CHECKING:
    from amskv_jax.drawing import Batch

UNWRITTEN = 2
"""Shards that may wait for the writer while drawing goes on."""

Draw = Callable[[int, int], "Iterable[Batch]"]
"""Takes the number of the first picture and how many; yields them, see ``Drawer.batches``."""


@dataclass(frozen=True)
class Progress:
    """How far drawing is.

    Attributes:
      done: pictures that are drawn, those of earlier runs too.
      total: pictures in all of the process' share.
      rate: pictures per second, without compiling; None at first.
    """

    done: int
    total: int
    rate: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Time until all are drawn."""
        return (self.total - self.done) / self.rate if self.rate else None


def draw_shards(
    files: ShardFiles,
    draw: Draw,
    *,
    batch: int,
    classes: Callable[[np.ndarray], np.ndarray | None],
    settings: Any = None,
    process: tuple[int, int] = (0, 1),
    update: Callable[[Progress], object] = lambda progress: None,
    tell: Callable[[str], object] = say,
) -> bool:
    """Draw the pictures that are missing, while those before them are written.

    Args:
      files: where they go.
      draw: draws; not called if nothing is missing, so that compiling can wait until then.
      batch: pictures drawn at once.
      classes: of the pictures with these numbers, see ``protocol.Conditions.classes``.
      settings: a dataclass of all that decides how pictures look; a folder of others is refused.
        None if the caller has seen to that.
      process: index and number of the processes that share the work; each draws its shards.
      update: shown the progress after every batch.
      tell: takes a line on what is out of the ordinary.

    Returns:
      Whether everything is there; False if other processes have not finished.

    Raises:
      UsageError: if the folder holds pictures of other settings.
      AmskvError: if another process draws into it, it holds files that are in the way, or the disk
        is full; what was written stays.
    """
    make_folder(files)
    with _claimed(files, process, tell):
        if settings is not None:
            settle(files, settings)
        files.refuse_strangers()
        own = _share(files.count, *process)
        files.remove_remains(own)
        missing = files.missing(own, tell)
        _require_space(files, missing)
        _draw_missing(files, draw, batch, classes, own, missing, update)
        return _finish(files)


def _draw_missing(
    files: ShardFiles,
    draw: Draw,
    batch: int,
    classes: Callable[[np.ndarray], np.ndarray | None],
    own: range,
    missing: list[int],
    update: Callable[[Progress], object],
) -> None:
    total = sum(len(files.numbers(index)) for index in own)
    absent = sum(len(files.numbers(index)) for index in missing)
    done, started, counted = total - absent, 0.0, 0
    update(Progress(done, total))
    with _Writer(files) as writer:
        for first, stop in _runs(missing):
            begin, end = files.numbers(first).start, files.numbers(stop - 1).stop
            aligned = begin - begin % batch
            parts = _Parts(files, first)
            for drawn in draw(aligned, end - aligned):
                skip = max(0, begin - drawn.first)
                arrays = {"arr_0": drawn.pictures()[skip:]}
                if files.tokens:
                    arrays["tokens"] = files.compact_tokens(drawn.tokens()[skip:])
                for index, shard in parts.add(arrays):
                    labels = classes(np.array(files.numbers(index)))
                    writer.put(index, shard if labels is None else {**shard, "arr_1": labels})
                done += len(arrays["arr_0"])
                rate = (done - counted) / (time.monotonic() - started) if started else None
                if not started:  # the first batch came with compiling
                    started, counted = time.monotonic(), done
                update(Progress(done, total, rate))


class _Parts:
    """Puts shards together of pictures that come one after the other."""

    def __init__(self, files: ShardFiles, first: int) -> None:
        self.files, self.index = files, first
        self.parts: list[dict[str, np.ndarray]] = []
        self.held = 0

    def add(self, arrays: dict[str, np.ndarray]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Take the next pictures; yield the shards that they complete."""
        start, count = 0, len(arrays["arr_0"])
        while start < count:
            wanted = len(self.files.numbers(self.index)) - self.held
            stop = min(count, start + wanted)
            self.parts.append({name: array[start:stop] for name, array in arrays.items()})
            self.held, start = self.held + stop - start, stop
            if self.held == len(self.files.numbers(self.index)):
                names = self.parts[0]
                yield (
                    self.index,
                    {name: np.concatenate([part[name] for part in self.parts]) for name in names},
                )
                self.index, self.parts, self.held = self.index + 1, [], 0


class _Writer:
    """A thread that writes shards; its errors come up at the next shard, or at the end."""

    def __init__(self, files: ShardFiles) -> None:
        self.files, self.waiting = files, deque[Future[None]]()
        self.pool = ThreadPoolExecutor(1, "amskv-writer")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.pool.shutdown(wait=True)  # what is drawn is written, also if drawing was stopped
        if kind is None:
            for future in self.waiting:
                future.result()

    def put(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Write a shard when those before are written; wait if there are too many of them."""
        if len(self.waiting) >= UNWRITTEN:
            self.waiting.popleft().result()
        for future in self.waiting:
            if future.done():
                future.result()
        self.waiting.append(self.pool.submit(self.files.write, index, arrays))


def _claimed(files: ShardFiles, process: tuple[int, int], tell: Callable[[str], object]) -> Any:
    """Return the lock of a process: one alone, or one for each index of several."""
    index, count = process
    return locked(
        files.beside("lock"),
        None if count == 1 else files.beside(f"{index}.lock"),
        busy=f"another process draws into {files.folder}: wait until it has ended, or choose "
        "another folder",
        tell=tell,
    )


def make_folder(files: ShardFiles) -> None:
    """Make the folder if there is none; raise an AmskvError if it cannot be made."""
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AmskvError(f"cannot make the folder {files.folder}: {error}") from error


def settle(files: ShardFiles, settings: Any) -> None:
    """Write the settings, or compare them with those there, one process after the other.

    Args:
      files: whose folder is there.
      settings: see ``draw_shards``.

    Raises:
      UsageError: if the folder holds pictures of other settings.
      AmskvError: if it holds pictures without settings.
    """
    path = files.folder / "settings.json"
    with locked(files.beside("settings.lock"), wait=True):
        if not path.exists():
            files.refuse_existing()
        check_settings(path, settings)


def _share(count: int, index: int, processes: int) -> range:
    """Return the shards which a process draws: neighbours, which share batches."""
    return range(count * index // processes, count * (index + 1) // processes)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield first and end of numbers that follow each other."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[start], numbers[place - 1] + 1
            start = place


def _require_space(files: ShardFiles, missing: list[int]) -> None:
    """Refuse at once what cannot end well: shards, and beside them the file of all."""
    if files.png or not missing:  # how well pictures can be compressed is not known
        return
    pictures = sum(len(files.numbers(index)) for index in missing) + files.num
    require_space(files.folder, pictures * files.picture_bytes, files.folder)


def _finish(files: ShardFiles) -> bool:
    """Make the file of all when all shards are there; return whether it is there."""
    with locked(files.beside("merge.lock"), wait=True):
        if not files.path.exists() and not files.merge():
            return False
        files.remove_shards()
    return True
