"""Metrics against computations that share no code with them."""

import numpy as np
import pytest
import scipy.linalg
from small_evaluation import MEAN_COLOUR

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.evaluation import metrics
from amskv_jax.evaluation.measures import Judge
from amskv_jax.evaluation.metrics import (
    FeatureSet,
    class_accuracy,
    frechet_distance,
    gaussian_distance,
    inception_score,
    precision_recall,
    psnr,
    ssim,
)


def correlated(generator, count, dimension, shift=0.0):
    mixing = generator.normal(size=(dimension, dimension)) / dimension**0.5
    return (generator.normal(size=(count, dimension)) @ mixing + shift).astype(np.float32)


@pytest.mark.parametrize(("dimension", "shift"), [(1, 0.5), (5, 0.0), (24, 1.0)])
def test_frechet_distance_is_that_of_the_matrix_root(dimension, shift):
    generator = np.random.default_rng(dimension)
    first = correlated(generator, 90, dimension)
    second = correlated(generator, 60, dimension, shift)
    mean1, mean2 = first.mean(0, np.float64), second.mean(0, np.float64)
    cov1, cov2 = (np.atleast_2d(np.cov(x.astype(np.float64).T)) for x in (first, second))
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root.real)
    found = frechet_distance(FeatureSet(first), FeatureSet(second))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_nothing():
    features = FeatureSet(correlated(np.random.default_rng(0), 50, 7))
    assert abs(frechet_distance(features, features)) < 1e-10


def test_gaussian_distance_of_singular_covariances():
    # Known in closed form for diagonal matrices: sum of (sqrt a - sqrt b)^2.
    a, b = np.array([4.0, 0.0, 9.0]), np.array([1.0, 2.0, 0.0])
    found = gaussian_distance(np.zeros(3), np.diag(a), np.ones(3), np.diag(b))
    np.testing.assert_allclose(found, 3 + ((a**0.5 - b**0.5) ** 2).sum(), rtol=1e-12)


def test_too_few_pictures_for_a_frechet_distance_are_refused():
    features = FeatureSet(np.ones((8, 8), np.float32))
    with pytest.raises(UsageError, match=r"8 pictures are too few .* 8 features: .*at least 9"):
        frechet_distance(features, features)


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_inception_score_by_its_definition(splits):
    logits = np.random.default_rng(splits).normal(size=(53, 6)) * 3
    order = np.random.RandomState(2020).permutation(len(logits))
    p = np.exp(logits)[order] / np.exp(logits)[order].sum(1, keepdims=True)
    scores = []
    for index in range(splits):
        part = p[index * len(p) // splits : (index + 1) * len(p) // splits]
        marginal = part.mean(0)
        divergence = [
            sum(q * np.log(q / m) for q, m in zip(row, marginal, strict=True)) for row in part
        ]
        scores.append(np.exp(np.mean(divergence)))
    np.testing.assert_allclose(inception_score(logits, splits), (np.mean(scores), np.std(scores)))


def test_inception_score_reaches_its_bounds():
    certain = np.where(np.eye(10, dtype=bool)[np.arange(200) % 10], 1000.0, 0.0)
    assert inception_score(certain, 1)[0] == pytest.approx(10)
    assert inception_score(np.zeros((200, 10)))[0] == pytest.approx(1)


def brute_force_share_inside(queries, centres, k):
    """The share of queries within some centre's distance to its k-th nearest other centre."""
    inside = 0
    radii = [
        sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if i != j)[k - 1]
        for i, c in enumerate(centres)
    ]
    for query in queries:
        inside += any(
            np.linalg.norm(query - centre) <= radius
            for centre, radius in zip(centres, radii, strict=True)
        )
    return inside / len(queries)


def test_precision_and_recall_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 16)  # several blocks, the last one smaller
    generator = np.random.default_rng(3)
    real = generator.normal(size=(50, 4)).astype(np.float32) + 100
    drawn = 0.7 * generator.normal(size=(37, 4)).astype(np.float32) + 101.0
    precision, recall = precision_recall(FeatureSet(real), FeatureSet(drawn))
    assert precision == pytest.approx(brute_force_share_inside(drawn, real, 3))
    assert recall == pytest.approx(brute_force_share_inside(real, drawn, 3))
    assert 0 < recall < precision < 1


