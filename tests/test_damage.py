"""What every block of the cache is worth, and the plan that is made of it."""

import json
from dataclasses import replace
from functools import partial
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import message, pack_pictures

import amskv_jax
from amskv_jax.attention import attend
from amskv_jax.calibrate.blocks import Held, Versions, attend_blocks, choice_effects
from amskv_jax.calibrate.damage import Base, block_choices, measure_damage
from amskv_jax.calibrate.effects import Frame, effects, predictions
from amskv_jax.evaluation.score import encode, score
from amskv_jax.generate import picture_keys
from amskv_jax.numbers import numbers_of
from amskv_jax.plan.damage import BlockDamage, DamageRound
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import Optimal
from amskv_jax.policies.budgets import with_saving
from amskv_jax.policies.optimal import allot, block_lives
from amskv_jax.schedule import ScaleSchedule

FORMATS = ("float32", "int8", "int4")
NUMBERS = tuple(map(numbers_of, FORMATS))
ROWS, HEADS, SIZE, SCALE = 2, 3, 16, 0.3
TOKENS = (1, 4, 9)
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
LABELS = np.array([2, 9, 0, 7], np.int32)


def vectors(seed, tokens):
    return jax.random.normal(jax.random.key(seed), (ROWS, tokens, HEADS, SIZE))


@pytest.fixture(scope="module")
def qkv():
    return tuple(vectors(seed, TOKENS[-1]) for seed in range(3))


def held(choice, exact=None):
    pairs = exact or [(vectors(9 + j, n), vectors(19 + j, n)) for j, n in enumerate(TOKENS[:-1])]
    return Held.of([Versions.of(*pair, NUMBERS) for pair in pairs], jnp.asarray(choice))


WHOLE = np.ones((HEADS, 2), np.int32)
MIXED = np.array([[0, 2], [3, 0], [1, 3]], np.int32)


@pytest.mark.parametrize("choice", [WHOLE, MIXED])
def test_attention_sees_what_is_kept_as_it_is_kept(qkv, choice):
    query, key, value = qkv
    found = attend_blocks(qkv, held(choice), SCALE)
    for head in range(HEADS):
        keys, values = [key[:, :, head]], [value[:, :, head]]
        for source, tokens in enumerate(TOKENS[:-1]):
            if kept := choice[head, source]:
                form = NUMBERS[kept - 1]
                for parts, seed in ((keys, 9), (values, 19)):
                    own = vectors(seed + source, tokens)[:, :, head]
                    parts.append(form.decode(form.encode(own), jnp.float32))
        heads = (x[:, :, None] for x in (query[:, :, head], jnp.concatenate(keys, 1)))
        expected = attend(*heads, jnp.concatenate(values, 1)[:, :, None], SCALE)
        chex.assert_trees_all_close(found[:, :, head], expected[:, :, 0], atol=2e-6)


def test_rounding_passes_gradients_on(qkv):
    pairs = [(vectors(9, 4), vectors(19, 4))]

    def loss(pairs, choice):
        return (attend_blocks(qkv, held(choice, pairs), SCALE) ** 2).sum()

    exact = jax.grad(loss)(pairs, np.ones((HEADS, 1), np.int32))
    rounded = jax.grad(loss)(pairs, np.full((HEADS, 1), 2, np.int32))
    chex.assert_trees_all_close(exact, rounded, atol=0.05)
    assert jnp.abs(rounded[0][0]).max() > 0.1


@pytest.mark.parametrize("choice", [WHOLE, MIXED])
def test_effects_are_those_of_making_every_other_choice(qkv, choice):
    gradient = vectors(5, TOKENS[-1])
    found = choice_effects(gradient, qkv, held(choice), SCALE)
    chex.assert_shape(found, (ROWS, HEADS, 2, 1 + len(FORMATS)))
    before = attend_blocks(qkv, held(choice), SCALE)
    for head, source, other in product(range(HEADS), range(2), range(1 + len(FORMATS))):
        changed = choice.copy()
        changed[head, source] = other
        difference = attend_blocks(qkv, held(changed), SCALE) - before
        expected = (gradient * difference).sum((1, 2, 3))
        chex.assert_trees_all_close(found[:, head, source, other], expected, atol=1e-4)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return amskv_jax.load(checkpoint)


