"""For tests of this package and of what is built on it: tiny models, and a look into the cache.

The models compile in a second or two. The recorder looks into a sampler's attention while it draws,
and says in NumPy what it should have been.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from amskv_jax.attention import QKV
from amskv_jax.cache.heads import HeadSlots
from amskv_jax.cache.layout import slots_of
from amskv_jax.cache.store import Slots, Store
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.decode import decode
from amskv_jax.generate import Sampler, Samples, picture_keys
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.protocol import Model
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.numbers import NUMBERS, Numbers
from amskv_jax.plan.mixed import MixedRow
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import HeadRow, Row, StaticRow
from amskv_jax.plan.runtime_rows import OnlineRow, SelectingRow
from amskv_jax.sampling import TokenSampling
from amskv_jax.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.square((1, 2, 3))
VAR_FIELDS: dict[str, Any] = {
    "schedule": SCHEDULE,
    "num_classes": 10,
    "vocab_size": 64,
    "latent_channels": 16,
}
VQVAE_FIELDS: dict[str, Any] = {
    "schedule": SCHEDULE,
    "vocab_size": 64,
    "latent_channels": 16,
    "channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
}
TRANSFORMER = VARConfig(3, 128, 2, **VAR_FIELDS)
TOKENIZER = VQVAEConfig(**VQVAE_FIELDS)
TINY_VAR = VARModel(TRANSFORMER, TOKENIZER)
TINY_INFINITY = InfinityModel(
    InfinityConfig(
        depth=3,
        width=64,
        num_heads=2,
        bits=4,
        schedule=ScaleSchedule.square((1, 2, 4)),  # the first scales of the square pictures
        text_channels=32,
        text_maxlen=16,
    ),
    BSQConfig(codebook_dim=4, channels=32, channel_multipliers=(1, 1), num_res_blocks=1),
)


def sample(
    model: Model,
    plan: RetentionPlan,
    params: Any,
    condition: Any,
    keys: jax.Array,
    drawing: Drawing | None = None,
    **options: Any,
) -> Samples:
    """Draw once with a plan.

    Args:
      model: the model.
      plan: what the cache keeps.
      params: the weights.
      condition: what to draw, [B, ...].
      keys: [B] PRNG keys.
      drawing: how; greedy with the model's own guidance if not given.
      **options: further arguments of ``Sampler``.

    Returns:
      The samples, without pictures.
    """
    drawing = drawing or replace(model.drawing, top_k=1, top_p=0.0)
    sampling = TokenSampling(drawing.top_k, drawing.top_p, drawing.more_smooth)
    sampler = Sampler(model, plan, model.guidance(drawing), sampling, **options)
    samples: Samples = sampler(params, condition, keys, model.controls(plan.schedule, drawing))
    return samples


def with_pictures(model: Model, plan: RetentionPlan, params: Any, samples: Samples) -> Samples:
    """Return samples with their pictures, decoded in float32."""
    pictures = decode(model, plan.schedule, "float32", params, samples.latent)
    return replace(samples, pictures=pictures)


@dataclass(frozen=True)
class Recorder:
    """Records what every layer attends with and what it gets; see ``stack.Observer``."""

    per_row: ClassVar[bool] = True

    def __call__(
        self, slots: Slots, cache: Any, layer: jax.Array, step: int, qkv: QKV, scale: float
    ) -> Any:
        """Return queries, keys, values, the output and the layer's cache before the step."""
        output, _ = slots.attend(cache, layer, step, qkv, scale, "xla")
        if not isinstance(slots, HeadSlots):
            cache = jax.tree.map(lambda leaf: leaf[layer], cache)
        return *qkv[:3], output, cache


@dataclass(frozen=True)
class LayerRecord:
    """One layer's run.

    Attributes:
      query: per step [rows, T, heads, head_dim], like key, value and output.
      key: see there.
      value: see there.
      output: see there.
      cache: per step, what the layer's buffers held before it; if its row is pooled, those of all
        such layers.
    """

    query: list[np.ndarray]
    key: list[np.ndarray]
    value: list[np.ndarray]
    output: list[np.ndarray]
    cache: list[Any]


