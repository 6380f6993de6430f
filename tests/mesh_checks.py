"""What holds on eight devices; ``test_mesh`` runs this file in a process that has as many."""

import re
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import chex
import jax
import numpy as np
import pytest
from checks import message
from flax.traverse_util import unflatten_dict
from made_stats import random_stats

from amskv_jax import configs
from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.online import DecisionObserver
from amskv_jax.cache.store import Store
from amskv_jax.checkpoints.initialize import init_checkpoint, random_params
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.mesh import MeshShape
from amskv_jax.models.guidance import UNGUIDED
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.model import InfinityModel
from amskv_jax.models.kinds import param_shapes
from amskv_jax.models.t5 import T5Config
from amskv_jax.models.var.config import VARConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.numbers import NUMBERS
from amskv_jax.pipeline import load
from amskv_jax.plan.mixed import mixed_row
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import HeadRow
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import AMSKV, H2O, Full, Heads, OnlineAMSKV, ScaleKV, Window
from amskv_jax.precision import FLOAT8
from amskv_jax.sampling import TokenSampling
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.testing import TOKENIZER, VAR_FIELDS
from amskv_jax.text.encoder import encode

SCHEDULES = {"var": VAR_FIELDS["schedule"], "infinity": ScaleSchedule.square((1, 2, 4))}
TEXT_ENCODER = T5Config(depth=2, width=128, num_heads=4, head_dim=8, hidden=64, vocab_size=32)
TWELVE_PIXELS = replace(TOKENIZER, channel_multipliers=(1, 1, 1))
MODELS = {
    "var": VARModel(VARConfig(3, 64, 4, **VAR_FIELDS), TWELVE_PIXELS),
    "infinity": InfinityModel(
        InfinityConfig(3, 128, 4, 8, SCHEDULES["infinity"], text_channels=128, text_maxlen=16),
        BSQConfig(8, 32, (1, 2), 1),
    ),
}
MESHES = ("data=8", "data=4,model=2", "model=4")
BOTH = MESHES[1]
"""Where one mesh will do."""
ONLINE = OnlineAMSKV(1, 5, 1, theta=-1.4)
POLICIES = {
    "full": Full(),
    "ams": AMSKV(1, 5, 1, demanding_layers=(0,)),
    "ams online": ONLINE,
    "window": Window(3),
    "h2o": H2O(3),
    "scalekv": ScaleKV(3),
    "heads": Heads(3, protected=1),
}
COLLECTIVES = "all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"
BATCH = 8


@cache
def params_of(name):
    return random_params(MODELS[name], seed=1)


@cache
def placed(name, mesh):
    shape = MeshShape.parse(mesh)
    return random_params(MODELS[name], seed=1, put=shape.place)


def drawing_of(model):
    return replace(model.drawing, cfg=3.0, top_k=1, top_p=0.0)


def plan_of(name, policy):
    model = MODELS[name]
    shape = model.cache_shape(SCHEDULES[name])
    return policy.plan(shape, random_stats(0, shape.schedule, shape.num_layers, shape.num_heads))


def sampler_of(name, policy, mesh=None, **options):
    model = MODELS[name]
    options = {"guidance": model.guidance(drawing_of(model)), **options}
    return Sampler(
        model,
        plan_of(name, policy),
        sampling=TokenSampling(top_k=1),
        mesh=MeshShape.parse(mesh),
        **options,
    )


def arguments(name, batch=BATCH):
    model = MODELS[name]
    controls = model.controls(SCHEDULES[name], drawing_of(model))
    condition = model.conditions(None).batch(np.arange(batch))
    return condition, picture_keys(jax.random.key(0), batch), controls


@cache
def alone(name, policy, **options):
    """What one device draws."""
    return sampler_of(name, policy, **options)(params_of(name), *arguments(name))


def collectives(compiled):
    text = compiled.as_text()
    return [len(re.findall(rf"= [^=\n]* {name}(?:-start)?\(", text)) for name in COLLECTIVES]


