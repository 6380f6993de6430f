"""A kind of model that no other file knows: what it takes to be drawn by the shared loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_stats import random_stats

from amskv_jax.attention import QKV, attend
from amskv_jax.benchmark import measure
from amskv_jax.calibrate.attention import measure_attention
from amskv_jax.decode import decode
from amskv_jax.drawing import Chosen
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.evaluation.score import encode, score
from amskv_jax.generate import Sampler, picture_keys, program
from amskv_jax.models.guidance import UNGUIDED, Controls, Drawing, Guidance, per_scale
from amskv_jax.models.protocol import Prepared
from amskv_jax.pipeline import Pipeline
from amskv_jax.plan.shape import BlockShape, CacheShape
from amskv_jax.policies import REGISTRY, Full
from amskv_jax.sampling import TokenSampling
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.testing import Recorder, check_obeyed, layer_records, sample

SCHEDULE = ScaleSchedule(((1, 2), (2, 2), (2, 4), (4, 4)))
DIGITS, CHOICES, WIDTH, DEPTH, HEADS = 3, 5, 16, 3, 2
"""A token has three digits of five values each: neither VAR's codebook nor Infinity's bits."""
POLICIES = {  # options where the defaults do not fit so small a schedule
    "ams": {"c_min": 4, "c_max": 8, "condensed": 1},
    "ams-online": {"c_min": 4, "c_max": 8, "condensed": 1, "theta": -1.0},
    "ams-fitted": {"max_tokens": 20},
    "optimal": {"row_bytes": 1500},
    "window": {"window": 5},
    "sink": {"sink": 1, "window": 3},
    "h2o": {"budget": 5},
    "scalekv": {"budget": 6, "window": 1},
    "heads": {"budget": 6, "protected": 1},
    "heatkv": {"budget": 0.5, "protected": 1},
}


@dataclass(frozen=True)
class Colours:
    """Two numbers to draw for: the condition is a mapping of two leaves."""

    pairs: tuple[tuple[float, float], ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, numbers: np.ndarray) -> Any:
        chosen = np.array(self.pairs, np.float32)[numbers % len(self.pairs)]
        return {"warm": chosen[:, 0], "cold": chosen[:, 1]}

    def classes(self, numbers: np.ndarray) -> None:
        return None

    def captions(self, classes: Sequence[str]) -> list[str]:
        return [f"{warm:g}/{cold:g}" for warm, cold in self.pairs]


@dataclass(frozen=True)
class ToyTransformer:
    params: Any
    attention_scale: float = 0.5

    def prepare(self, condition: Any, guidance: Guidance) -> Prepared:
        given = jnp.stack([condition["warm"], condition["cold"]], axis=-1)
        rows = guidance.pair(given, jnp.zeros_like(given)) @ self.params["colours"]
        start = jnp.broadcast_to(rows[:, None], (len(rows), SCHEDULE.tokens[0], WIDTH))
        start = start + self.params["positions"][None, : SCHEDULE.tokens[0]]
        return Prepared(start=start, layers=self.params["blocks"], shared=rows)

    def block(self, layer, shared, x, step, attention):
        qkv = jnp.tanh(x + shared[:, None]) @ layer["qkv"]
        query, key, value = jnp.split(qkv.reshape(*x.shape[:2], 3 * HEADS, -1), 3, axis=2)
        output, carry = attention(QKV(query, key, value))
        return x + output.reshape(x.shape) + 0.1 * step * layer["step"][None, None], carry

    def some_rows(self, layer, shared, take):
        return layer, take(shared)

    def next_input(self, features, step):
        own = self.params["positions"][None, SCHEDULE.slice(step)]
        return features @ self.params["features"] + own

    def logits(self, x, shared):
        return (x @ self.params["head"]).reshape(*x.shape[:2], DIGITS, CHOICES)


@dataclass(frozen=True)
class ToyTokenizer:
    params: Any

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (*SCHEDULE.grids[-1], DIGITS)

    @property
    def activation_bytes(self) -> int:
        return 4 * 16 * DIGITS

    def encode(self, pictures):
        rest, codes = 2 * pictures, []
        for step, grid in enumerate(SCHEDULE.grids):
            maps = jax.image.resize(rest, (len(rest), *grid, DIGITS), "linear")
            nearest = jnp.clip(jnp.rint(maps), -2, 2).astype(jnp.int32) + 2
            codes.append(nearest.reshape(len(rest), -1, DIGITS))
            rest = rest - self.accumulate(jnp.zeros_like(rest), self.embed(codes[-1]), step)
        return jnp.concatenate(codes, axis=1)

    def embed(self, codes):
        return codes.astype(jnp.float32) - 2

    def embed_mixture(self, weights):
        return weights @ jnp.arange(-2.0, 3.0)

    def accumulate(self, latent, entries, step):
        maps = entries.reshape(len(entries), *SCHEDULE.grids[step], DIGITS)
        return latent + jax.image.resize(maps, latent.shape, "nearest")

    def next_input(self, latent, step):
        grid = SCHEDULE.grids[step + 1]
        smaller = jax.image.resize(latent, (len(latent), *grid, DIGITS), "nearest")
        return smaller.reshape(len(latent), -1, DIGITS)

    def decode(self, latent):
        return jnp.tanh(latent * self.params["gain"])


@dataclass(frozen=True)
class ToyModel:
    kind: ClassVar[str] = "toy"
    takes: ClassVar[str] = "colours"
    drawing: ClassVar[Drawing] = Drawing(cfg=2.0, top_k=0, top_p=0.0)
    schedule: ScaleSchedule = SCHEDULE

    @property
    def parts(self) -> Mapping[str, Any]:
        return {"transformer": self, "tokenizer": self}

    def check_schedule(self, schedule: ScaleSchedule) -> None:
        if schedule != SCHEDULE:
            raise AmskvError(f"the toy draws {SCHEDULE} only")

    def find_schedule(self, aspect: str | None, size: str | None) -> ScaleSchedule:
        return SCHEDULE

    def forced(self, codes: np.ndarray, schedule: ScaleSchedule) -> np.ndarray:
        return codes

    def held_bytes(self, rows: int, condition: Any, dtype: str) -> Mapping[str, int]:
        return {}

    def cache_shape(self, schedule: ScaleSchedule) -> CacheShape:
        return CacheShape(schedule, DEPTH, HEADS, WIDTH // HEADS)

    @property
    def block_shape(self) -> BlockShape:
        return BlockShape(WIDTH, 0, DIGITS * CHOICES)

    def picture_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        return schedule.grids[-1]

    def bind(self, params: Any, schedule: ScaleSchedule, dtype: str) -> Any:
        return ToyTransformer(params.get("transformer")), ToyTokenizer(params["tokenizer"])

    def conditions(self, wanted: Any) -> Colours:
        return Colours(((1.0, 0.0), (0.0, 1.0), (0.5, -1.0)) if wanted is None else tuple(wanted))

    def guidance(self, drawing: Drawing) -> Guidance:
        return (
            Guidance.at(drawing.guide, DEPTH) if np.any(np.not_equal(drawing.cfg, 1)) else UNGUIDED
        )

    def controls(self, schedule: ScaleSchedule, drawing: Drawing) -> Controls:
        strength, tau = (
            jnp.asarray(per_scale(x, schedule, what))
            for x, what in ((drawing.cfg, "cfg"), (drawing.tau, "tau"))
        )
        return Controls(strength, tau)


MODEL = ToyModel()
SHAPES = {
    "transformer": {
        "colours": (2, WIDTH),
        "positions": (SCHEDULE.total, WIDTH),
        "features": (DIGITS, WIDTH),
        "head": (WIDTH, DIGITS * CHOICES),
        "blocks": {"qkv": (DEPTH, WIDTH, 3 * WIDTH), "step": (DEPTH, WIDTH)},
    },
    "tokenizer": {"gain": ()},
}


@pytest.fixture(scope="module")
def pipe():
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape) / 3, jnp.float32),
        SHAPES,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    return Pipeline(MODEL, params, SCHEDULE, "float32", MODEL.drawing)


def teacher_forced(params, condition, tokens, step):
    """Logits of the conditional rows at one step, all earlier keys at hand: no cache, no loop."""
    transformer, tokenizer = MODEL.bind(params, SCHEDULE, "float32")
    prepared = transformer.prepare(condition, UNGUIDED)
    latent, x = jnp.zeros((len(tokens), *tokenizer.latent_shape)), prepared.start
    past = [([], []) for _ in range(DEPTH)]
    for earlier in range(step + 1):
        for layer in range(DEPTH):

            def attention(qkv, layer=layer):
                keys, values = past[layer]
                keys.append(qkv.key)
                values.append(qkv.value)
                whole = jnp.concatenate(keys, 1), jnp.concatenate(values, 1)
                return attend(qkv.query, *whole, transformer.attention_scale), None

            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], prepared.layers)
            x, _ = transformer.block(own, prepared.shared, x, earlier, attention)
        if earlier == step:
            return transformer.logits(x, prepared.shared)
        entries = tokenizer.embed(tokens[:, SCHEDULE.slice(earlier)])
        latent = tokenizer.accumulate(latent, entries, earlier)
        x = transformer.next_input(tokenizer.next_input(latent, earlier), earlier + 1)
    return None


def test_it_draws_codes_with_an_axis_of_their_own(pipe):
    key = jax.random.key(3)
    samples = pipe.sample(None, key=key, cfg=1.0, top_k=1)
    chex.assert_shape(samples.tokens, (3, SCHEDULE.total, DIGITS))
    chex.assert_shape(samples.pictures, (3, 4, 4, 3))
    condition = pipe.conditions(None).batch(np.arange(3))
    for step in range(SCHEDULE.num_scales):
        logits = teacher_forced(pipe.params, condition, samples.tokens, step)
        drawn = samples.tokens[:, SCHEDULE.slice(step)]
        np.testing.assert_array_equal(drawn, jnp.argmax(logits, -1))


def test_guidance_temperature_and_mixtures_reach_it(pipe):
    key, plain = jax.random.key(3), pipe.sample(None, key=jax.random.key(3))
    for drawing in (
        {"cfg": 6.0},
        {"cfg": (1.0, 2.0, 3.0, 9.0)},
        {"tau": 0.2},
        {"guide": (0, -2)},
        {"more_smooth": True},
    ):
        other = pipe.sample(None, key=key, **drawing)
        assert np.isfinite(other.pictures).all()
        assert (np.asarray(other.latent) != np.asarray(plain.latent)).any(), drawing
    with pytest.raises(UsageError, match="tau has 2 numbers"):
        pipe.sample(None, key=key, tau=(1.0, 2.0))


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "explicit"])
def test_it_runs_under_every_policy(pipe, name):
    policy = REGISTRY[name](**POLICIES.get(name, {}))
    stats = random_stats(0, SCHEDULE, DEPTH, HEADS, damage=True)
    plan = policy.plan(pipe.shape, stats)
    condition = pipe.conditions(None).batch(np.arange(2))
    keys = picture_keys(jax.random.key(0), 2)
    with jax.disable_jit():
        samples = sample(MODEL, plan, pipe.params, condition, keys, observe=Recorder(), trace=True)
    assert np.isfinite(samples.logits).all()
    check_obeyed(plan, layer_records(samples.observed), 0.5, 1e-5)


def test_it_is_calibrated_measured_and_drawn_in_batches(pipe, monkeypatch):
    stats = measure_attention(pipe, pipe.conditions(None), count=3, batch=2)
    chex.assert_shape(stats.head_density, (DEPTH, HEADS, SCHEDULE.num_scales, SCHEDULE.num_scales))
    np.testing.assert_allclose(stats.head_density.sum(-1), 1, atol=1e-5)

    conditions, controls = Chosen(pipe.conditions(None), (2, 0)), pipe.controls()
    drawer = pipe.drawer(pipe.sampler(), conditions, 2)
    pictures = drawer.draw(pipe.params, 7, 0, 5, controls)
    assert pictures.shape == (5, 4, 4, 3)
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(drawer.draw(pipe.params, 7, 3, 1, controls)[0], pictures[3])
    assert conditions.captions(()) == ["0.5/-1", "1/0"]

    monkeypatch.setattr("amskv_jax.benchmark.random_params", lambda *given, **options: pipe.params)
    plan = Full().plan(pipe.shape)
    found = measure(Sampler(MODEL, plan, sampling=TokenSampling(1)), batch=2, repeats=1)
    assert found.pictures_per_second > 0


def test_real_pictures_are_scored_with_all_digits(pipe):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    codes = encode(pipe, pixels, batch=2)
    assert codes.shape == (3, SCHEDULE.total, DIGITS)
    assert len(np.unique(codes)) > 2
    conditions = pipe.conditions(None)
    plans = {"full": pipe.plan(Full()), "window": pipe.plan(REGISTRY["window"](window=3))}
    scores = score(pipe, plans, codes, conditions, batch=2)
    condition = conditions.batch(np.arange(3))
    for step, found in enumerate(scores["full"].entropy.scales):
        logits = np.asarray(teacher_forced(pipe.params, condition, codes, step), np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        true = codes[:, SCHEDULE.slice(step), :, None].astype(int)
        nats = -np.log(np.take_along_axis(chances, true, -1))[..., 0].sum(-1)
        assert found.mean == pytest.approx(nats.mean(), abs=1e-5)
    window = scores["window"]
    assert window.divergence.total.mean > 1e-3
    per_code = window.bits_per_code(window.entropy).total.mean
    assert per_code == pytest.approx(window.entropy.total.mean / DIGITS / np.log(2))


def test_equal_ways_of_drawing_compile_once(pipe):
    key = jax.random.key(0)
    pipe.sample(None, key=key, cfg=2.0)
    compiled, decoders = program("cpu")._cache_size(), decode._cache_size()
    pipe.sample(((0.1, 0.2), (0.3, 0.4), (0.5, 0.6)), key=jax.random.key(1), cfg=3.0, tau=0.5)
    assert program("cpu")._cache_size() == compiled
    # Another plan has another sampler, and the same decoder.
    pipe.sample(None, key=key, policy=REGISTRY["window"](window=3))
    assert program("cpu")._cache_size() == compiled + 1
    assert decode._cache_size() == decoders


def test_another_schedule_is_refused(pipe):
    other = ScaleSchedule.square((1, 2))
    with pytest.raises(AmskvError, match="the toy draws"):
        Sampler(MODEL, Full().plan(MODEL.cache_shape(other)))
