"""Rows in several formats of numbers: against a slow oracle, their codes, bytes and drawings."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stats import cache_shape, random_stats

from amskv_jax import configs
from amskv_jax.attention import QKV
from amskv_jax.cache.layout import CacheLayout, slots_of
from amskv_jax.cache.store import Store
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.generate import picture_keys
from amskv_jax.numbers import NUMBERS, Plain
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.mixed import MixedRow, mixed_row
from amskv_jax.plan.retention import ROWS, RetentionPlan
from amskv_jax.plan.rows import HeadRow, Part, StaticRow
from amskv_jax.policies import H2O, Explicit
from amskv_jax.policies.heads import head_row
from amskv_jax.reports.analysis import plan_blocks
from amskv_jax.schedule import VAR_256, ScaleSchedule
from amskv_jax.testing import TINY_INFINITY, TINY_VAR, check_obeyed, drive, sample

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SMALL = ScaleSchedule.square((1, 2, 3, 4))
OBLONG = ScaleSchedule(((1, 1), (2, 3), (3, 5), (2, 2), (4, 7), (3, 3)))
FORMATS = ("float32", "bfloat16", "int8", "int4", "int2")
EXACT = sorted(FORMATS, key=lambda name: -NUMBERS[name].bytes(64))


@st.composite
def mixed_rows(draw, heads, formats=("bfloat16", "int8", "int4")):
    """Rows of which every token has a format by chance, and is dropped some time by chance."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owner = random.integers(0, len(formats), (heads, SMALL.total))
    alive, kept = np.zeros((heads, SMALL.total), bool), []
    for step in range(SMALL.num_scales):
        kept.append(alive.copy())
        alive[:, SMALL.slice(step)] = True
        alive &= random.random(alive.shape) < 0.8
    parts = []
    for index, name in enumerate(formats):
        own = [[(at & (owner == index))[head] for at in kept] for head in range(heads)]
        row = HeadRow(tuple(StaticRow.from_positions(SMALL, steps) for steps in own))
        parts.append(Part(name, row))
    return MixedRow(tuple(parts))


@st.composite
def tables(draw):
    """A schedule, formats and last steps of its blocks, and blocks to lend slots to."""
    schedule = draw(st.sampled_from([SMALL, OBLONG, VAR_256, ScaleSchedule.square((1, 3))]))
    heads, sources = draw(st.integers(1, 4)), schedule.num_scales - 1
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = [None, *random.choice(FORMATS, random.integers(1, 4))]
    formats = [[names[i] for i in own] for own in random.integers(0, len(names), (heads, sources))]
    last = random.integers(0, sources + 1, (heads, sources))
    blocks = [(int(a), int(b)) for a, b in random.permutation([*np.ndindex(heads, sources)])]
    return schedule, formats, last, blocks[: random.integers(0, len(blocks) + 1)]


def kept_by_oracle(schedule, formats, last, lend):
    """The format of every (head, scale, step) that is kept, token count by token count."""
    tokens, steps = schedule.tokens, schedule.num_scales
    kept = {}
    for head, own in enumerate(formats):
        for scale, name in enumerate(own):
            for step in range(scale + 1, last[head][scale] + 1):
                if name is not None:
                    kept[head, scale, step] = name

    def held(name, step):
        return sum(tokens[s] for (_, s, t), n in kept.items() if (n, t) == (name, step))

    capacity = {name: max(held(name, step) for step in range(steps)) for name in FORMATS}
    for head, scale in lend:
        own = [step for step in range(steps) if (head, scale, step) in kept]
        start = own[-1] + 1 if own else scale + 1
        best = []
        for name in [kept[head, scale, own[0]]] if own else EXACT:
            lent = []
            for step in range(start, steps):
                if held(name, step) + tokens[scale] > capacity[name]:
                    break
                lent.append((step, name))
            best = max(best, lent, key=len)
        for step, name in best:
            kept[head, scale, step] = name
    return kept


@given(tables())
@settings(deadline=None)
def test_rows_of_tables_are_those_of_the_oracle(tables):
    schedule, formats, last, lend = tables
    row = mixed_row(schedule, formats, last, lend)
    row.check(schedule, "the layer")
    found = {
        (head, segment.scale, step): name
        for name, part in row.parts
        for head, static in enumerate(part.heads)
        for step, segments in enumerate(static.keep)
        for segment in segments
    }
    assert found == kept_by_oracle(schedule, formats, last, lend)
    bare = mixed_row(schedule, formats, last)
    heads = len(formats)
    slots, fewer = (
        {name: part.head_slots(heads) for name, part in made.parts} for made in (row, bare)
    )
    assert slots == fewer, "lending takes slots that are there already"


