"""Layer statistics made up for tests."""

from dataclasses import replace

import numpy as np

from amskv_jax.plan.damage import BlockDamage, DamageRound
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.schedule import VAR_256


def cache_shape(schedule, layers, heads=1, head_dim=8):
    """The cache of a model; of as many heads as the statistics here have, unless said otherwise."""
    return CacheShape(schedule, layers, heads, head_dim)


def make_stats(similarity, schedule=VAR_256, density=None, heads=1):
    """Statistics with these similarities [layers, S]; attention is even if not given."""
    similarity = np.array(similarity, float)
    similarity[:, 0] = np.nan
    layers, scales = similarity.shape
    if density is None:
        tokens = np.array(schedule.tokens)
        even = np.tril(np.broadcast_to(tokens, (scales, scales))) / np.cumsum(tokens)[:, None]
        density = np.broadcast_to(even, (layers, scales, scales))
    density = np.repeat(density[:, None], heads, axis=1)
    return LayerStats(schedule, similarity, similarity, density, np.ones((layers, scales, 5)))


def random_stats(seed, schedule, layers, heads=1, damage=False):
    random = np.random.default_rng(seed)
    weights = np.tril(random.random((layers, schedule.num_scales, schedule.num_scales)) ** 4)
    density = weights / weights.sum(-1, keepdims=True)
    similarity = -random.random((layers, schedule.num_scales))
    made = make_stats(similarity, schedule, density, heads)
    return replace(made, damage=random_damage(seed, schedule, layers, heads) if damage else None)


def random_damage(seed, schedule, layers, heads, formats=("float32", "int8", "int4", "int2")):
    """Damage of blocks which no one keeps that is undone step by step, the less the fewer bits."""
    scales = schedule.num_scales
    random = np.random.default_rng(seed)
    lost = (
        random.random((layers, heads, scales - 1, 1, 1))
        * np.array(schedule.tokens[:-1])[:, None, None]
    )
    kept = np.linspace(0, 0.4, len(formats))[:, None]
    steps = np.arange(scales + 1) - 1 - np.arange(scales - 1)[:, None]
    undone = np.clip(steps / np.maximum(steps[:, -1:], 1), 0, 1)[:, None]
    damage = lost * (1 - undone * (1 - kept))
    damage[:, :, np.broadcast_to(steps[:, None] < 0, damage.shape[2:])] = np.nan
    return BlockDamage(formats, (DamageRound(damage, 10**6, 0.0),), 1)