@pytest.fixture(scope="module")
def codes(pipe):
    return encode(pipe, PIXELS, batch=4)


@pytest.fixture(scope="module")
def damage(pipe, codes):
    seen = []
    found = measure_damage(
        pipe,
        codes,
        pipe.conditions(LABELS),
        batch=3,
        formats=FORMATS,
        bases=(Base(0.95), Base(0.8, ("float32",))),
        update=lambda what, share: seen.append((what, share)),
    )
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    return found


def stats_of(pipe, damage):
    layers, scales = pipe.shape.num_layers, pipe.schedule.num_scales
    heads = pipe.shape.num_heads
    return LayerStats(
        schedule=pipe.schedule,
        similarity=np.zeros((layers, scales)),
        cosine=np.zeros((layers, scales)),
        head_density=np.full((layers, heads, scales, scales), 1 / scales),
        history_top=np.zeros((layers, scales, 5)),
        fingerprint=pipe.fingerprint,
        damage=damage,
    )


def test_the_cache_of_a_plan_does_what_its_choices_predict(pipe, codes, damage):
    plan = pipe.plan(
        with_saving(Optimal(), 0.9, pipe.shape, stats := stats_of(pipe, damage)), stats
    )
    kept = {part.numbers for row in plan.rows for part in row.parts}
    assert len(kept) > 1, "formats are mixed"
    sampled = score(pipe, {"optimal": plan}, codes, pipe.conditions(LABELS), batch=4)["optimal"]
    frame = Frame(pipe.model, pipe.schedule, pipe.dtype, NUMBERS)
    whole = np.ones((3, 3, 2, 3), np.int32)
    choices = block_choices(plan.rows, pipe.schedule, FORMATS)
    full, found = (predictions(frame, pipe.params, LABELS, codes, x) for x in (whole, choices))
    for scale, (reference, own) in enumerate(zip(full, found, strict=True)):
        expected = (jnp.exp(reference) * (reference - own)).sum(-1).mean(1)
        chex.assert_trees_all_close(
            sampled.divergence.values[:, scale], np.array(expected), atol=2e-6
        )
    assert sampled.divergence.total.mean > 1e-5


def test_damage_is_the_divergence_of_the_changed_cache(pipe, codes):
    copies = 48
    frame = Frame(pipe.model, pipe.schedule, pipe.dtype, NUMBERS)
    labels, many = np.repeat(LABELS[:1], copies), np.repeat(codes[:1], copies, axis=0)
    keys = picture_keys(jax.random.key(0), copies)
    base = np.ones((3, 3, 2, 3), np.int32)
    base[0, 1:, 1, 0] = 0
    full = predictions(frame, pipe.params, labels, many, np.ones_like(base))
    found = effects(frame, pipe.params, labels, many, keys, base, full)
    chex.assert_shape(found.score, (3, 3, copies, 2, 3, 1 + len(FORMATS)))

    def divergence(choices):
        own = predictions(frame, pipe.params, labels[:1], many[:1], choices)
        apart = (jnp.exp(a[:1]) * (a[:1] - b) for a, b in zip(full, own, strict=True))
        return sum(float(x.sum()) for x in apart)

    before = divergence(base)
    assert before == pytest.approx(float(found.divergence[0]), rel=1e-3)
    for layer, head, source in ((0, 0, 1), (1, 1, 1), (2, 0, 0)):
        changed = base.copy()
        changed[layer, 2, head, source] = 0
        where = layer, 2, slice(None), head, source, 0
        linear, scores = float(found.linear[where].mean()), found.score[where]
        curvature = float((scores**2).mean())
        noise = float((scores**2).std()) / np.sqrt(copies)
        expected = divergence(changed) - before
        assert curvature / 2 - linear == pytest.approx(expected, abs=2 * noise, rel=0.2)


