"""Calibration: measuring where a model's attention goes while it draws with the full cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.attention import QKV
from amskv_jax.cache.layout import Slots
from amskv_jax.cache.static import StaticSlots
from amskv_jax.cache.store import KVCache
from amskv_jax.errors import UsageError
from amskv_jax.mesh import MODEL, gathered, mean_over
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.protocol import Conditions
from amskv_jax.pipeline import Pipeline
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
      top_counts: see ``LayerStats``.
    """

    per_row: ClassVar[bool] = True
    schedule: ScaleSchedule
    top_counts: tuple[int, ...] = TOP_COUNTS

    def __call__(
        self, slots: Slots, cache: KVCache, layer: jax.Array, step: int, qkv: QKV, scale: float
    ) -> Observation:
        """Return what the layer's attention shows at ``step``."""
        assert isinstance(slots, StaticSlots), "the full cache is static"
        query, key, *_ = qkv
        keys = [slots.keys(cache, layer, step, earlier, key.dtype) for earlier in range(step)]
        keys.append(key)
        if step:
            grids = self.schedule.grids[step - 1], self.schedule.grids[step]
            similarity, cosine = key_similarity(keys[-2], keys[-1], *grids)
        else:
            similarity = cosine = jnp.full(len(query), jnp.nan)
        density, history_top = attention_shares(query, keys, scale, self.top_counts)
        later = self.schedule.num_scales - 1 - step
        density = jnp.pad(density, ((0, 0), (0, 0), (0, later)))
        similarity, cosine, history_top = (
            mean_over(x, MODEL) for x in (similarity, cosine, history_top)
        )
        return Observation(similarity, cosine, gathered(density, 1), history_top)


def measure_attention(
    pipe: Pipeline,
    conditions: Conditions,
    *,
    count: int,
    batch: int,
    seed: int = 0,
    drawing: Drawing | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> LayerStats:
    """Draw pictures with the full cache and measure the attention on the way.

    Every batch has the same shape, so the sampler compiles once: the last one is filled up with
    pictures that are not counted. Sums over pictures are kept in float64.

    Args:
      pipe: the model.
      conditions: what to draw, in turn.
      count: pictures.
      batch: pictures drawn at once.
      seed: of the random numbers.
      drawing: how tokens are drawn; the pipeline's own way if not given.
      settings: what else to record beside the numbers.
      progress: called after every batch with the number of pictures done.

    Returns:
      The statistics, averaged over all pictures and the rows of each.

    Raises:
      UsageError: if there are no pictures, or ``batch`` is below 1.
      AmskvError: if attention is not finite somewhere.
    """
    if count < 1 or batch < 1:
        raise UsageError(f"cannot measure {count} pictures, {batch} at once: 1 or more each")
    drawing = drawing or pipe.drawing
    sampler = pipe.sampler(Full(), drawing, observe=AttentionObserver(pipe.schedule))
    drawer = pipe.drawer(sampler, conditions, batch, drawing, decode=False)
    sums: list[Observation] | None = None
    for drawn in drawer.batches(pipe.params, seed, 0, count, pipe.controls(drawing)):
        sum_rows = partial(_sum_rows, batch=drawer.batch, real=drawn.count)
        found = [jax.tree.map(sum_rows, scans[0]) for scans in drawn.samples.observed]
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
        progress(drawn.first + drawn.count)
    means = jax.tree.map(lambda total: total / count, sums)
    similarity, cosine, density, history_top = map(np.stack, zip(*means, strict=True))
    return LayerStats(
        schedule=pipe.schedule,
        similarity=similarity.T,
        cosine=cosine.T,
        head_density=density.transpose(1, 2, 0, 3),
        history_top=history_top.transpose(1, 0, 2),
        pictures=count,
        fingerprint=pipe.fingerprint,
        settings={
            "cfg": drawing.cfg,
            "tau": drawing.tau,
            "top_k": drawing.top_k,
            "top_p": drawing.top_p,
            "seed": seed,
            "dtype": pipe.dtype,
            **(settings or {}),
        },
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
        probability = jax.nn.softmax(scale * logits, axis=-1) * real[None, None, :, None]
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


def _sum_rows(values: jax.Array, batch: int, real: int) -> np.ndarray:
    """Average the rows of each picture, then sum the first ``real`` pictures, in float64.

    ``values`` is [layers, rows, ...], the rows of a picture being next to each other.
    """
    array = np.asarray(values, np.float64)
    per_picture = array.reshape(len(array), batch, -1, *array.shape[2:]).mean(2)
    return per_picture[:, :real].sum(1)
