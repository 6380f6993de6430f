"""Every policy with every format of numbers on every tiny model: what attention is given."""

from dataclasses import dataclass
from functools import cache, partial
from operator import itemgetter
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import policy_cases
import pytest
from policy_cases import CASES, SHAPES, draw, stats

from amskv_jax.attention import QKV
from amskv_jax.cache import heads, online, store
from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.stack import apply_blocks
from amskv_jax.cache.store import Store
from amskv_jax.numbers import NUMBERS
from amskv_jax.policies import Full
from amskv_jax.testing import LayerRecord, read_mask

pytestmark = pytest.mark.usefixtures("quickly_compiled")

FORMATS = ("bfloat16", "int8", "int4", "int2", "float8_e4m3fn")


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    return policy_cases.policies(tmp_path_factory.mktemp("plans"))


class ReachedError(Exception):
    """Attention, whose arguments these are: keys, values, and how many of them count."""


@dataclass(frozen=True)
class Given:
    """Looks at the keys and values that attention is given; see ``stack.Observer``."""

    per_row: ClassVar[bool] = True

    def __call__(self, slots, cache, layer, step, qkv, scale):
        def stop(query, key, value, scale, implementation, lengths=None):
            raise ReachedError(key, value, lengths)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(ReachedError) as reached:
            for module in (store, heads, online):
                patch.setattr(module, "attend", stop)
            slots.attend(cache, layer, step, qkv, scale, "xla")
        visible = getattr(cache, "visible", None)
        return *reached.value.args, None if visible is None else visible[layer]


@partial(jax.jit, static_argnums=(0, 1))
def run(plan, numbers, written):
    """Return per step and scan what attention is given, stacked over layers.

    Args:
      plan: what layers keep.
      numbers: the format, where the plan names none.
      written: per step queries, keys and values of all layers, [layers, rows, T, heads, head_dim].
    """
    layout = CacheLayout.of(plan, Store(numbers))
    _, rows, _, heads, size = written[0][0].shape
    caches, given = layout.init(rows, heads, size), []
    for step, qkv in enumerate(written):
        nothing = jnp.zeros(qkv[0].shape[1:])
        _, caches, seen = apply_blocks(
            lambda own, _, attention, take: attention(QKV(*own)),
            qkv,
            nothing,
            caches,
            layout,
            step,
            scale=1.0,
            implementation="xla",
            observe=Given(),
        )
        given.append(seen)
    return given


@cache
def of_model(model):
    """Queries, keys and values per step, [layers, rows, T, heads, head_dim], as a model has them.

    Of two pictures with guidance, which the full cache draws.
    """
    observed = draw(Full().plan(SHAPES[model]), model, "float32").observed
    return [tuple(np.asarray(part) for part in step[0][:3]) for step in observed]


@partial(jax.jit, static_argnums=0)
def through(numbers, vectors):
    return numbers.decode(numbers.encode(vectors), jnp.float32)


@cache
def coded(model, name):
    """Keys and values per step as a format keeps them, each coded once."""
    parts = [part for _, *own in of_model(model) for part in own]
    sizes = [part.shape[2] for part in parts]
    whole = through(NUMBERS[name], np.concatenate(parts, axis=2))
    split = np.split(np.asarray(whole), np.cumsum(sizes)[:-1], axis=2)
    return list(zip(split[::2], split[1::2], strict=True))


def pairs(keys, values):
    """Keys and values [rows, T, heads, head_dim] as [rows, heads, T, 2 * head_dim]."""
    return np.swapaxes(np.concatenate([keys, values], axis=-1), 1, 2)