def layer_records(observed: Sequence[Any]) -> list[LayerRecord]:
    """Sort what ``Recorder`` returned (``Samples.observed``) by layer; numbers become float32."""
    layers = []
    for number in range(len(observed[0])):
        for index in range(len(observed[0][number][0])):
            picked = [_layer(step[number], index) for step in observed]
            layers.append(LayerRecord(*map(list, zip(*picked, strict=True))))
    return layers


def drive(
    row: Row,
    schedule: ScaleSchedule,
    scale: float,
    *,
    heads: int = 2,
    head_dim: int = 8,
    seed: int = 0,
    numbers: Numbers = NUMBERS["float32"],
) -> LayerRecord:
    """Run one layer with this row on random queries, keys and values of two batch rows."""
    slots = slots_of([row], schedule, Store(numbers))
    random = np.random.default_rng(seed)
    given = [
        QKV(*random.standard_normal((3, 2, tokens, heads, head_dim)).astype(np.float32))
        for tokens in schedule.tokens
    ]

    @jax.jit
    def run(given: list[QKV]) -> list[Any]:
        cache, layer = slots.init(1, 2, heads, head_dim), jnp.int32(0)
        record, steps = Recorder(), []
        for step, qkv in enumerate(given):
            steps.append(record(slots, cache, layer, step, qkv, scale))
            _, cache = slots.attend(cache, layer, step, qkv, scale, "xla")
        return steps

    columns = zip(*[jax.tree.map(np.asarray, step) for step in run(given)], strict=True)
    return LayerRecord(*map(list, columns))


def draw_records(plan: RetentionPlan) -> tuple[list[LayerRecord], float]:
    """Draw two pictures with a tiny VAR and this plan; return the records, and the logits' scale.

    The layers' rows must be equal, or of so few runs that each is scanned alone.
    """
    transformer = VARConfig(plan.num_layers, 32, 2, plan.schedule, 5, 32, 8)
    model = VARModel(transformer, VQVAEConfig(plan.schedule, 32, 8, 32, (1,), 1))
    params = random_params(model, seed=3)
    keys, labels = picture_keys(jax.random.key(2), 2), np.array([0, 4], np.int32)
    drawing = Drawing(cfg=2.0, top_k=0, top_p=0.0)
    samples = sample(model, plan, params, labels, keys, drawing, observe=Recorder())
    return layer_records(samples.observed), transformer.attention_scale


def _layer(stacked: Any, index: int) -> Any:
    def pick(leaf: jax.Array) -> np.ndarray:
        return np.asarray(leaf[index], None if leaf.dtype == bool else np.float32)

    return jax.tree.map(pick, stacked)


def read_mask(row: Row, schedule: ScaleSchedule, record: LayerRecord, step: int) -> np.ndarray:
    """Return which earlier tokens a layer reads at ``step``, [rows, heads, offset of the step].

    For tokens chosen while drawing, this is found out by comparing the cached keys with those of
    all earlier tokens, and it is checked that their number is the planned one.
    """
    rows, _, heads, _ = record.query[0].shape
    mask = _MASKS[type(row)](row, schedule, record, step)
    return np.broadcast_to(mask, (rows, heads, schedule.offsets[step]))


def _static(row: Any, schedule: ScaleSchedule, record: LayerRecord, step: int) -> np.ndarray:
    kept: np.ndarray = row.positions(schedule, step)[: schedule.offsets[step]]
    return kept


def _heads(row: Any, schedule: ScaleSchedule, record: LayerRecord, step: int) -> np.ndarray:
    kept: np.ndarray = row.positions(schedule, step)[:, : schedule.offsets[step]]
    return kept


