"""Interpolation of feature maps that agrees with PyTorch, as products with small constant matrices.

`jax.image.resize` has no adaptive average pooling, and its antialiasing and cubic kernel differ
from what the published models were trained with. Token maps are small (64x64 at most) and their
sizes are static, so every resize is two matrix products, whose matrices are computed in float64.
"""

from functools import lru_cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Method = Literal["area", "bicubic", "bilinear"]


def resize(x: jax.Array, size: tuple[int, int], method: Method) -> jax.Array:
    """Resize maps as `torch.nn.functional.interpolate(..., align_corners=False)` does.

    Args:
      x: maps [..., h, w, C].
      size: (height, width) of the result.
      method: "bicubic" (kernel a = -0.75), "bilinear" (also torch's trilinear where the depth stays
        as it is), both without antialiasing; or "area", adaptive average pooling.

    Returns:
      Maps [..., height, width, C], float32. They equal ``x`` if the size is unchanged.
    """
    x = x.astype(jnp.float32)
    (height, width), precision = size, lax.Precision.HIGHEST
    if x.shape[-3] != height:
        rows = interpolation_matrix(x.shape[-3], height, method)
        x = jnp.einsum("...hwc,Hh->...Hwc", x, rows, precision=precision)
    if x.shape[-2] != width:
        columns = interpolation_matrix(x.shape[-2], width, method)
        x = jnp.einsum("...hwc,Ww->...hWc", x, columns, precision=precision)
    return x


@lru_cache(maxsize=1024)
def interpolation_matrix(source: int, target: int, method: Method) -> np.ndarray:
    """Return the read-only float32 matrix [target, source] which resizes one axis.

    Raises:
      ValueError: if the method is unknown.
    """
    build = {"area": _area, "bicubic": _bicubic, "bilinear": _bilinear}.get(method)
    if build is None:
        raise ValueError(f"unknown resize method {method!r}: use 'area', 'bicubic' or 'bilinear'")
    matrix = build(source, target).astype(np.float32)
    matrix.flags.writeable = False  # shared by all callers through the cache
    return matrix


def _area(source: int, target: int) -> np.ndarray:
    """Average over bins which overlap wherever ``target`` does not divide ``source``."""
    matrix = np.zeros((target, source))
    for row in range(target):
        start = row * source // target
        stop = -(-(row + 1) * source // target)
        matrix[row, start:stop] = 1 / (stop - start)
    return matrix


def _bilinear(source: int, target: int) -> np.ndarray:
    """Two taps around the half-pixel centre, which stays right of the first source centre."""
    centre = np.maximum(_half_pixel_centres(source, target), 0)
    left = np.floor(centre).astype(int)
    return _place_taps(source, left, np.stack([left + 1 - centre, centre - left]))


def _bicubic(source: int, target: int) -> np.ndarray:
    """Four taps of the cubic convolution kernel with a = -0.75 (torch; others use -0.5)."""
    a = -0.75
    centre = _half_pixel_centres(source, target)
    first = np.floor(centre).astype(int) - 1
    distance = np.abs(centre - (first + np.arange(4)[:, None]))
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return _place_taps(source, first, np.where(distance <= 1, near, far))


def _half_pixel_centres(source: int, target: int) -> np.ndarray:
    """Return where the centres of the target's pixels lie among the source's, [target]."""
    return (np.arange(target) + 0.5) * source / target - 0.5


def _place_taps(source: int, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Build a matrix from taps at ``first``, ``first + 1``, ..., which repeat the border pixels.

    Args:
      source: columns of the matrix.
      first: index of the first tap of every row [target]; may lie outside the source.
      weights: [taps, target].

    Returns:
      The matrix [target, source].
    """
    matrix = np.zeros((len(first), source))
    for tap, weight in enumerate(weights):
        column = np.clip(first + tap, 0, source - 1)
        matrix[np.arange(len(first)), column] += weight
    return matrix
