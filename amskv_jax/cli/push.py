"""``amskv push``: a checkpoint to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from amskv_jax.cli.console import print_line
from amskv_jax.cli.options import CheckpointOption


def push(
    checkpoint: CheckpointOption,
    repo: Annotated[
        str,
        typer.Option(help="The repository; it is made if there is none.", metavar="USER/NAME"),
    ],
    stats: Annotated[
        list[Path] | None, typer.Option(help="Layer statistics of this checkpoint; repeatable.")
    ] = None,
    plan: Annotated[
        list[Path] | None, typer.Option(help="A plan for this model; repeatable.")
    ] = None,
    license: Annotated[
        str, typer.Option(help="The hub's name of the weights' licence, such as mit.")
    ] = "",
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that only its owners see.")
    ] = False,
) -> None:
    """Write a checkpoint to the Hugging Face hub, with statistics, plans and a model card.

    Everybody who may see the repository can then give hf://USER/NAME wherever a checkpoint is
    wanted. Needs the extra "hub" and a token that may write (`hf auth login`, or HF_TOKEN).
    """
    from amskv_jax.checkpoints.publish import push as push_checkpoint  # noqa: PLC0415

    address = push_checkpoint(
        checkpoint,
        repo,
        stats=stats or (),
        plans=plan or (),
        license=license,
        private=private,
    )
    print_line(f"wrote {address}")
