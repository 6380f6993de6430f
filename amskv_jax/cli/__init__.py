"""The command line: ``amskv``. Commands import what is heavy themselves, so ``--help`` is quick."""

import os
import sys

import typer

from amskv_jax.cli import (
    analyze,
    bench,
    calibrate,
    convert,
    encode,
    evaluate,
    export,
    info,
    init,
    pack,
    plan,
    push,
    sample,
    score,
    study,
    train,
)
from amskv_jax.cli.console import plain_warnings, print_error
from amskv_jax.cli.policy import PolicyCommand
from amskv_jax.errors import AmskvError, UsageError

app = typer.Typer(
    help="Next-scale image models with a key/value cache that keeps only what matters.",
    epilog="AMSKV_DEBUG=1 shows where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(analyze.analyze)
app.command(cls=PolicyCommand)(bench.bench)
app.command()(calibrate.calibrate)
app.add_typer(convert.app, name="convert")
app.command()(encode.encode)
app.command("eval", cls=PolicyCommand)(evaluate.evaluate)
app.command()(export.export)
app.command()(info.info)
app.command()(init.init)
app.command()(pack.pack)
app.command(cls=PolicyCommand)(plan.plan)
app.command()(push.push)
app.command(cls=PolicyCommand)(sample.sample)
app.command(cls=PolicyCommand)(score.score)
app.add_typer(study.app, name="study")
app.add_typer(train.app, name="train")


def main() -> None:
    """Run the command line: exit code 1 for failures, 2 for commands that can never work."""
    try:
        with plain_warnings():
            app(prog_name="amskv")
    except (AmskvError, OSError) as error:
        if os.environ.get("AMSKV_DEBUG"):
            raise
        print_error(str(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)
