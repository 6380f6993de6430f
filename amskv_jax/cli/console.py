"""What commands print: lines, tables, errors, warnings, progress."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from amskv_jax.errors import AmskvWarning

PIPE_WIDTH = 200
"""Columns of tables that go to a file or another program."""


def make_console(stderr: bool = False) -> Console:
    """Return a console on the current standard output or error."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def print_line(text: str) -> None:
    """Print a line of plain text."""
    make_console().print(escape(text), soft_wrap=True)


def print_error(message: str) -> None:
    """Print an error to standard error."""
    make_console(stderr=True).print(f"[red]error:[/] {escape(message)}", soft_wrap=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print the package's own warnings as a line each: where in the code they arise helps nobody.

    Others are shown as Python shows them.
    """
    python = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, AmskvWarning):
            return python(message, category, *place, **more)
        text = f"[yellow]warning:[/] {escape(str(message))}"
        return make_console(stderr=True).print(text, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", AmskvWarning)  # every prompt that is cut
        warnings.showwarning = show
        yield


Update = Callable[[str, float | None], None]
"""Takes what is being done and the share that is done, None where it is not known."""


@contextmanager
def progress(what: str) -> Iterator[Update]:
    """Show that something is going on, and how far it is; nothing where no one is looking.

    Args:
      what: what is being done at first.
    """
    console = make_console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        task = p.add_task(what, total=None)

        def update(what: str, share: float | None) -> None:
            p.update(task, description=what, total=None if share is None else 1, completed=share)

        yield update
