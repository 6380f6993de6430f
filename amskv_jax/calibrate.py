"""Calibration: measuring where a model's attention goes while it draws with the full cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.attention import QKV
from amskv_jax.cache.layout import Slots
from amskv_jax.cache.static import StaticSlots
from amskv_jax.cache.store import KVCache
from amskv_jax.errors import UsageError
from amskv_jax.generate import Sampler
from amskv_jax.plan.stats import TOP_COUNTS, LayerStats
from amskv_jax.policies.full import Full
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.similarity import key_similarity

CHUNK_BYTES = 2**28
"""Most bytes of float32 attention probabilities that are held at once: one chunk of queries."""


class Observation(NamedTuple):
    """What one layer's attention shows at one scale, per batch row.

    Attributes:
      similarity: minus the mean distance to the keys of the scale before, [rows]; NaN at scale 0.
      cosine: the mean cosine of the same pairs, [rows]; NaN at scale 0.
      density: attention given to every scale, [rows, heads, S].
      history_top: attention given to the most attended earlier tokens, [rows, K].
    """

    similarity: jax.Array
    cosine: jax.Array
    density: jax.Array
    history_top: jax.Array


@dataclass(frozen=True)
class AttentionObserver:
    """Measures the attention of a run whose plan keeps everything; see ``stack.Observer``.

    Attributes:
      schedule: the model's scales.
      scale: factor of the attention logits.
      top_counts: see ``LayerStats``.
    """

    schedule: ScaleSchedule
    scale: float
    top_counts: tuple[int, ...] = TOP_COUNTS

    def __call__(
        self, slots: Slots, cache: KVCache, layer: jax.Array, step: int, qkv: QKV
    ) -> Observation:
        """Return what the layer's attention shows at ``step``."""
        assert isinstance(slots, StaticSlots), "the full cache is static"
        query, key, _ = qkv
        keys = [_cached_keys(slots, cache, layer, step, scale) for scale in range(step)]
        keys.append(key.astype(cache.keys.dtype))
        if step:
            grids = self.schedule.grids[step - 1], self.schedule.grids[step]
            similarity, cosine = key_similarity(keys[-2], keys[-1], *grids)
        else:
            similarity = cosine = jnp.full(len(query), jnp.nan)
        density, history_top = attention_shares(query, keys, self.scale, self.top_counts)
        later = self.schedule.num_scales - 1 - step
        density = jnp.pad(density, ((0, 0), (0, 0), (0, later)))
        return Observation(similarity, cosine, density, history_top)