@given(st.lists(st.booleans(), min_size=9, max_size=9), st.sampled_from(FORMATS))
def test_lending_to_the_latest_of_one_head_is_that_of_heads(chosen, name):
    formats = [[name if kept else None for kept in chosen]]
    row = mixed_row(VAR_256, formats, lend=[(0, scale) for scale in reversed(range(9))])
    assert [part.row.heads for part in row.parts] == [(head_row(VAR_256, np.array(chosen)),)]


@given(tables())
@settings(deadline=None, max_examples=30)
def test_plans_are_read_as_they_were_written_and_allocated_to_the_byte(tables):
    schedule, formats, last, lend = tables
    heads = len(formats)
    rows = mixed_row(schedule, formats), mixed_row(schedule, formats, last, lend)
    plan = RetentionPlan(schedule, (*rows, rows[0]), "by chance")
    assert RetentionPlan.from_json(plan.to_json()) == plan
    plan.check(cache_shape(schedule, 3, heads))
    for name in ("float32", "int4"):
        layout = CacheLayout.of(plan, Store(NUMBERS[name]))
        caches = jax.eval_shape(lambda layout=layout: layout.init(4, heads, 16))
        allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
        assert allocated == MemoryReport.of(plan, CacheGeometry(4, heads, 16, NUMBERS[name])).plan


def test_bytes_are_those_of_every_format():
    """Three heads keep 1 token as int8; two of them 4 as int4, of which 1 format slot is lent."""
    formats = [["int8", "int4", None], ["int8", "int4", None], ["int8", None, None]]
    row = mixed_row(SMALL, formats, [[3, 2, 0]] * 3, lend=[(1, 1), (2, 2)])
    report = MemoryReport.of(RetentionPlan(SMALL, (row,) * 2), CacheGeometry(5, 3, 16))
    assert report.plan == 2 * 5 * 2 * (3 * (16 + 2) + 8 * (8 + 2))
    assert row.kept_tokens == pytest.approx((0, 1, 11 / 3, 7 / 3))
    assert row.capacity == 5
    shares = row.shares(SMALL)
    np.testing.assert_allclose(shares[:3, 1:], [[1, 1, 1], [0, 2 / 3, 1 / 3], [0, 0, 0]])


def test_a_layer_may_keep_nothing():
    row = mixed_row(SMALL, [[None] * 3] * 2, lend=[(0, 1)])
    assert row.head_slots(2) == 0
    check_obeyed(RetentionPlan(SMALL, (row,)), [drive(row, SMALL, 0.7)], 0.7, 1e-5)


def test_heads_of_equal_length_and_steps_of_one_format():
    formats = [["int8", "int4", "int4"], ["int8", "int8", "int4"]]
    row = mixed_row(SMALL, formats)
    reading = slots_of((row,), SMALL, Store(NUMBERS["float32"])).tables.reading
    assert [(at.even, at.equal) for at in reading] == [(True, True)] * 4
    assert [at.buffers for at in reading] == [(), (0,), (0, 1), (0, 1)]
    check_obeyed(RetentionPlan(SMALL, (row,)), [drive(row, SMALL, 0.7)], 0.7, 1e-5)


@given(mixed_rows(2))
@settings(deadline=None, max_examples=3)
def test_tokens_keep_the_codes_that_were_written_first_and_are_read_through_them(row):
    """Before the last step, bit for bit, wherever a token lies; and attention at every step."""
    record = drive(row, SMALL, 0.7, head_dim=16)
    check_obeyed(RetentionPlan(SMALL, (row,)), [record], 0.7, 1e-5)
    slots = slots_of((row,), SMALL, Store(NUMBERS["float32"]))
    found, last = np.asarray(slots.tables.reading[-1].slots.at(0)), SMALL.num_scales - 1
    formats = row.formats(SMALL, last)
    first = np.cumsum([0, *slots.tables.capacities])
    pairs = (jnp.concatenate(x[:last], axis=1) for x in (record.key, record.value))
    written = jnp.stack(list(pairs), axis=3)
    for head, own in enumerate(formats):
        kept = np.flatnonzero(own >= 0)
        for token, slot in zip(kept, found[head], strict=False):
            numbers = NUMBERS[row.parts[own[token]].numbers]
            codes = jax.tree.leaves(numbers.encode(written[:, token, head]))
            buffers = jax.tree.leaves(record.cache[-1][own[token]])
            for leaf, expected in zip(buffers, codes, strict=True):
                bits = np.asarray(expected).view(leaf.dtype)
                np.testing.assert_array_equal(leaf[slot - first[own[token]]], bits)