def test_rounds(pipe, damage):
    first, second, third = damage.rounds
    assert damage.pictures == len(PIXELS)
    assert first.divergence == pytest.approx(0, abs=1e-6)
    assert second.divergence > 1e-5
    assert second.row_bytes < first.row_bytes
    exact = first.damage[..., 0, -1]
    np.testing.assert_allclose(exact, 0, atol=1e-7)
    never = np.stack([first.damage[:, :, j, :, j + 1] for j in range(2)])
    assert np.ptp(never, axis=-1).max() < 1e-6, "what no step reads has no format"
    assert (never > 0).all()
    assert np.isnan(first.damage[:, :, 1, :, :2]).all()
    assert np.isfinite(first.damage[:, :, 1, :, 2:]).all()
    assert [one.formats for one in damage.rounds] == [(), FORMATS, ("float32",)]
    assert third.divergence > second.divergence, "fewer blocks, as they are larger"


def test_the_nearest_round_is_of_the_formats_that_are_wanted(damage):
    first, second, third = damage.rounds
    alone = damage.of_formats(("float32",))
    assert (alone.formats, alone.pictures) == (("float32",), damage.pictures)
    for own, one in zip(alone.rounds, damage.rounds, strict=True):
        np.testing.assert_array_equal(own.damage, one.damage[:, :, :, :1])
    assert second.made_of == 0
    later = replace(damage, rounds=(first, replace(second, made_of=1), replace(third, made_of=2)))
    assert [later.best(one.row_bytes).formats for one in (first, second)] == [(), FORMATS]
    assert later.best(2 * second.row_bytes).formats == FORMATS
    assert later.of_formats(("float32",)).best(second.row_bytes).formats == ("float32",)
    assert later.of_formats(("float32",)).best(first.row_bytes).formats == ()
    others = later.of_formats(("int4", "int8"))
    assert others.formats == ("int8", "int4"), "in the order in which they were measured"
    assert others.best(third.row_bytes).formats == ("float32",)
    worse = replace(later.rounds[1], divergence=1.0, made_of=0)
    for rounds in (*later.rounds, worse), (first, worse, *later.rounds[1:]):
        both = replace(later, rounds=rounds)
        assert both.rounds.index(both.best(second.row_bytes)) == 1
    for wrong in ("int2",), (), ("int4", "int4"):
        assert "expected some of those which were measured" in message(damage.of_formats, wrong)


def test_formats_can_be_chosen(pipe, damage):
    policy = replace(Optimal(), formats=("float32",))
    plan = policy.plan(pipe.shape, stats_of(pipe, damage))
    assert {part.numbers for row in plan.rows for part in row.parts} == {"float32"}


def test_as_many_blocks_as_the_best_of_all_plans():
    generator = np.random.default_rng(3)
    sizes = np.array([[8, 4, 2], [16, 8, 4]])
    lost = generator.uniform(1, 5, (1, 2, 2))
    kept = lost[..., None] * np.array([0.0, 0.05, 0.3])
    everything = list(product(range(-1, 3), repeat=4))
    for budget in range(0, 60, 3):
        chosen = allot(lost, kept, sizes, budget)
        cost, damage = total(chosen, lost, kept, sizes)
        assert cost <= budget
        options = [total(np.array(x).reshape(lost.shape), lost, kept, sizes) for x in everything]
        least = min(d for c, d in options if c <= budget)
        largest = max(lost.max(), 1)
        assert least <= damage <= least + largest
        # A greedy choice is the best of all for what it spends.
        assert damage == pytest.approx(min(d for c, d in options if c <= cost), abs=0.6)


def total(chosen, lost, kept, sizes):
    cost, damage = 0, 0.0
    for block in np.ndindex(chosen.shape):
        form = chosen[block]
        cost += 0 if form < 0 else sizes[block[-1], form]
        damage += lost[block] if form < 0 else kept[block][form]
    return cost, damage


@pytest.mark.parametrize("saving", [0.4, 0.75, 0.9, 0.97])
def test_plans_keep_to_their_budget(pipe, damage, saving):
    shape, stats = pipe.shape, stats_of(pipe, damage)
    policy = with_saving(Optimal(), saving, shape, stats)
    plan = policy.plan(shape, stats)
    plan.check(shape)
    report = MemoryReport.of(plan, CacheGeometry.of(shape, 1, "bfloat16"))
    assert saving <= report.saving(report.full) < saving + 0.05
    assert RetentionPlan.from_json(plan.to_json()) == plan
    lives = [block_lives(row, shape.schedule, FORMATS) for row in plan.rows]
    assert all((stop > np.arange(1, 3) - 1).all() for _, stop in lives)
    assert "nats a token of divergence expected" in plan.note