def _online(row: Any, schedule: ScaleSchedule, record: LayerRecord, step: int) -> np.ndarray:
    per_token = np.repeat(record.cache[step].visible[:step], schedule.tokens[:step])
    assert per_token.sum() <= row.c_max
    return per_token


def _selected(row: Any, schedule: ScaleSchedule, record: LayerRecord, step: int) -> np.ndarray:
    rows, _, heads, head_dim = record.query[0].shape
    past = np.concatenate([np.zeros((rows, 0, heads, head_dim)), *record.key[:step]], axis=1)
    mask = np.zeros((rows, heads, past.shape[1]), bool)
    if not row.counts[step]:
        return mask
    for batch_row in range(rows):
        for head in range(heads):
            cached = record.cache[step].tokens.keys[batch_row, : row.counts[step], head]
            equal = (cached[:, None] == past[batch_row, None, :, head]).all(-1)
            assert (equal.sum(1) == 1).all(), "a cached key is no key of an earlier token"
            positions = equal.argmax(1)
            assert (np.diff(positions) > 0).all(), "the cache is in the order of the sequence"
            mask[batch_row, head, positions] = True
    return mask


_MASKS: dict[type, Callable[..., np.ndarray]] = {
    StaticRow: _static,
    HeadRow: _heads,
    MixedRow: _heads,
    OnlineRow: _online,
    SelectingRow: _selected,
}


def as_read(row: Row, schedule: ScaleSchedule, record: LayerRecord, step: int) -> LayerRecord:
    """Return the record with earlier keys and values as ``step`` reads them.

    Where a row names formats of numbers they have been through the token's; else they stay.
    """

    def through(numbers: str, part: np.ndarray) -> np.ndarray:
        codes = NUMBERS[numbers].encode(jnp.asarray(part))
        return np.asarray(NUMBERS[numbers].decode(codes, jnp.float32))

    def read(parts: list[np.ndarray]) -> list[np.ndarray]:
        found = list(parts)
        for numbers, part in row.parts:
            if numbers is None:
                continue
            mask = read_mask(part, schedule, record, step)
            for scale in range(step):
                kept = np.swapaxes(mask[:, :, schedule.slice(scale)], 1, 2)[..., None]
                found[scale] = np.where(kept, through(numbers, parts[scale]), found[scale])
        return found

    return replace(record, key=read(record.key), value=read(record.value))


def dense_attention(record: LayerRecord, step: int, mask: np.ndarray, scale: float) -> np.ndarray:
    """Return attention of one step over all tokens so far, those outside ``mask`` masked away.

    Returns:
      [rows, T, heads, head_dim] float64.
    """
    query = record.query[step].astype(np.float64)
    keys, values = (
        np.concatenate(parts[: step + 1], axis=1) for parts in (record.key, record.value)
    )
    mask = np.concatenate([mask, np.ones((*mask.shape[:2], query.shape[1]), bool)], axis=2)
    logits = scale * np.einsum("btnh,bsnh->bnts", query, keys)
    logits = np.where(mask[:, :, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended: np.ndarray = np.einsum("bnts,bsnh->btnh", weights, values)
    return attended


def check_obeyed(
    plan: RetentionPlan, records: Sequence[LayerRecord], scale: float, tolerance: float
) -> None:
    """Check that every layer attended to what the plan keeps alone, and that nothing came back."""
    schedule = plan.schedule
    for row, record in zip(plan.rows, records, strict=True):
        at_hand = None
        for step in range(schedule.num_scales):
            mask = read_mask(row, schedule, record, step)
            if at_hand is not None:
                assert not (mask & ~at_hand).any(), "what was dropped came back"
            expected = dense_attention(as_read(row, schedule, record, step), step, mask, scale)
            np.testing.assert_allclose(record.output[step], expected, atol=tolerance)
            own = np.ones((*mask.shape[:2], schedule.tokens[step]), bool)
            at_hand = np.concatenate([mask, own], axis=2)