def test_only_what_is_stored_is_coded():
    """What is rounded are one head's four tokens, though there are two heads and two formats."""
    row = mixed_row(SMALL, [["int4", None, None], [None, "int8", None]])
    slots = slots_of((row,), SMALL, Store(NUMBERS["float32"]))
    qkv = QKV(*[jnp.zeros((2, 4, 2, 16))] * 3)
    program = jax.make_jaxpr(slots.attend, static_argnums=(2, 4, 5))
    text = str(program(slots.init(1, 2, 2, 16), jnp.int32(0), 1, qkv, 0.7, "xla"))
    rounds = [line for line in text.splitlines() if "= round[" in line]
    assert rounds
    assert all("f32[4,2,16] = round" in line for line in rounds)


@pytest.mark.parametrize("model", [TINY_VAR, TINY_INFINITY], ids=["var", "infinity"])
def test_equal_formats_draw_what_heads_draw(model, monkeypatch):
    """Two buffers of float32 numbers in place of one; layers take turns in one scan."""
    monkeypatch.setitem(NUMBERS, "float32, too", Plain("float32"))
    model = replace(model, transformer=replace(model.transformer, depth=6))
    schedule, random = model.schedule, np.random.default_rng(0)
    shape = 6, model.transformer.num_heads, schedule.num_scales - 1
    formats = random.choice(np.array(["float32", "float32, too"], object), shape)
    last = random.integers(1, shape[2] + 1, shape)
    mixed = [mixed_row(schedule, *both) for both in zip(formats, last, strict=True)]
    alike = [mixed_row(schedule, [["float32"] * shape[2]] * shape[1], own) for own in last]
    heads = tuple(row.parts[0].row for row in alike)
    assert sum(len(row.parts) for row in mixed) > 6
    assert len(set(heads)) > 4
    params, condition = random_params(model, seed=1), model.conditions(None).batch(np.arange(2))

    def draw(rows, cache_dtype):
        plan, keys = RetentionPlan(schedule, rows), picture_keys(jax.random.key(0), 2)
        options = {"trace": True, "cache_dtype": cache_dtype}
        return sample(model, plan, params, condition, keys, **options)

    expected, found = draw(heads, "float32"), draw(tuple(mixed), "int2")
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)


def test_plan_files(tmp_path):
    row = mixed_row(SMALL, [["int8", "int4", None], ["int8", None, "int4"]])
    plan = RetentionPlan(SMALL, (row,) * 2)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert Explicit(str(path)).plan(cache_shape(SMALL, 2, 2)) == plan
    with pytest.raises(AmskvError, match=r"plan\.json: .* for 2 heads a layer, the model has 3"):
        Explicit(str(path)).plan(cache_shape(SMALL, 2, 3))


def test_commands_show_formats(amskv, tmp_path):
    """The table by layers and formats, the picture, every block in a file, and the bytes."""
    config = configs.get("var-d16").model.transformer
    schedule, heads = config.schedule, config.num_heads
    mixed = mixed_row(schedule, [["int8"] * 2 + ["int4"] * 2 + [None] * 5] * heads)
    whole = StaticRow.from_scales(schedule, [range(min(i, 2)) for i in range(10)])
    plan = RetentionPlan(schedule, (mixed,) * 4 + (whole,) * (config.depth - 4), "by hand")
    path, picture, out = (tmp_path / name for name in ("plan.json", "plan.png", "analysis"))
    path.write_text(plan.to_json())
    done = amskv("plan", "--model", "var-d16", "--plan", path, "--plot", picture)
    assert (done.code, done.err) == (0, "")
    assert re.search(r"0-3 +int8 +5 +0 +1 +5 +5", done.out)
    assert re.search(r"\n +int4 +25 +0 +0 +0 +9 +25", done.out)
    assert re.search(r"4-15 +5 +0 +1 +5 +5", done.out)
    size = 2 * 2 * heads * (4 * (5 * (64 + 2) + 25 * (32 + 2)) + 12 * 5 * 64 * 2)
    assert re.search(rf"this plan +{size / 2**20:.2f} MiB", done.out)
    assert picture.stat().st_size > 10_000

    stats = random_stats(0, schedule, config.depth)
    replace(stats, head_density=stats.head_density.repeat(heads, 1)).save(tmp_path / "stats.npz")
    analyze = "analyze", "--stats", tmp_path / "stats.npz", "--out", out, "--plan", path
    done = amskv(*analyze)
    assert (done.code, done.err) == (0, "")
    assert (out / "plan.png").exists()
    with (out / "blocks.csv").open(newline="") as file:
        blocks = list(csv.DictReader(file))
    assert len(blocks) == heads * (4 * 4 + 12 * 2)
    of_last = [block for block in blocks if (block["layer"], block["head"]) == ("3", "15")]
    found = [(block["scale"], block["numbers"], block["last_step"]) for block in of_last]
    assert found == [("0", "int8", "9"), ("1", "int8", "9"), ("2", "int4", "9"), ("3", "int4", "9")]
    path.write_text(RetentionPlan(schedule, (whole,)).to_json())
    done = amskv(*analyze, "--force")
    assert done.code == 1
    assert "plan.json: the retention plan has 1 layers, the model 16" in done.err


