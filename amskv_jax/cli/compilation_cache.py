"""Compiled programs kept from one command to the next, in the user's cache folder."""

import os
from pathlib import Path
from typing import Any


def use_compilation_cache() -> None:
    """Make JAX keep compiled programs, unless the user has set a folder for them.

    All are kept, also those which compile in less than the second that JAX asks for: a command has
    many of them.
    """
    import jax  # noqa: PLC0415

    config: Any = jax.config  # its type knows no options
    if not config.jax_compilation_cache_dir:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        config.update("jax_compilation_cache_dir", str(Path(caches) / "amskv_jax"))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