# Every policy where both axes share out; what ranks or tells heads apart also where one does alone.
CASES = [
    *(("var", policy, BOTH) for policy in POLICIES),
    *(("var", *case) for case in (("full", MESHES[0]), ("h2o", MESHES[0]), ("full", MESHES[2]))),
    ("var", "heads", MESHES[2]),
    *(("infinity", policy, BOTH) for policy in ("full", "h2o")),
    ("infinity", "full", MESHES[0]),
    ("infinity", "heads", MESHES[2]),
]


@pytest.mark.parametrize(("name", "policy", "mesh"), CASES)
def test_tokens_are_those_of_one_device(name, policy, mesh):
    chosen = POLICIES[policy]
    sampler = sampler_of(name, chosen, mesh, trace=True)
    expected = alone(name, chosen, trace=True)
    compiled = sampler.compile(placed(name, mesh), *arguments(name))
    found = compiled(placed(name, mesh), *arguments(name))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    for field in ("logits", "latent", "latents"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), atol=2e-5)
    counted = collectives(compiled)
    if policy == "ams online":
        return  # its layers decide for all pictures at once
    if sampler.mesh.model == 1:
        assert counted == [0] * 5
        return
    # A scan for every run of equal layers.
    groups = CacheLayout.of(sampler.plan, Store(NUMBERS["float32"]), 2).group_of
    scans = 1 + sum(a != b for a, b in pairwise(groups))
    steps = SCHEDULES[name].num_scales
    once = {"var": 1, "infinity": 0}[name]  # the modulation
    sums = {"var": 2, "infinity": 3}[name]  # one more after the attention to the text
    assert counted == [sums * scans * steps, once, 0, 0, 0]


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_buffers_are_as_large_as_the_device_that_needs_most(mesh):
    """Whose heads need slots in all layers together, each layer what it needs."""
    plan, shards = plan_of("var", POLICIES["heads"]), MeshShape.parse(mesh).model
    (slots,) = CacheLayout.of(plan, Store(NUMBERS["float32"]), shards).groups
    needs = [
        [HeadRow(tuple(part)).head_slots(len(part)) for part in np.split(heads, shards)]
        for heads in (np.array(row.heads, object) for row in plan.rows)
    ]
    assert len(set(needs[0])) > 1, "devices differ"
    assert slots.tables.capacities == (np.sum(needs, axis=0).max(),)


def test_formats_that_differ_from_device_to_device():
    """And from layer to layer."""
    formats = [["int8", "int4"], ["int4", "int4"], [None, "int8"], ["int4", None]]
    row, schedule = mixed_row(SCHEDULES["var"], formats), SCHEDULES["var"]
    plan = RetentionPlan(schedule, (row, mixed_row(schedule, formats[:1] * 4), row))
    options = {"guidance": MODELS["var"].guidance(drawing_of(MODELS["var"]))}
    one = Sampler(MODELS["var"], plan, sampling=TokenSampling(top_k=1), **options)
    many = replace(one, mesh=MeshShape.parse(BOTH))
    expected = one(params_of("var"), *arguments("var"))
    found = many(placed("var", BOTH), *arguments("var"))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.latent, expected.latent, atol=2e-5)


@pytest.mark.parametrize(
    ("policy", "numbers", "mesh"),
    [
        ("h2o", "int8", "data=8"),
        ("heads", "int4", BOTH),
    ],
)
def test_quantised_caches(policy, numbers, mesh):
    """Vectors are coded one by one, so that a mesh changes nothing: some of all pairs will do."""
    chosen = POLICIES[policy]
    expected = alone("var", chosen, cache_dtype=numbers)
    sampler = sampler_of("var", chosen, mesh, cache_dtype=numbers)
    found = sampler(placed("var", mesh), *arguments("var"))
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_forced_codes_and_one_row_per_picture():
    condition, keys, controls = arguments("var")
    free = np.asarray(alone("var", Full(), trace=True).tokens)
    codes = free[::-1, :5]
    controls = controls.replace(forced=MODELS["var"].forced(codes, SCHEDULES["var"]))
    one, many = (
        sampler_of("var", Full(), mesh, guidance=UNGUIDED)(
            params_of("var") if mesh is None else placed("var", mesh), condition, keys, controls
        ).tokens
        for mesh in (None, BOTH)
    )
    np.testing.assert_array_equal(many, one)
    assert (np.asarray(one) != free).any()