def tokens_of(keys, values, lengths, heads):
    """Return what attention is given, [rows, heads, T, 2 * head_dim], and what counts of it.

    Heads are on an axis of their own, or batch rows. What counts not is padding, or hidden.
    """
    size = values.shape[-1]
    found = pairs(keys, values).reshape(-1, heads, keys.shape[1], keys.shape[-1] + size)
    counted = np.ones(found.shape[:3], bool)
    if lengths is not None:  # of rows, or of heads
        counted &= np.arange(found.shape[2]) < lengths.reshape(len(found), -1, 1)
    if keys.shape[-1] > size:  # one more channel, which hides tokens
        counted &= found[..., size] == 0
        found = np.delete(found, size, axis=-1)
    return found, counted


def layers_of(steps):
    """Return per layer and step what ``run`` returned, as NumPy's."""
    layers = []
    for number, stacked in enumerate(steps[0]):
        for index in range(len(stacked[0])):
            own = [jax.tree.map(itemgetter(index), step[number]) for step in steps]
            layers.append(jax.tree.map(np.asarray, own))
    return layers


def expected_tokens(row, schedule, record_of, step, kept):
    """Return earlier tokens as their formats keep them, and which are there; as ``tokens_of``.

    Args:
      row: what the layer keeps.
      schedule: the scales.
      record_of: name of a format -> a record in which keys and values are as it keeps them.
      step: the step.
      kept: the format where the row names none.
    """
    earlier, there = None, None
    for numbers, part in row.parts:
        record = record_of(numbers or kept)
        mask = read_mask(part, schedule, record, step)
        own = pairs(*(np.concatenate(x[:step], axis=1) for x in (record.key, record.value)))
        earlier = own if earlier is None else np.where(mask[..., None], own, earlier)
        there = mask if there is None else there | mask
    return earlier, there


def check_given(plan, model, kept):
    """Check every step of every layer, of every batch row and head."""
    schedule, exact = plan.schedule, of_model(model)
    named = all(part.numbers for row in plan.rows for part in row.parts)
    program = NUMBERS["float32" if named else kept]  # one for all formats where the plan names them
    for layer, steps in enumerate(layers_of(run(plan, program, exact))):
        query = [own[0][layer] for own in exact]
        cache = [
            SimpleNamespace(tokens=SimpleNamespace(keys=keys), visible=visible)
            for keys, _, _, visible in steps
        ]

        def record_of(name, layer=layer, query=query, cache=cache):
            keys, values = zip(*coded(model, name), strict=True)
            own = ([x[layer] for x in parts] for parts in (keys, values))
            return LayerRecord(query, *own, [], cache)

        at_hand = None
        for step, (keys, values, lengths, _) in enumerate(steps):
            own = pairs(*(part[layer] for part in exact[step][1:]))
            found, counted = tokens_of(keys, values, lengths, own.shape[1])
            there = np.zeros((*own.shape[:2], 0), bool)
            if step:
                earlier, there = expected_tokens(plan.rows[layer], schedule, record_of, step, kept)
                assert not (there & ~at_hand).any(), "what was dropped came back"
            for place in np.ndindex(own.shape[:2]):
                given = [x.tobytes() for x in found[place][counted[place]]]
                wanted = [x.tobytes() for x in own[place]]
                wanted += [x.tobytes() for x in earlier[place][there[place]]] if step else []
                assert sorted(given) == sorted(wanted), (model, layer, step, place)
            at_hand = np.concatenate([there, np.ones(own.shape[:3], bool)], axis=2)


@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_given_what_was_coded_first(name, kept, policies):
    """On every model, bit for bit, whichever slots tokens went through.

    All layers run through all steps as in a sampler: its cache, its loops over layers, the
    policy's plan; but with queries, keys and values which the model had when it drew with a full
    cache. Attention is given every token which the plan keeps once, its key and its value together,
    through the format once; the step's own tokens as they are; and no other. Where tokens are
    chosen at run time, these are as many as the plan says, in the order of the sequence, and none
    that was dropped before.
    """
    budget = "small" if name == "explicit" else "middle"  # mixed rows are those of "optimal"
    for model, shape in SHAPES.items():
        check_given(policies[name][budget].plan(shape, stats(model)), model, kept)
