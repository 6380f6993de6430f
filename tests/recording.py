"""Looks into a sampler's attention while it draws, and says in NumPy what it should have been."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from amskv_jax.cache.layout import slots_of
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.configs import ModelConfig
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.plan.rows import HeadRow, StaticRow
from amskv_jax.plan.runtime_rows import SelectingRow


@dataclass(frozen=True)
class Recorder:
    """Records what every layer attends with and what it gets; see ``stack.Observer``."""

    scale: float

    def __call__(self, slots, cache, layer, step, qkv):
        output, _ = slots.attend(cache, layer, step, qkv, self.scale, "xla")
        return *qkv, output, jax.tree.map(lambda leaf: leaf[layer], cache)


@dataclass(frozen=True)
class LayerRecord:
    """One layer's run: query, key, value, output per step [rows, T, heads, head_dim]; its cache."""

    query: list[np.ndarray]
    key: list[np.ndarray]
    value: list[np.ndarray]
    output: list[np.ndarray]
    cache: list[Any]


def layer_records(observed) -> list[LayerRecord]:
    """Sort what ``Recorder`` returned (``Samples.observed``) by layer; numbers become float32."""
    layers = []
    for number in range(len(observed[0])):
        for index in range(len(observed[0][number][0])):
            picked = [_layer(step[number], index) for step in observed]
            layers.append(LayerRecord(*map(list, zip(*picked, strict=True))))
    return layers


def drive(row, schedule, scale, *, heads=2, head_dim=8, seed=0) -> LayerRecord:
    """Run one layer with this row on random queries, keys and values of two batch rows."""
    slots = slots_of(row, schedule)
    cache = slots.init(1, 2, heads, head_dim, "float32")
    record, random, layer = Recorder(scale), np.random.default_rng(seed), jnp.int32(0)
    steps = []
    for step, tokens in enumerate(schedule.tokens):
        shape = (3, 2, tokens, heads, head_dim)
        qkv = tuple(jnp.asarray(random.standard_normal(shape), jnp.float32))
        steps.append(record(slots, cache, layer, step, qkv))
        _, cache = slots.attend(cache, layer, step, qkv, scale, "xla")
    columns = zip(*[jax.tree.map(np.asarray, step) for step in steps], strict=True)
    return LayerRecord(*map(list, columns))


def draw_records(plan) -> tuple[list[LayerRecord], float]:
    """Draw two pictures with a tiny model and this plan; return the records, and the logits' scale.

    The layers' rows must be equal, or of so few runs that each is scanned alone.
    """
    schedule = plan.schedule
    config = VARConfig(plan.num_layers, 32, 2, schedule, 5, 32, 8)
    tokenizer = VQVAEConfig(schedule, 32, 8, 32, (1,), 1)
    scale = config.attention_scale
    sampler = Sampler(config, tokenizer, plan, decode=False, observe=Recorder(scale))
    params = random_params(ModelConfig("", "", config, tokenizer), seed=3)
    keys = picture_keys(jax.random.key(2), 2)
    return layer_records(sampler(params, jnp.array([0, 4]), keys, 2.0).observed), scale


def _layer(stacked, index):
    def pick(leaf):
        return np.asarray(leaf[index], None if leaf.dtype == bool else np.float32)

    return jax.tree.map(pick, stacked)


def read_mask(row, schedule, record, step) -> np.ndarray:
    """Which earlier tokens a layer reads at ``step``, [rows, heads, offset of the step].

    For tokens chosen while drawing, this is found out by comparing the cached keys with those of
    all earlier tokens, and it is checked that their number is the planned one.
    """
    rows, _, heads, _ = record.query[0].shape
    offset = schedule.offsets[step]
    if isinstance(row, StaticRow):
        return np.broadcast_to(row.positions(schedule, step)[:offset], (rows, heads, offset))
    if isinstance(row, HeadRow):
        masks = np.stack([head.positions(schedule, step)[:offset] for head in row.heads])
        return np.broadcast_to(masks, (rows, heads, offset))
    if isinstance(row, SelectingRow):
        return _selected(row, record, step)
    visible = record.cache[step].visible[:step]
    per_token = np.repeat(visible, schedule.tokens[:step])
    assert per_token.sum() <= row.c_max
    return np.broadcast_to(per_token, (rows, heads, offset))


def _selected(row, record, step):
    rows, _, heads, head_dim = record.query[0].shape
    past = np.concatenate([np.zeros((rows, 0, heads, head_dim)), *record.key[:step]], axis=1)
    mask = np.zeros((rows, heads, past.shape[1]), bool)
    if not row.counts[step]:
        return mask
    for batch_row in range(rows):
        for head in range(heads):
            cached = record.cache[step].keys[batch_row, : row.counts[step], head]
            equal = (cached[:, None] == past[batch_row, None, :, head]).all(-1)
            assert (equal.sum(1) == 1).all(), "a cached key is no key of an earlier token"
            positions = equal.argmax(1)
            assert (np.diff(positions) > 0).all(), "the cache is in the order of the sequence"
            mask[batch_row, head, positions] = True
    return mask


def dense_attention(record, step, mask, scale) -> np.ndarray:
    """Attention of one step over all tokens so far, those outside ``mask`` masked away, float64."""
    query = record.query[step].astype(np.float64)
    keys, values = (
        np.concatenate(parts[: step + 1], axis=1) for parts in (record.key, record.value)
    )
    mask = np.concatenate([mask, np.ones((*mask.shape[:2], query.shape[1]), bool)], axis=2)
    logits = scale * np.einsum("btnh,bsnh->bnts", query, keys)
    logits = np.where(mask[:, :, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, values)


def check_obeyed(plan, records, scale, tolerance) -> None:
    """Check that every layer attended to what the plan keeps alone, and that nothing came back."""
    schedule = plan.schedule
    for row, record in zip(plan.rows, records, strict=True):
        at_hand = None
        for step in range(schedule.num_scales):
            mask = read_mask(row, schedule, record, step)
            if at_hand is not None:
                assert not (mask & ~at_hand).any(), "what was dropped came back"
            expected = dense_attention(record, step, mask, scale)
            np.testing.assert_allclose(record.output[step], expected, atol=tolerance)
            own = np.ones((*mask.shape[:2], schedule.tokens[step]), bool)
            at_hand = np.concatenate([mask, own], axis=2)
