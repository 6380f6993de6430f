"""Files which are there whole or not at all, and files which grow line by line."""

import glob
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amskv_jax.errors import AmskvError, UsageError

try:
    import fcntl
except ImportError:  # Windows, which goes without locks
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder, which becomes ``path`` when all went well.

    What processes that were killed left of their attempts is removed, see ``remove_remains``.

    Raises:
      AmskvError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    remove_remains(path.parent, f".{path.stem}.", f".tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise AmskvError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines up to one that was not finished; none if missing."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def check_settings(path: Path, settings: Any) -> None:
    """Write a run's settings into its directory, or compare them with those which are there.

    Args:
      path: the JSON file.
      settings: a dataclass.

    Raises:
      UsageError: if the directory holds a run with other settings.
    """
    expected = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(expected, indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    if found != expected:
        names = (f"{name} (there {a}, now {b})" for name, a, b in _differences(found, expected))
        raise UsageError(
            f"{path.parent} holds a run with other settings: {', '.join(names)}; "
            "choose another directory or go back to those settings"
        )


def _differences(found: Any, expected: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return name, first and second value of every leaf in which two JSON objects differ."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return [] if found == expected else [(prefix, found, expected)]
    return [
        difference
        for name in sorted(found.keys() | expected.keys())
        for difference in _differences(
            found.get(name), expected.get(name), f"{prefix}.{name}" if prefix else name
        )
    ]


def check_new_directory(directory: Path) -> None:
    """Raise an AmskvError unless ``directory`` can be made: it must not exist, or be empty."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise AmskvError(f"{directory} exists: remove it, or choose another output folder")


@contextmanager
def new_directory(directory: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder which takes the name ``directory`` when all went well.

    What processes that were killed left of their attempts is removed, see ``remove_remains``.

    Args:
      directory: the folder to make, see ``check_new_directory``.
      num_bytes: what will be written, to refuse at once if the disk is too full.

    Raises:
      AmskvError: if the folder exists, or writing fails; nothing is left behind.
    """
    directory = directory.absolute()
    check_new_directory(directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    remove_remains(directory.parent, f".{directory.name}.", ".tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise AmskvError(f"cannot write {directory}: {error}") from error
    try:
        require_space(directory, num_bytes, temporary)
        yield temporary
        temporary.rename(directory)
    except AmskvError:
        raise
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as a ValueError
        raise AmskvError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was renamed


def remove_remains(folder: Path, start: str, end: str) -> None:
    """Remove what killed processes were writing, and say so on standard error.

    Temporary names hold the number of the process that writes there. On a disk which several
    machines share, only the processes of this one are seen: give each its own output.

    Args:
      folder: where to look.
      start: of the names, before the process' number.
      end: of the names, after it.
    """
    for path in folder.glob(f"{glob.escape(start)}*{glob.escape(end)}"):
        number = path.name[len(start) : -len(end)]
        if not number.isdecimal() or _is_running(int(number)):
            continue
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            print(f"cannot remove {path}, left by a process that ended: {error}", file=sys.stderr)
        else:
            print(f"removed {path}, left by a process that was killed", file=sys.stderr)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is, but another user's
        return True
    return True


def say(line: str) -> None:
    """Print a line on standard error."""
    print(line, file=sys.stderr)


def write_text(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(
    path: Path,
    own: Path | None = None,
    *,
    wait: bool = False,
    busy: str = "",
    tell: Callable[[str], object] = say,
) -> Iterator[None]:
    """Hold a lock which ends with the process, however it ends.

    Args:
      path: the file to lock; made if missing, and left there.
      own: a second file, for processes that work side by side: they share ``path``, and each has
        its own one alone.
      wait: for others to end, rather than to refuse.
      busy: message of the error if another process has it.
      tell: takes a line if the disk knows no locks.

    Raises:
      AmskvError: if another process has it, or the file cannot be made.
    """
    if fcntl is None:
        yield
        return
    with ExitStack() as stack:
        shared = fcntl.LOCK_SH if own is not None else fcntl.LOCK_EX
        for file, kind in ((path, shared), (own, fcntl.LOCK_EX)):
            if file is None:
                continue
            try:
                handle = stack.enter_context(file.open("a"))
            except OSError as error:
                raise AmskvError(f"cannot write {file}: {error}") from error
            try:
                fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AmskvError(busy) from error
            except OSError as error:  # some disks of several machines
                tell(f"cannot lock {file} ({error}): see to it that no other process writes there")
        yield


def require_space(path: Path, num_bytes: int, folder: Path) -> None:
    """Raise an AmskvError if the disk of ``folder`` has less left than ``path`` will need."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise AmskvError(
            f"cannot write {path}: it needs {num_bytes / 2**30:.2f} GiB, "
            f"the disk has {free / 2**30:.2f} GiB left"
        )
