"""Where kernels that are written in Pallas' Mosaic GPU dialect, for Hopper GPUs, can be used."""

from typing import Any

import jax

CAPABILITY = "9.0"
"""Compute capability of the GPUs whose instructions the kernels are made of."""
VERSIONS = (0, 11), (0, 13)
"""The first version of JAX that they were tried with, and the first that they were not: the dialect
is experimental, and changes."""


PROCESSORS = 132
"""Streaming multiprocessors of an H100 (SXM) or H200."""


def processors() -> int:
    """Return the default device's streaming multiprocessors; an H100's where it does not say."""
    return int(getattr(jax.devices()[0], "core_count", PROCESSORS))


def has_mosaic() -> bool:
    """Return whether the default device, and this version of JAX, can run kernels for Hopper."""
    device: Any = jax.devices()[0]
    first, end = VERSIONS
    is_tried = first <= jax.__version_info__[:2] < end
    return is_tried and getattr(device, "compute_capability", None) == CAPABILITY