def test_what_is_decided_while_drawing_is_left_empty():
    row = H2O(4).plan(cache_shape(SMALL, 1, 2)).rows[0]
    _, blocks = plan_blocks(RetentionPlan(SMALL, (row,)), 2)
    found = [block[1:4] + block[5:] for block in blocks]
    assert found == [(head, j, SMALL.tokens[j], "", "") for head in range(2) for j in range(3)]


def test_the_page_about_plan_files():
    text = (Path(__file__).parents[1] / "docs" / "plans.md").read_text(encoding="utf-8")
    plan = RetentionPlan.from_json(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert [row.kind for row in plan.rows] == ["static", "heads", "mixed"]
    assert plan.group_of == (0, 1, 1)
    assert RetentionPlan.from_json(plan.to_json()) == plan
    assert all(f"| `{kind}` |" in text for kind in ROWS if kind != "static")
    plan.check(cache_shape(plan.schedule, 3, 2))


NOTHING, FIRST, SECOND = [[], [], [], []], [[], [0], [0], [0]], [[], [], [1], [1]]


def part(numbers, *rows):
    return {"numbers": numbers, "rows": rows, "heads": list(range(len(rows)))}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "layer 1 of the retention plan has no parts"),
        ([part("int5", FIRST)], r"layer 1 .* keeps numbers as 'int5': expected float32, .*int4"),
        ([part(None, FIRST)], "keeps numbers as 'None': expected float32"),
        ([part("int4", FIRST), part("int4", SECOND)], "has two parts in int4: put both into one"),
        ([part("int4", FIRST), part("int8", SECOND, NOTHING)], r"has parts of \[1, 2\] heads"),
        ([part("int4")], "layer 1, int4 of the retention plan has no heads"),
        ([part("int4", FIRST[1:])], "layer 1, int4, head 0 of the retention plan has 3 steps"),
        (
            [part("int4", FIRST, SECOND), part("int8", NOTHING, [[], [], [], [[1, 1, 3]]])],
            "layer 1, head 1, step 3 of the retention plan has tokens 1:3 of scale 1 in int4 and "
            "in int8: a token has one format for life",
        ),
        (
            [part("int4", [[], [0], [0], []]), part("int8", [[], [], [], [0]])],
            "layer 1, head 0, step 3 of the retention plan changes tokens 0:1 of scale 0 in int4 "
            "and in int8: a token has one format for life",
        ),
        (
            [part("int4", [[], [0], [], []]), part("int8", [[], [], [], [0]])],
            "layer 1, int8, head 0, step 3 .* tokens 0:1 of scale 0, which were dropped before",
        ),
        ([part("int4", [[], [0], [3], []])], "layer 1, int4, head 0, step 2 .* keeps scale 3"),
        ([{"numbers": "int4"}], "layer 1 of the retention plan: expected lists .* found 'rows'"),
    ],
)
def test_impossible_plans_are_refused(parts, message):
    good = {"kind": "mixed", "parts": [part("int8", FIRST)]}
    with pytest.raises(AmskvError, match=message):
        RetentionPlan.from_keep(SMALL, [good, {"kind": "mixed", "parts": parts}])


@pytest.mark.parametrize(
    ("formats", "options", "message"),
    [
        ([["int4"] * 2], {}, r"for each of 3 scales of every head, found \[2\] formats"),
        ([["int4"] * 3], {"last_steps": [[3]]}, r"last steps \(1, 1\)"),
        ([], {}, "of every head, found"),
        ([["int5"] * 3], {}, "cached as 'int5': expected float32"),
        ([["int4"] * 3], {"lend": [(0, 3)]}, "lent to scale 3 of head 0: expected one of 3 scales"),
        ([["int4"] * 3], {"lend": [(1, 0)]}, "lent to scale 0 of head 1: .* of 1 heads"),
    ],
)
def test_tables_that_do_not_fit_are_refused(formats, options, message):
    with pytest.raises(UsageError, match=message):
        mixed_row(SMALL, formats, **options)