def test_weights_that_were_not_placed_give_the_same():
    found = sampler_of("var", Full(), BOTH)(params_of("var"), *arguments("var"))
    np.testing.assert_array_equal(found.tokens, alone("var", Full(), trace=True).tokens)


def test_decisions_taken_while_drawing():
    observed = [
        sampler_of("var", ONLINE, one, observe=DecisionObserver())(
            params_of("var") if one is None else placed("var", one), *arguments("var")
        ).observed
        for one in (None, BOTH)
    ]
    chex.assert_trees_all_close(*observed, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_no_device_holds_more_than_its_share(name, capsys):
    """By the compiler's analysis, per device; and the weights by where they lie."""
    found = {}
    for mesh in (None, BOTH, MESHES[2]):
        params = params_of(name) if mesh is None else placed(name, mesh)
        compiled = sampler_of(name, Full(), mesh).compile(params, *arguments(name, 64))
        analysis = compiled.memory_analysis()
        found[mesh] = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    with capsys.disabled():
        print(f"\n{name}, bytes of arguments and temporaries per device: {found}")
    one, both, model = found.values()
    assert both[1] < one[1] / 4
    assert model[1] < one[1] / 2
    assert model[0] < both[0] < 0.65 * one[0]
    shares = [
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed(name, mesh)))
        for mesh in MESHES
    ]
    whole = sum(x.nbytes for x in jax.tree.leaves(params_of(name)))
    assert shares[0] == whole > shares[1] > shares[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mesh") / "checkpoint"
    init_checkpoint(MODELS["var"], directory, seed=1)
    return directory


def test_pipelines_fill_batches_up(checkpoint):
    """Ten pictures, which share out over no mesh, are those of one device."""
    one, many = load(checkpoint), load(checkpoint, mesh=MeshShape.parse(BOTH))
    key, labels = jax.random.key(3), np.arange(10)
    expected, found = (p.sample(labels, key=key) for p in (one, many))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.pictures, expected.pictures, atol=1e-4)


@pytest.mark.parametrize("name", ["var-d30", "var-d36", "infinity-2b"])
def test_published_models_share_nearly_all_weights_out(name):
    """Beside blocks and modulation, next to nothing lies whole on every device."""
    config = configs.get(name).model.parts["transformer"]
    mesh = MeshShape(model=2)
    whole = held = 0
    for path, shape in param_shapes(config).items():
        leaf = mesh.struct(f"transformer/{path}", shape, "bfloat16")
        whole += leaf.size
        held += np.prod(leaf.sharding.shard_shape(leaf.shape))
    assert held < 0.54 * whole


@pytest.mark.parametrize(
    ("name", "mesh", "first"),
    [("var", "model=4", "float8_e4m3fn"), ("var", "model=4", "int8"), ("infinity", BOTH, "int8")],
)
def test_float8_kernels_are_shared_out(name, mesh, first, monkeypatch):
    """Transposed as they are; sums over devices are rounded to bfloat16 once more."""
    layers = dict.fromkeys(("attention/out", "mlp/down"), "float8_e4m3fn")
    layers |= {"attention/qkv": first, "mlp/up": first}
    monkeypatch.setitem(FLOAT8, "float8", layers)
    shape, model = MeshShape.parse(mesh), MODELS[name]
    whole, shared = (
        random_params(model, seed=1, dtype="float8", put=put)
        for put in (MeshShape().place, shape.place)
    )
    blocks = shared["transformer"]["blocks"]
    for kernel in (*(blocks["attention"][k] for k in ("qkv", "out")), *blocks["mlp"].values()):
        leaf = kernel["kernel"].transposed
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // shape.model
    results = []
    for params, own in ((whole, None), (shared, mesh)):
        options = {"trace": True, "dtype": "float8", "guidance": UNGUIDED}
        found = sampler_of(name, Full(), own, **options)(params, *arguments(name))
        results.append(np.asarray(found.logits[:, 0]))  # before tokens differ
    error = np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0])
    assert 0 < error < 0.1  # a layout that is wrong makes it one and more


