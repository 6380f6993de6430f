"""Files which are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amskv_jax.errors import AmskvError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder, which becomes ``path`` when all went well.

    Raises:
      AmskvError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise AmskvError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
