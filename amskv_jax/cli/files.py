"""Output files of commands: nothing is overwritten unasked."""

from pathlib import Path

from amskv_jax.errors import AmskvError, UsageError


def check_outputs(*paths: Path | None, force: bool) -> None:
    """Check before any work is done that files can be written.

    Args:
      paths: the files; None stands for one that is not wanted.
      force: whether existing files may be replaced.

    Raises:
      AmskvError: if a file exists, or its folder does not.
    """
    for path in filter(None, paths):
        if path.is_dir():
            raise AmskvError(f"{path} is a folder, expected a file name")
        if path.exists() and not force:
            raise AmskvError(f"{path} exists: choose another name, or replace it with --force")
        if not path.parent.is_dir():
            raise AmskvError(f"the folder {path.parent} does not exist: make it first")


def check_suffix(path: Path | None, known: set[str]) -> None:
    """Raise a UsageError if a file's name does not end in one of the ``known`` suffixes."""
    if path and path.suffix.lower() not in known:
        raise UsageError(f"{path} is of an unknown type: expected {', '.join(sorted(known))}")


def free_name(path: Path) -> Path:
    """Return ``path``, or the first of path-2, path-3, ... if it exists already."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