def test_text_encoder():
    model = replace(MODELS["infinity"], text_encoder=TEXT_ENCODER)
    tokens, lengths = np.arange(24, dtype=np.int32).reshape(2, 12), np.array([5, 12], np.int32)
    parts = ["text_encoder"]
    whole = random_params(model, parts=parts)["text_encoder"]
    expected = encode(whole, tokens, lengths, TEXT_ENCODER)
    shared = random_params(model, parts=parts, put=MeshShape(data=2, model=4).place)
    kernel = shared["text_encoder"]["blocks"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.nbytes == kernel.nbytes // 4
    found = encode(shared["text_encoder"], tokens, lengths, TEXT_ENCODER)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)


@pytest.mark.parametrize(("name", "mesh"), [*zip(MODELS, MESHES, strict=False), ("var", MESHES[2])])
def test_lowering_for_tpus(name, mesh):
    """With the shapes of weights alone."""
    model, shape = MODELS[name], MeshShape.parse(mesh)
    params = {part: _structs(part, config, shape) for part, config in model.parts.items()}
    sampler = sampler_of(name, POLICIES["h2o"], mesh)
    call = jax.jit(partial(sampler))  # or jit would take the sampler's own attributes
    exported = jax.export.export(call, platforms=["tpu"])(params, *arguments(name))
    assert exported.nr_devices == shape.size
    assert exported.platforms == ("tpu",)


def _structs(part, config, mesh):
    shapes = param_shapes(config).items()
    flat = {path: mesh.struct(f"{part}/{path}", shape, "float32") for path, shape in shapes}
    return unflatten_dict(flat, sep="/")


def test_what_does_not_share_out(checkpoint):
    said = message(load, checkpoint, mesh=MeshShape(model=3))
    assert said == "4 heads do not share out over model=3: take one of 2, 4"
    said = message(load, checkpoint, mesh=MeshShape(data=16))
    assert "a mesh of data=16,model=1 takes 16 devices, this host has 8 (cpu)" in said
    sampler = sampler_of("var", Full(), "data=3")
    said = message(sampler, placed("var", "data=3"), *arguments("var"))
    assert "8 pictures at once do not share out over data=3: draw 9" in said


def test_calibration_measures_the_same(checkpoint, tmp_path, amskv):
    """By the command, of more pictures than a batch has."""
    one, many = tmp_path / "one.npz", tmp_path / "many.npz"
    common = ["calibrate", "--checkpoint", checkpoint, "--samples", 5, "--batch-size", 3]
    for out, options in ((one, ()), (many, ("--mesh", BOTH))):
        done = amskv(*common, "--out", out, *options)
        assert done.code == 0, done.err
    measured = LayerStats.load(one), LayerStats.load(many)
    for field in ("similarity", "cosine", "head_density", "history_top"):
        expected, found = (getattr(stats, field) for stats in measured)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_commands(checkpoint, tmp_path, amskv):
    one, many = tmp_path / "one.npz", tmp_path / "many.npz"
    common = ["sample", "--checkpoint", checkpoint, "--labels", "0-4", "--batch-size", 3]
    done = amskv(*common, "--out", tmp_path / "one.png", "--save-tokens", one)
    assert done.code == 0, done.err
    mesh = "--mesh", "data=2,model=4"
    done = amskv(*common, "--out", tmp_path / "many.png", "--save-tokens", many, *mesh)
    assert done.code == 0, done.err
    assert "mesh of data=2,model=4: 8 devices, 4 pictures at once" in done.out
    np.testing.assert_array_equal(np.load(many)["tokens"], np.load(one)["tokens"])
    done = amskv(
        "eval", "--checkpoint", checkpoint, "--out", tmp_path / "eval", "--num", 6, "--features",
        "none", "--policies", "full", "--mesh", "data=4",
    )  # fmt: skip
    assert done.code == 0, done.err
    done = amskv(*common, "--out", tmp_path / "no.png", "--mesh", "rows=2")
    assert done.code == 2
    assert "expected data=N, model=M or data=N,model=M" in done.err
