"""What commands say when the device's memory is too small."""

from collections.abc import Iterator
from contextlib import contextmanager

from amskv_jax.errors import AmskvError


@contextmanager
def explaining_memory(batch: int) -> Iterator[None]:
    """Turn JAX's error about too little memory into one on ``--batch-size``, ``batch`` now."""
    import jax  # noqa: PLC0415

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise AmskvError(
            f"not enough memory for {batch} pictures at once: give a smaller --batch-size"
        ) from error
