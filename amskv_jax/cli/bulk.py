"""``amskv sample --num 50000 --shards DIR``: many pictures, in files that other programs read."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amskv_jax.cli.console import Update, make_console, print_line, progress
from amskv_jax.cli.hosts import first_alone
from amskv_jax.cli.memory import explaining_memory
from amskv_jax.cli.options import parse_numbers
from amskv_jax.cli.wanted import with_weights
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.models.guidance import Drawing

if TYPE_CHECKING:
    import numpy as np

    from amskv_jax.bulk.shards import Progress
    from amskv_jax.drawing import Batch, Drawer
    from amskv_jax.generate import Sampler
    from amskv_jax.models.protocol import Conditions
    from amskv_jax.pipeline import Pipeline
    from amskv_jax.plan.retention import RetentionPlan

BATCH = 64
"""Pictures drawn at once unless more or fewer are asked for."""
SHARD_PICTURES, SHARD_BYTES = 1000, 2**28
"""A shard has so many pictures unless that makes more bytes: some are held while drawing."""
QUIET_SECONDS = 60
"""Between two lines of progress where no one watches a bar."""


class PictureFormat(StrEnum):
    """How pictures are kept."""

    NPZ = "npz"
    PNG = "png"


NumOption = Annotated[
    int | None,
    typer.Option("--num", min=1, help="Pictures to draw into the folder --shards."),
]
ShardsOption = Annotated[
    Path | None,
    typer.Option(
        "--shards",
        help="Folder for --num pictures, in place of a sheet; one there already goes on where it "
        "was stopped. Picture n shows the n-th of what is asked for, over and over.",
    ),
]
PictureFormatOption = Annotated[
    PictureFormat,
    typer.Option(
        "--format",
        help="npz: pictures.npz (arr_0, arr_1), as OpenAI's evaluator reads it; png: 000000.png, "
        "..., and labels.npz.",
    ),
]
ShardSizeOption = Annotated[
    int | None,
    typer.Option(
        "--shard-size",
        min=1,
        help="Pictures per file while drawing: what is lost if it is stopped; 1000, or fewer large "
        "ones, if not given.",
    ),
]
ShardTokensOption = Annotated[
    bool, typer.Option("--with-tokens", help="Keep the tokens too, in the .npz file of --shards.")
]
ShareOption = Annotated[
    str | None,
    typer.Option(
        "--share",
        help="Of processes or hosts that draw into one folder --shards, or into one each: which "
        "this is, from 0, and how many there are.",
        metavar="INDEX/COUNT",
    ),
]


@dataclass(frozen=True)
class Bulk:
    """What the options ask for; see there."""

    folder: Path
    num: int
    format: PictureFormat
    shard: int | None
    tokens: bool
    share: tuple[int, int] | None
    distributed: bool

    @property
    def speaks(self) -> bool:
        """Whether this process prints what all would: one of those that belong together does."""
        return not (self.distributed and self.share and self.share[0])


@dataclass(frozen=True)
class Settings:
    """All that decides how the pictures of a folder look, and how they lie there."""

    num: int
    seed: int
    shard: int
    format: str
    tokens: bool
    wanted: Mapping[str, Any]
    model: str
    scales: tuple[tuple[int, int], ...]
    drawing: Drawing
    dtype: str
    weights: str
    cache_dtype: str
    cache: str
    plan: str


def read_bulk(
    num: int | None,
    shards: Path | None,
    picture_format: PictureFormat,
    shard: int | None,
    tokens: bool,
    share: str | None,
    distributed: bool,
    unfit: Mapping[str, Any],
) -> Bulk | None:
    """Return what is to be drawn in bulk; None if nothing is.

    Args:
      num: of the option.
      shards: of the option.
      picture_format: of the option.
      shard: of the option.
      tokens: of the option.
      share: of the option.
      distributed: of the option.
      unfit: values of options which have no meaning then.

    Raises:
      UsageError: if options do not fit together.
    """
    if shards is None and num is None:
        if shard is not None or tokens or share or picture_format is not PictureFormat.NPZ:
            names = "--format, --shard-size, --with-tokens and --share"
            raise UsageError(f"{names} need --num and --shards")
        if distributed:
            raise UsageError("--distributed needs --num and --shards")
        return None
    if shards is None or num is None:
        raise UsageError("--num and --shards belong together: give both, or neither")
    given = [name for name, value in unfit.items() if value]
    if given:
        hint = ": --with-tokens keeps tokens" if "--save-tokens" in given else ""
        raise UsageError(f"{given[0]} has no meaning with --shards{hint}; leave it out")
    if shards.exists() and not shards.is_dir():
        raise AmskvError(f"{shards} is no folder")
    process = None if share is None else _read_share(share)
    return Bulk(shards, num, picture_format, shard, tokens, process, distributed)


def _read_share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--share {text!r}: expected which of how many from 0, such as 0/2 or 1/2")
    return int(index), int(count)


def describe_wanted(
    labels: str | None, texts: Mapping[str, Any], files: Mapping[str, Path | None]
) -> dict[str, Any]:
    """Return what is asked for, to compare it with what a folder was asked for.

    Args:
      labels: of the option.
      texts: values of options that are taken as they are.
      files: of options that name files, which may change.
    """
    numbers = None if labels is None else parse_numbers(labels, "--labels")
    digests = {
        name: path and hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for name, path in files.items()
    }
    return {"labels": numbers, **texts, **digests}


def draw_bulk(
    bulk: Bulk,
    pipe: "Pipeline",
    weights: Path,
    conditions: "Conditions",
    plan: "RetentionPlan",
    sampler: "Sampler",
    *,
    wanted: Mapping[str, Any],
    forced: "np.ndarray | None",
    seed: int,
    batch: int | None,
) -> None:
    """Draw what is missing in a folder of many pictures.

    Args:
      bulk: what is to be drawn.
      pipe: without weights.
      weights: the checkpoint, loaded if anything is missing.
      conditions: what to draw, over and over.
      plan: what the cache keeps.
      sampler: what draws so.
      wanted: what the conditions were made of, see ``describe_wanted``.
      forced: codes of the first scales, of some pictures; later ones have the same, over and over.
      seed: of the random numbers.
      batch: pictures drawn at once.

    Raises:
      AmskvError: see ``bulk.shards.draw_shards``.
    """
    import numpy as np  # noqa: PLC0415

    from amskv_jax.bulk.files import ShardFiles  # noqa: PLC0415
    from amskv_jax.bulk.shards import draw_shards, make_folder, settle  # noqa: PLC0415

    size = pipe.model.picture_size(pipe.schedule)
    shard = bulk.shard or min(SHARD_PICTURES, max(1, SHARD_BYTES // (3 * size[0] * size[1])))
    png = bulk.format is PictureFormat.PNG
    path = bulk.folder / ("labels.npz" if png else "pictures.npz")
    labels = conditions.classes(np.arange(1)) is not None
    files = ShardFiles(path, bulk.num, size, shard, labels=labels, tokens=bulk.tokens, png=png)
    settings = Settings(
        num=bulk.num,
        seed=seed,
        shard=shard,
        format=bulk.format.value,
        tokens=bulk.tokens,
        wanted=wanted,
        model=pipe.fingerprint,
        scales=pipe.schedule.grids,
        drawing=pipe.drawing,
        dtype=pipe.dtype,
        weights="in 8 bits" if pipe.low_memory and weights.is_dir() else "as stored",
        cache_dtype=pipe.cache_dtype or pipe.activation_dtype,
        cache=plan.note,
        plan=hashlib.sha256(plan.to_json().encode()).hexdigest()[:16],
    )
    count = min(batch or BATCH, bulk.num)
    count = pipe.mesh.filled(count) if pipe.mesh else count
    controls, process = pipe.controls(forced=forced), bulk.share or (0, 1)

    @cache
    def ready() -> "tuple[Drawer, Pipeline]":
        loaded = with_weights(pipe, weights)
        drawer = loaded.drawer(sampler, conditions, count, forced=forced)
        if bulk.speaks:
            print_line(f"compiled in {drawer.compile_seconds:.1f} s")
        return drawer, loaded

    def draw(first: int, wanted: int) -> "Iterator[Batch]":
        drawer, loaded = ready()
        return drawer.batches(loaded.params, seed, first, wanted, controls)

    showing = progress("looking at what is there") if bulk.speaks else nullcontext(_show_nothing)
    with explaining_memory(count), showing as update:
        if bulk.distributed:
            make_folder(files)
            first_alone("settings", lambda: settle(files, settings))
        shown = _Shown(update, process[1])
        whole = draw_shards(
            files,
            draw,
            batch=count,
            classes=conditions.classes,
            settings=settings,
            process=process,
            update=shown if bulk.speaks else lambda progress: None,
            tell=print_line,
        )
    if bulk.speaks:
        print_line(shown.summary())
    if whole:
        print_line(f"wrote {path}" + (" and the pictures beside it" if png else ""))
    elif bulk.speaks:
        print_line(
            f"share {process[0]}/{process[1]} is drawn; the last process to end writes {path}. If "
            "the others have folders of their own, put all into one, and give this command there, "
            "without --share"
        )


def _show_nothing(what: str, share: float | None) -> None:
    """Take progress where another process shows it."""


class _Shown:
    """Shows progress: a bar where someone watches, else a line now and then."""

    def __init__(self, update: Update, processes: int) -> None:
        self.update = update
        self.whose = " of this share" if processes > 1 else ""
        self.watched = make_console().is_terminal
        self.first: int | None = None
        self.printed = self.started = time.monotonic()
        self.last: Progress | None = None

    def __call__(self, now: "Progress") -> None:
        """Show how far drawing is."""
        self.last = now
        if self.first is None:
            self.first, self.started = now.done, time.monotonic()
            if 0 < now.done < now.total:
                print_line(f"{now.done} of {now.total} pictures{self.whose} are there, going on")
            self.update("compiling", None)
            return
        text = f"{now.done} of {now.total} pictures{self.whose}"
        if now.rate and now.seconds_left is not None:
            text += f", {now.rate:.1f} per second, {clock(now.seconds_left)} left"
        self.update(text, now.done / now.total)
        if not self.watched and time.monotonic() - self.printed >= QUIET_SECONDS:
            print_line(text)
            self.printed = time.monotonic()

    def summary(self) -> str:
        """Return what has been done."""
        if self.last is None or self.last.done == self.first:
            return "all pictures were there"
        drawn = self.last.done - (self.first or 0)
        text = f"{drawn} picture{'s'[: drawn > 1]} in {clock(time.monotonic() - self.started)}"
        rate = f", {self.last.rate:.2f} per second" if self.last.rate else ""
        return f"{text} with compiling{rate}"


def clock(seconds: float) -> str:
    """Return a time as people write it, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
