"""Attention that reads the cache where it lies: the kernel in Pallas' interpreter, and its use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import assert_no_races, interpreted, many_threads
from made_stats import random_stats
from reference_weights import recipe_params

from amskv_jax import attention, generate
from amskv_jax.attention import Cached, choose_implementation
from amskv_jax.cache import heads, store
from amskv_jax.errors import UsageError
from amskv_jax.fused_attention.blocks import Blocks, blocks_for, steps_of
from amskv_jax.generate import picture_keys
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.policies import AMSKV, H2O, Full, Heads, HeatKV, ScaleKV, Window
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.testing import sample

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4))
CONFIG = VARConfig(2, 64, 2, SCHEDULE, 5, 32, 8)
TOKENIZER = VQVAEConfig(SCHEDULE, 32, 8, 32, (1, 1), 1)

CASES = [
    # rows, heads, head_dim, spans, lengths, own tokens, capacity, blocks, processors, product
    (1, 2, 64, ((0, 63),), None, 36, 70, None, 132, False),
    (2, 2, 64, ((3, 50), (60, 55)), None, 169, 130, Blocks(3, 1, 128, 2), 3, True),  # in turn
    (1, 3, 64, (), None, 128, 40, Blocks(1, 3, 64, 2), 1, True),  # several heads, nothing cached
    (1, 1, 128, ((0, 130),), None, 200, 140, Blocks(2, 1, 128, 2, True, False), 132, True),
    # heads hold as they like, of whole blocks too
    (1, 3, 64, ((0, 150),), (130, 0, 70), 36, 150, Blocks(1, 1, 64, 2), 1, False),
]


@interpreted
@many_threads
@pytest.mark.parametrize("case", CASES)
def test_kernel_attends_to_cache_and_own_tokens(monkeypatch, case):
    from jax.experimental.pallas import mosaic_gpu

    from amskv_jax.fused_attention import kernel

    rows, heads, head_dim, spans, lengths, tokens, capacity, blocks, processors, product = case
    monkeypatch.setattr(kernel, "processors", lambda: processors)
    own = (rows, tokens, heads, head_dim)
    buffer = (3, rows, capacity, heads, head_dim)
    query, keys, values, key, value = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for seed, shape in enumerate([own, buffer, buffer, own, own])
    )
    used = [slot for first, length in spans for slot in range(first, first + length)]
    stale = np.setdiff1d(np.arange(capacity), used)
    keys, values = (x.at[:, :, stale].set(50.0) for x in (keys, values))
    temperature = np.arange(2, 2 + heads, dtype=np.float32)
    together = jnp.concatenate([query, 9 + key, value], axis=2)
    output, sums = kernel.fused_attention(
        *(together if product else query, keys, values, jnp.int32(1), key),
        together if product else value,
        None if lengths is None else jnp.array([lengths] * rows),
        jnp.array(temperature) if product else None,
        first_value=2 * heads if product else 0,
        spans=spans,
        scale=0.2,
        blocks=blocks,
        interpret=mosaic_gpu.InterpretGPUParams(detect_races=rows == 1),
    )
    if rows == 1:
        assert_no_races()
    query, keys, values, key, value = (
        np.asarray(x, np.float32) for x in (query, keys, values, key, value)
    )
    if product:
        query *= temperature[:, None] / np.linalg.norm(query, axis=-1, keepdims=True)
    key = np.concatenate([keys[1][:, used], key], 1)
    value = np.concatenate([values[1][:, used], value], 1)
    weights = np.exp(0.2 * np.einsum("rthd,rshd->rhts", query, key))
    for head, length in enumerate(lengths or ()):
        weights[:, head, :, length : len(used)] = 0
    total = weights.sum(-1)
    expected = np.einsum("rhts,rshd->rthd", weights / total[..., None], value)
    np.testing.assert_allclose(np.asarray(output, np.float32), expected, atol=0.01)
    np.testing.assert_allclose(sums, np.log(total).swapaxes(1, 2), atol=1e-4)


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 400)), max_size=3),
    st.integers(1, 4096),
    st.sampled_from((64, 128)),
    st.booleans(),
)
@settings(deadline=None)
def test_steps_take_every_token_once(spans, own, block, apart):
    taken = []
    for parts, width in steps_of(tuple(spans), own, block, apart=apart):
        assert width % 64 == 0 and width <= block
        assert not apart or len({part.source for part in parts}) == 1
        assert len(parts) == 1 or len({part.valid is None for part in parts}) == 1
        for source, first, rounds, valid in parts:
            assert valid is None or (valid <= width and rounds == 1)
            for index in range(rounds):
                start = first + index * block
                taken += [(source, start + i) for i in range(valid or width)]
    expected = [(0, slot) for first, length in spans for slot in range(first, first + length)]
    assert sorted(taken) == sorted(expected + [(1, token) for token in range(own)])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 36, 64, 100, 169, 256, 1024, 4096])
@pytest.mark.parametrize("pairs", [16, 32, 60, 3840])
def test_blocks_fit_a_processor(tokens, pairs, head_dim):
    blocks = blocks_for(tokens, pairs, head_dim)
    assert pairs % blocks.heads == 0
    tiles = 2 * blocks.groups * 64 + 2 * blocks.heads * blocks.stages * blocks.keys
    assert 2 * head_dim * tiles + 256 * blocks.groups <= 226 * 1024
    assert not blocks.turns or blocks.groups == 2, "two take turns"


def joined_attention(query, key, value, cached: Cached, scale, lengths=None):
    """Do what the kernel does, with what is joined."""
    slots = [slot for first, length in cached.spans for slot in range(first, first + length)]
    keys, values = (
        jnp.concatenate([buffer[cached.layer][:, np.array(slots, int)], own], axis=1)
        for buffer, own in ((cached.keys, key), (cached.values, value))
    )
    logits = scale * jnp.einsum("rthd,rshd->rths", query, keys, precision="highest")
    if lengths is not None:
        counts = jnp.arange(len(slots))[None, None] < lengths[..., None]
        counts = jnp.pad(counts, ((0, 0), (0, 0), (0, key.shape[1])), constant_values=True)
        logits = jnp.where(counts[:, None], logits, -jnp.inf)
    sums = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - sums[..., None])
    return jnp.einsum("rths,rshd->rthd", weights, values, precision="highest"), sums


@pytest.mark.parametrize(
    ("policy", "cache_dtype"),
    [
        (Full(), None),
        (AMSKV(1, 5, 1, demanding_layers=(0,)), "int8"),
        (Window(7), None),
        (H2O(6), None),
        (H2O(6), "int8"),
        (ScaleKV(5), "int8"),
        (Heads(4, protected=1), None),
        (HeatKV(0.6, protected=1), "int8"),
    ],
)
@pytest.mark.usefixtures("quickly_compiled")
def test_what_is_drawn_is_the_same(monkeypatch, policy, cache_dtype):
    statistics = random_stats(0, SCHEDULE, CONFIG.depth, CONFIG.num_heads)
    model, plan = VARModel(CONFIG, TOKENIZER), policy.plan(CONFIG.cache_shape, statistics)
    params = {"transformer": recipe_params(CONFIG), "tokenizer": recipe_params(TOKENIZER)}
    labels, keys = jnp.array([0, 3]), picture_keys(jax.random.key(0), 2)

    def draw(attention):
        options = {"attention": attention, "cache_dtype": cache_dtype}
        return sample(model, plan, params, labels, keys, Drawing(top_k=8), **options).tokens

    expected, seen = draw("xla"), []

    def attend_to_cache(qkv, cached, *rest):
        seen.append(cached.spans)
        query, key, _, (product, temperature) = qkv
        vectors, _, value = jnp.split(product, 3, axis=2)
        if temperature is not None:
            query = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
            query *= temperature[None, None, :, None]
        return joined_attention(query, key, value, cached, *rest)

    def mass_on_cache(qkv, cached, sums, scale):
        slots = [slot for first, length in cached.spans for slot in range(first, first + length)]
        keys = cached.keys[cached.layer][:, np.array(slots, int)]
        keys = jnp.concatenate([keys, qkv.key], axis=1)
        logits = jnp.einsum("rthd,rshd->rhts", qkv.query, keys)
        return jnp.exp(scale * logits - sums.swapaxes(1, 2)[..., None]).sum(2)

    for module in (store, heads):
        monkeypatch.setattr(module, "reads_cache", lambda *arguments: True)
        monkeypatch.setattr(module, "attend_to_cache", attend_to_cache)
    monkeypatch.setattr(store, "mass_on_cache", mass_on_cache)
    monkeypatch.setattr(generate, "choose_implementation", lambda *arguments: "mosaic")
    np.testing.assert_array_equal(draw("mosaic"), expected)
    assert any(seen), "something cached was attended to"


def test_only_much_work_on_a_hopper_is_done_by_the_kernel(monkeypatch):
    with pytest.raises(UsageError, match=r"mosaic needs a Hopper GPU.*found cpu"):
        choose_implementation("mosaic", jnp.bfloat16, 64)
    monkeypatch.setattr(attention, "has_mosaic", lambda: True)
    assert choose_implementation("auto", jnp.bfloat16, 64) == "mosaic"
    assert choose_implementation("auto", jnp.bfloat16, 96) == "xla"
    assert choose_implementation("auto", jnp.float32, 64) == "xla"
    assert choose_implementation("cudnn", jnp.bfloat16, 64) == "cudnn"
    much = jnp.zeros((128, 100, 30, 64), jnp.bfloat16)
    assert attention.reads_cache(much, 255, "auto")
    assert not attention.reads_cache(much[:, :64], 127, "auto")
    assert not attention.reads_cache(much, 255, "cudnn")
