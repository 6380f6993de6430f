"""Layer statistics made up for tests."""

import numpy as np

from amskv_jax.plan.stats import LayerStats
from amskv_jax.schedule import VAR_256


def make_stats(similarity, schedule=VAR_256, density=None):
    """Statistics with these similarities [layers, S] and, if not given, even attention."""
    similarity = np.array(similarity, float)
    similarity[:, 0] = np.nan
    layers, scales = similarity.shape
    if density is None:
        tokens = np.array(schedule.tokens)
        even = np.tril(np.broadcast_to(tokens, (scales, scales))) / np.cumsum(tokens)[:, None]
        density = np.broadcast_to(even, (layers, scales, scales))
    return LayerStats(
        schedule, similarity, similarity, density[:, None], np.ones((layers, scales, 5))
    )


def random_stats(seed, schedule, layers):
    random = np.random.default_rng(seed)
    weights = np.tril(random.random((layers, schedule.num_scales, schedule.num_scales)) ** 4)
    density = weights / weights.sum(-1, keepdims=True)
    return make_stats(-random.random((layers, schedule.num_scales)), schedule, density)
