"""Running kernels for GPUs on a CPU: when it can be done, and whether there were data races."""

import os

import jax
import pytest

from amskv_jax import hopper

FIRST, END = hopper.VERSIONS
interpreted = pytest.mark.skipif(
    not FIRST <= jax.__version_info__[:2] < END, reason="kernels are of other versions of JAX"
)
many_threads = pytest.mark.skipif(
    (os.cpu_count() or 1) < 4 and "NPROC" not in os.environ,
    reason="threads of the interpreter wait for each other: set NPROC=16 if there are few cores",
)


def assert_no_races():
    """Check the kernel that ran last, with races looked for."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    assert not interpret_pallas_call.get_races().races_found