def test_more_bytes_do_less_damage(pipe, damage):
    stats = stats_of(pipe, BlockDamage(FORMATS, damage.rounds[:1], 4))
    sizes = np.linspace(0, stats.damage.rounds[0].row_bytes, 9)
    notes = [Optimal(int(size)).plan(pipe.shape, stats).note for size in sizes]
    found = [float(note.split(" nats")[0].split()[-1]) for note in notes]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] == 0


def test_statistics_keep_the_damage(pipe, damage, tmp_path):
    path = tmp_path / "stats.npz"
    stats_of(pipe, damage).save(path)
    again = LayerStats.load(path).damage
    assert again.formats == damage.formats
    assert again.pictures == damage.pictures
    chex.assert_trees_all_equal(*([vars(one) for one in own.rounds] for own in (again, damage)))


def test_bad_input(pipe, codes, damage):
    conditions = pipe.conditions(LABELS)
    needed = "`amskv calibrate --real PICTURES` writes"
    assert needed in message(Optimal().plan, pipe.shape)
    assert needed in message(Optimal().plan, pipe.shape, stats_of(pipe, None))
    assert "must be 0 or more bytes a row, not -1" in message(Optimal, -1)
    measure = partial(measure_damage, pipe, batch=1)
    assert "cannot measure 0 pictures" in message(measure, codes[:0], conditions)
    found = message(measure, codes, conditions, formats=("int5",))
    assert "numbers cannot be cached as 'int5'" in found
    found = message(measure, codes[:3], conditions)
    assert "there are 4 conditions for 3 pictures" in found
    broken = replace(pipe, params=jax.tree.map(lambda leaf: leaf * np.nan, pipe.params))
    found = message(measure_damage, broken, codes, conditions, batch=3, formats=FORMATS)
    assert "predictions are not finite" in found
    wrong = DamageRound(np.zeros((3, 2, 2, 3, 9)), 1, 0.0)
    found = message(stats_of, pipe, BlockDamage(FORMATS, (wrong,), 1))
    assert "(3, 2, 2, 3, 9), not (3, 2, 2, 3, 4)" in found
    other = CacheShape(ScaleSchedule.square((1, 2)), 3, 2, 64)
    assert "calibrate this model" in message(Optimal().plan, other, stats_of(pipe, damage))


def test_the_command(amskv, checkpoint, tmp_path):
    real, stats, out = (tmp_path / name for name in ("real.npz", "stats.npz", "score.json"))
    pack_pictures(real, PIXELS, "abcdefghij", LABELS)
    given = "--checkpoint", checkpoint, "--real", real
    options = "--real-num", 2, "--samples", 2, "--formats", "bfloat16,int4", "--savings", "none"
    done = amskv("calibrate", *given, "--out", stats, *options)
    assert done.code == 0, done
    assert "damage measured on 2 real pictures in" in done.out
    assert LayerStats.load(stats).damage.formats == ("bfloat16", "int4")
    policy = "optimal:saving=0.9"
    done = amskv("score", *given, "--stats", stats, "--policies", policy, "--out", out)
    assert done.code == 0, done
    found = json.loads(out.read_text())["policies"][policy]
    assert found["saving"] >= 0.9
    assert found["divergence"]["mean"] > 0
    for wrong, expected in (
        (("--savings", "1.5"), "--savings '1.5': expected shares from 0 to below 1, or none"),
        (("--savings", "int9:0.9"), "formats of blocks 'int9': expected some of those which were"),
        (("--mesh", "data=2"), "damage is measured on one device: leave out --mesh, or --real"),
        (("--formats", "int5"), "numbers cannot be cached as 'int5'"),
    ):
        done = amskv("calibrate", *given, "--out", tmp_path / "x.npz", "--samples", 1, *wrong)
        assert done.code == 2, done
        assert expected in done.err
        assert not (tmp_path / "x.npz").exists()
    done = amskv("score", *given, "--policies", policy)
    assert done.code == 2, done
    assert "write" in done.err