def calibrate(
    sampler: Sampler,
    params: Any,
    labels: jax.Array | np.ndarray,
    keys: jax.Array,
    guidance: float,
    *,
    batch: int,
    fingerprint: str = "",
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> LayerStats:
    """Draw pictures with the full cache and measure the attention on the way.

    Every batch has the same shape, so the sampler compiles once: the last one is filled up with
    pictures that are not counted. Sums over pictures are kept in float64.

    Args:
      sampler: the model and how tokens are drawn; its plan, pictures and trace are not used.
      params: see ``Sampler``.
      labels: [N] int32, one picture each.
      keys: [N] PRNG keys, see ``generate.picture_keys``.
      guidance: see ``Sampler``.
      batch: pictures drawn at once.
      fingerprint: of the weights, see ``checkpoint.fingerprint``.
      settings: what else to record beside the numbers.
      progress: called after every batch with the number of pictures done.

    Returns:
      The statistics, averaged over all pictures and both halves of guidance.

    Raises:
      UsageError: if there are no labels, or ``batch`` is below 1.
      AmskvError: if attention is not finite somewhere.
    """
    chex.assert_equal_shape_prefix((labels, keys), 1)
    if not len(labels) or batch < 1:
        raise UsageError(f"cannot measure {len(labels)} pictures, {batch} at once: 1 or more each")
    config = sampler.transformer
    schedule = config.schedule
    sampler = replace(
        sampler,
        plan=Full().plan(config.cache_shape),
        decode=False,
        trace=False,
        observe=AttentionObserver(schedule, config.attention_scale),
    )
    count = len(labels)
    sums: list[Observation] | None = None
    for start in range(0, count, batch):
        chosen = np.minimum(np.arange(start, start + batch), count - 1)
        real = min(batch, count - start)
        steps = sampler(params, labels[chosen], keys[chosen], guidance).observed
        sum_rows = partial(_sum_rows, batch=batch, real=real)
        found = [jax.tree.map(sum_rows, scans[0]) for scans in steps]
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
        progress(start + real)
    means = jax.tree.map(lambda total: total / count, sums)
    similarity, cosine, density, history_top = map(np.stack, zip(*means, strict=True))
    return LayerStats(
        schedule=schedule,
        similarity=similarity.T,
        cosine=cosine.T,
        head_density=density.transpose(1, 2, 0, 3),
        history_top=history_top.transpose(1, 0, 2),
        pictures=count,
        fingerprint=fingerprint,
        settings={"guidance": float(guidance), **(settings or {})},
    )


def attention_shares(
    query: jax.Array, keys: list[jax.Array], scale: float, top_counts: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Return where the attention goes, holding ``CHUNK_BYTES`` of probabilities at a time.

    Args:
      query: [rows, T, heads, head_dim].
      keys: of every scale up to the queries' own, [rows, T_j, heads, head_dim] each.
      scale: factor of the logits.
      top_counts: see ``LayerStats``.

    Returns:
      The mean probability given to every scale [rows, heads, len(keys)], and to the most attended
      tokens of earlier scales [rows, K], float32.
    """
    offsets = np.cumsum([0, *(part.shape[1] for part in keys)])
    history = int(offsets[-2])
    key = jnp.concatenate(keys, axis=1)
    rows, length, heads, _ = query.shape
    chunk = int(np.clip(CHUNK_BYTES // (4 * rows * heads * key.shape[1]), 1, length))
    chunks = -(-length // chunk)
    real = (jnp.arange(chunks * chunk) < length).reshape(chunks, chunk)
    padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)))
    parts = jnp.moveaxis(padded.reshape(rows, chunks, chunk, heads, -1), 1, 0)

    def shares(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        query, real = chunk
        precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
        logits = jnp.einsum(
            "btnh,bsnh->bnts", query, key, precision=precision, preferred_element_type=jnp.float32
        )
        probability = jax.nn.softmax(scale * logits, axis=-1) * real[:, None]
        per_key = probability.sum(2)
        density = [per_key[..., start:stop].sum(-1) for start, stop in pairwise(offsets)]
        return jnp.stack(density, axis=-1), _top_sums(probability[..., :history], top_counts)

    density, history_top = lax.map(shares, (parts, real))
    return density.sum(0) / length, history_top.sum(0) / length


def _top_sums(probability: jax.Array, top_counts: tuple[int, ...]) -> jax.Array:
    """Sum the largest entries per query, then all queries: [rows, heads, T, n] to [rows, K]."""
    rows, _, _, size = probability.shape
    if not size:
        return jnp.zeros((rows, len(top_counts)))
    largest, _ = lax.top_k(probability, min(size, max(top_counts)))
    cumulated = jnp.cumsum(largest.sum(2).mean(1), axis=-1)
    return cumulated[:, np.minimum(top_counts, size) - 1]


def _cached_keys(
    slots: StaticSlots, cache: KVCache, layer: jax.Array, step: int, scale: int
) -> jax.Array:
    """Return the keys of an earlier scale, [rows, T, heads, head_dim]."""
    _, rows, _, heads, head_dim = cache.keys.shape
    parts = [
        lax.dynamic_slice(
            cache.keys, (layer, 0, run.slot, 0, 0), (1, rows, run.length, heads, head_dim)
        )[0]
        for run in sorted(slots.where(step, scale), key=lambda run: run.start)
    ]
    return jnp.concatenate(parts, axis=1)


def _sum_rows(values: jax.Array, batch: int, real: int) -> np.ndarray:
    """Average the rows of each picture, then sum the first ``real`` pictures, in float64.

    ``values`` is [layers, rows, ...], of which the first ``batch`` are the conditional half.
    """
    array = np.asarray(values, np.float64)
    per_picture = array.reshape(len(array), -1, batch, *array.shape[2:]).mean(1)
    return per_picture[:, :real].sum(1)
