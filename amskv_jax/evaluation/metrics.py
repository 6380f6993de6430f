"""Metrics of generated pictures: plain mathematics on features, logits and pixels."""

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.evaluation.features import in_blocks

NEIGHBOURS = 3
"""The k of precision and recall, as in the paper."""
SPLITS = 10
"""Parts over which the inception-style score is averaged."""
SHUFFLE_SEED = 2020
"""Seed of the order in which pictures are split, the same as torch-fidelity's."""
BLOCK = 1024
"""Rows of a matrix of distances which are held at once."""
BLOCK_PIXELS = 2**22
"""Pixels of the pictures which SSIM looks at at once."""
SSIM_WINDOW, SSIM_DEVIATION = 11, 1.5
"""Width and standard deviation of SSIM's Gaussian window, in pixels."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of a set of pictures, and what the metrics need to know of them.

    Attributes:
      features: [N, D].
    """

    features: np.ndarray

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and unbiased covariance [D, D], float64."""
        features = np.asarray(self.features, np.float64)
        return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))

    @cached_property
    def radii(self) -> np.ndarray:
        """Squared distance from every picture to its k-th nearest neighbour in the set, [N]."""
        return neighbour_distances(self.features, NEIGHBOURS)


def check_picture_count(num: int, dimension: int) -> None:
    """Raise UsageError unless ``num`` pictures suffice for a Frechet distance.

    Args:
      num: pictures.
      dimension: of the features.
    """
    if num <= dimension:
        raise UsageError(
            f"{num} pictures are too few for a Frechet distance on {dimension} features: a "
            f"covariance from {num} pictures has rank {max(num - 1, 0)} at most, and the distance "
            f"would measure their number; take at least {dimension + 1}, better 10000"
        )


def frechet_distance(first: FeatureSet, second: FeatureSet) -> float:
    """Return the squared Frechet distance of two Gaussians fitted to features (arXiv 1706.08500).

    Raises:
      UsageError: if a set has no more pictures than features.
    """
    for features in (first.features, second.features):
        check_picture_count(*features.shape)
    return gaussian_distance(*first.moments, *second.moments)


def gaussian_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The trace of the root of C1 C2, which is not symmetric, is that of the symmetric
    C1^(1/2) C2 C1^(1/2): real and never negative, even where the covariances are singular.

    Args:
      mean1: [D].
      covariance1: [D, D].
      mean2: [D].
      covariance2: [D, D].
    """
    values, vectors = np.linalg.eigh(covariance1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ covariance2 @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    trace = np.sqrt(eigenvalues.clip(0)).sum()
    difference = mean1 - mean2
    total = difference @ difference + np.trace(covariance1) + np.trace(covariance2)
    return float(total - 2 * trace)


def inception_score(logits: np.ndarray, splits: int = SPLITS) -> tuple[float, float]:
    """Return mean and deviation over splits of exp(E[KL(p(y|x) || p(y))]) (arXiv 1606.03498).

    Pictures are shuffled as torch-fidelity does, so equal logits give its number.

    Args:
      logits: [N, classes].
      splits: parts of the pictures.
    """
    logits = np.random.RandomState(SHUFFLE_SEED).permutation(np.asarray(logits, np.float64))
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    edges = [index * len(logits) // splits for index in range(splits + 1)]
    scores = []
    for start, stop in pairwise(edges):
        part = log_p[start:stop]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: FeatureSet, generated: FeatureSet) -> tuple[float, float]:
    """Return improved precision and recall (arXiv 1904.06991).

    Precision is the share of generated pictures which lie in the manifold of the real ones: no
    farther from some real picture than its k-th nearest real neighbour. Recall is the reverse.
    """
    precision = in_manifold(generated.features, real.features, real.radii)
    recall = in_manifold(real.features, generated.features, generated.radii)
    return float(precision.mean()), float(recall.mean())


def neighbour_distances(features: np.ndarray, k: int) -> np.ndarray:
    """Return the squared distance from every row to its k-th nearest other row, [N].

    Raises:
      UsageError: if there are not more than ``k`` rows.
    """
    if len(features) <= k:
        raise UsageError(f"precision and recall need more than {k} pictures, not {len(features)}")
    features = np.asarray(features, np.float32)
    nearest = partial(_kth_distance, everything=jnp.asarray(features), k=k)
    return np.asarray(in_blocks(nearest, BLOCK, features, np.arange(len(features))))


def in_manifold(queries: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return which queries lie within the radius of at least one centre, bool [queries].

    Args:
      queries: [M, D].
      centres: [N, D].
      radii: [N], squared.
    """
    within = partial(_within, centres=jnp.asarray(centres, jnp.float32), radii=radii)
    return np.asarray(in_blocks(within, BLOCK, np.asarray(queries, np.float32)))


@partial(jax.jit, static_argnames="k")
def _kth_distance(rows: jax.Array, own: jax.Array, everything: jax.Array, k: int) -> jax.Array:
    distances = _squared_distances(rows, everything)
    distances = distances.at[jnp.arange(len(rows)), own].set(jnp.inf)
    for _ in range(k - 1):  # on CPUs ten times as fast as `lax.top_k`, which sorts
        distances = distances.at[jnp.arange(len(rows)), distances.argmin(1)].set(jnp.inf)
    return distances.min(1)


@jax.jit
def _within(rows: jax.Array, centres: jax.Array, radii: jax.Array) -> jax.Array:
    return (_squared_distances(rows, centres) <= radii[None]).any(1)


def _squared_distances(rows: jax.Array, columns: jax.Array) -> jax.Array:
    # Distances do not change with the origin, but their rounding errors do.
    centre = columns.mean(0, keepdims=True)
    rows, columns = rows - centre, columns - centre
    products = jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST)
    squares = jnp.square(rows).sum(1)[:, None] + jnp.square(columns).sum(1)[None]
    return jnp.maximum(squares - 2 * products, 0)


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of pictures whose largest logit [N, classes] is that of their label [N]."""
    return float((np.argmax(logits, axis=1) == labels).mean())


def psnr(pictures: np.ndarray, originals: np.ndarray) -> float | None:
    """Return the peak signal-to-noise ratio in dB, from the mean squared error over all pictures.

    Single pictures may be equal, so a mean of their own ratios could be infinite.

    Args:
      pictures: uint8 [N, H, W, 3].
      originals: of the same shape.

    Returns:
      The ratio; None if all pictures are equal.
    """
    _check_pairs(pictures, originals)
    error = np.mean([_squared_error(*pair) for pair in zip(pictures, originals, strict=True)])
    return float(10 * np.log10(255**2 / error)) if error else None


def _squared_error(picture: np.ndarray, original: np.ndarray) -> float:
    return float(np.square(picture.astype(np.float64) - original).mean())


def ssim(pictures: np.ndarray, originals: np.ndarray) -> float:
    """Return the mean structural similarity over windows, channels and pictures.

    As published (Wang et al. 2004): Gaussian windows of 11 pixels which lie wholly in the picture,
    K1 = 0.01, K2 = 0.03; here on each of the three channels.

    Args:
      pictures: uint8 [N, H, W, 3].
      originals: of the same shape.

    Raises:
      AmskvError: if the pictures are smaller than a window.
    """
    _check_pairs(pictures, originals)
    if min(pictures.shape[1:3]) < SSIM_WINDOW:
        raise AmskvError(
            f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, "
            f"not {pictures.shape[1]}x{pictures.shape[2]}"
        )
    block = max(1, BLOCK_PIXELS // (pictures.shape[1] * pictures.shape[2]))
    # One block is done before the next is moved to the device, as all may be too many for it.
    blocks = in_blocks(lambda *pair: np.asarray(_ssim(*pair)), block, pictures, originals)
    return float(blocks.mean())


@jax.jit
def _ssim(first: jax.Array, second: jax.Array) -> jax.Array:
    """Return the structural similarity of pairs of pictures, [N]."""
    distance = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-(distance**2) / (2 * SSIM_DEVIATION**2))
    weights /= weights.sum()

    def smooth(x: jax.Array) -> jax.Array:
        for axis in (1, 2):
            length = x.shape[axis] - SSIM_WINDOW + 1
            shifted = [lax.slice_in_dim(x, i, i + length, axis=axis) for i in range(SSIM_WINDOW)]
            x = sum(weight * part for weight, part in zip(weights, shifted, strict=True))
        return x

    x, y = first.astype(jnp.float32), second.astype(jnp.float32)
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x = smooth(x * x) - mean_x**2
    variance_y = smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * contrast).mean((1, 2, 3))


def _check_pairs(pictures: np.ndarray, originals: np.ndarray) -> None:
    if pictures.shape != originals.shape:
        raise AmskvError(
            f"pictures of shape {pictures.shape} cannot be compared with {originals.shape}"
        )