def test_precision_needs_more_pictures_than_neighbours():
    features = FeatureSet(np.zeros((3, 2), np.float32))
    with pytest.raises(UsageError, match="more than 3 pictures, not 3"):
        precision_recall(features, features)


def test_class_accuracy():
    assert class_accuracy(np.array([[1, 2], [3, 0], [0, 1]]), np.array([1, 0, 0])) == 2 / 3


def pairs(shape, generator=None):
    generator = generator or np.random.default_rng(5)
    first = generator.integers(0, 256, shape).astype(np.uint8)
    noise = generator.normal(0, 20, shape)
    return first, np.clip(first + noise, 0, 255).astype(np.uint8)


def test_psnr_by_its_definition():
    first, second = pairs((3, 12, 14, 3))
    error = ((first.astype(float) - second.astype(float)) ** 2).mean()
    assert psnr(first, second) == pytest.approx(10 * np.log10(255**2 / error))
    assert psnr(first, first) is None


def slow_ssim(first, second):
    """Structural similarity of one channel, window by window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(first.shape[0] - 10):
        for left in range(first.shape[1] - 10):
            x = first[top : top + 11, left : left + 11].astype(float)
            y = second[top : top + 11, left : left + 11].astype(float)
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            var_x = (window * (x - mean_x) ** 2).sum()
            var_y = (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append(
                (2 * mean_x * mean_y + c1)
                * (2 * covariance + c2)
                / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
            )
    return np.mean(values)


def test_ssim_is_that_of_a_slow_loop(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_PIXELS", 2 * 13 * 15)  # two pictures at a time
    first, second = pairs((3, 13, 15, 3))
    expected = np.mean(
        [slow_ssim(first[i, ..., c], second[i, ..., c]) for i in range(3) for c in range(3)]
    )
    assert ssim(first, second) == pytest.approx(expected, rel=1e-4)
    assert ssim(first, first) == pytest.approx(1, abs=1e-5)


def test_pictures_that_cannot_be_compared_are_refused():
    with pytest.raises(AmskvError, match="cannot be compared"):
        psnr(np.zeros((2, 12, 12, 3), np.uint8), np.zeros((3, 12, 12, 3), np.uint8))
    with pytest.raises(AmskvError, match="at least 11 pixels a side, not 8x20"):
        ssim(np.zeros((1, 8, 20, 3), np.uint8), np.zeros((1, 8, 20, 3), np.uint8))


def test_judge_reports_all_figures():
    generator = np.random.default_rng(9)
    real, drawn = pairs((40, 12, 12, 3), generator)
    judge = Judge.of(MEAN_COLOUR, real)
    figures = judge.figures(drawn, np.zeros(40, int), real)
    assert list(figures) == [
        *("frechet_distance", "score", "score_deviation", "precision", "recall"),
        *("class_accuracy", "psnr", "ssim"),
    ]
    assert figures["psnr"] == psnr(drawn, real)
    expected = frechet_distance(
        FeatureSet(real.mean((1, 2)).astype(np.float32)),
        FeatureSet(drawn.mean((1, 2)).astype(np.float32)),
    )
    assert figures["frechet_distance"] == pytest.approx(expected)
    assert "psnr" not in judge.figures(drawn, np.zeros(40, int))
    with pytest.raises(UsageError, match="3 pictures are too few"):
        judge.figures(drawn[:3], np.zeros(3, int))


def test_figures_are_those_of_torch_fidelity():
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    generator = np.random.default_rng(1)
    real, drawn = correlated(generator, 300, 16), correlated(generator, 200, 16, 0.3)
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (drawn, real)]
    expected = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    found = frechet_distance(FeatureSet(real), FeatureSet(drawn))
    assert found == pytest.approx(expected, rel=1e-7)
    score = isc_features_to_metric(torch.from_numpy(drawn))
    assert inception_score(drawn) == pytest.approx(tuple(score.values()))
    precision, recall = calculate_precision_recall_full(
        torch.from_numpy(drawn), torch.from_numpy(real)
    )
    assert precision_recall(FeatureSet(real), FeatureSet(drawn)) == pytest.approx(
        (precision, recall)
    )
