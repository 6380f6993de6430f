"""``--distributed``: processes that ``jax.distributed`` brings together share a command's work."""

import atexit
import signal
from collections.abc import Callable
from typing import Annotated

import typer

from amskv_jax.errors import AmskvError, UsageError

DistributedOption = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Share the pictures of --shards among processes that jax.distributed brings together: "
        "started by Slurm, Open MPI or Kubernetes, or on a Cloud TPU; or by hand, with "
        "JAX_COORDINATOR_ADDRESS=HOST:PORT of the first and --share.",
    ),
]
PATIENCE_SECONDS = 30 * 24 * 3600
"""Who has ended waits so long for the others: shares may take very different times."""
MEETING_SECONDS = 3600
"""At a step that the first process takes before the others, they wait so long for each other."""


def join(share: tuple[int, int] | None) -> tuple[int, int]:
    """Meet the other processes, before anything is computed; return which this is, of how many.

    Args:
      share: index and number of the processes; None to let JAX find them out.

    Raises:
      UsageError: if neither does.
      AmskvError: if JAX cannot be set up so.
    """
    import jax  # noqa: PLC0415

    # It takes SIGTERM as news that some program may ask for, and so keeps it from ending any.
    jax.config.update("jax_enable_preemption_service", False)
    index, count = share or (None, None)
    try:
        jax.distributed.initialize(
            num_processes=count, process_id=index, shutdown_timeout_seconds=PATIENCE_SECONDS
        )
    except (ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"--distributed: JAX does not know which processes belong together ({error}). Start "
            "them by Slurm, Open MPI or Kubernetes, or on a Cloud TPU; or set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, the same for all, HOST being the first one's, and "
            "give --share 0/COUNT, 1/COUNT, ..."
        ) from error
    except RuntimeError as error:
        raise AmskvError(f"--distributed: {error}") from error
    # At the end JAX waits for the other processes, and no longer listens to Python's Ctrl-C.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return jax.process_index(), jax.process_count()


def first_alone(name: str, action: Callable[[], object]) -> None:
    """Do something in the first process, and then in all others."""
    import jax  # noqa: PLC0415
    import orbax.checkpoint as ocp  # noqa: PLC0415

    try:
        if jax.process_index() == 0:
            action()
    finally:  # else the others would wait for nothing
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * MEETING_SECONDS)
    if jax.process_index() != 0:
        action()
