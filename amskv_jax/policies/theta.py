"""The automatic threshold between cache-demanding and cache-efficient layers."""

import numpy as np

ODD_LAYERS_FROM = 8
"""Models with at least this many layers may have a single odd one, which must not be a class."""


def automatic_theta(similarity: np.ndarray) -> tuple[float, float]:
    """Split layers into demanding and efficient ones by Otsu's method (1979).

    Each layer is given by the lowest similarity at any scale that finds no room: Algorithm 1 calls
    a layer demanding exactly if that number lies below theta. Of all ways to cut the sorted numbers
    in two, Otsu's has the largest variance between the classes. Unlike the largest gap, it weighs
    classes by size, and what it finds stays the same if all similarities are shifted or scaled.
    Nothing is to be tuned. The lowest and the highest number are taken for as odd as their
    neighbours only, so no single layer becomes a class of its own or moves theta. Theta lies
    halfway between the classes, as far from either as it can be.

    Args:
      similarity: [layers]. If they are fewer than ``ODD_LAYERS_FROM``, each is taken as it is.

    Returns:
      Theta, and the separation: the share of the variance that lies between the classes, 0 to 1.
      If the layers are equal, or all but one, theta is minus infinity: none is demanding.
    """
    ordered = np.sort(similarity)
    count = len(ordered)
    if count >= ODD_LAYERS_FROM:
        ordered[0], ordered[-1] = ordered[1], ordered[-2]
    if ordered[0] == ordered[-1]:
        return -np.inf, 0.0
    best, theta, total = 0.0, -np.inf, ordered.sum()
    for size in range(1, count):
        if ordered[size - 1] < ordered[size]:
            below = ordered[:size].sum()
            distance = below / size - (total - below) / (count - size)
            between = size * (count - size) / count**2 * distance**2
            if between > best:
                best, theta = between, (ordered[size - 1] + ordered[size]) / 2
    return float(theta), float(best / ordered.var())
