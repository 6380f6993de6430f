"""Compiled programs kept from one command to the next, in the user's cache folder."""

import os
from pathlib import Path


def use_compilation_cache() -> None:
    """Make JAX keep compiled programs, unless the user has set a folder for them."""
    import jax  # noqa: PLC0415

    if jax.config.read("jax_compilation_cache_dir") is None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "amskv_jax"))
