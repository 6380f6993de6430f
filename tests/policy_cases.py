"""Every registered policy with three budgets, every kind of tiny model, and drawings of them."""

import json
from dataclasses import replace
from functools import cache

import jax
import numpy as np
from made_stats import random_damage

from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.infinity.prompts import TextFeatures
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import (
    AMSKV,
    REGISTRY,
    Explicit,
    FittedAMSKV,
    Full,
    Heads,
    HeatKV,
    OnlineAMSKV,
    Optimal,
    Sink,
)
from amskv_jax.policies.base import Budgeted
from amskv_jax.sampling import TokenSampling
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.testing import TINY_INFINITY, Recorder

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4))
SHAPE = (2, 32, 2, SCHEDULE, 5, 32, 8)
TOKENIZER = VQVAEConfig(SCHEDULE, 32, 8, 32, (1, 1), 1)
# Of Infinity's four first square scales, and as many layers, so that plan files serve it too.
INFINITY = replace(TINY_INFINITY.transformer, depth=2, schedule=ScaleSchedule.square((1, 2, 4, 6)))
MODELS = {
    "l2norm": VARModel(VARConfig(*SHAPE), TOKENIZER),
    "without l2norm": VARModel(VARConfig(*SHAPE, attn_l2_norm=False), TOKENIZER),
    "shared aln": VARModel(VARConfig(*SHAPE, shared_aln=True), TOKENIZER),
    "infinity": replace(TINY_INFINITY, transformer=INFINITY),
}
SHAPES = {name: model.cache_shape(model.schedule) for name, model in MODELS.items()}
EVERYTHING = 21  # tokens that the last step can find in the cache, of Infinity; less of the others
BUDGETS = ("small", "middle", "everything")
TINY = SHAPES["l2norm"]
KEYS = picture_keys(jax.random.key(0), 2)


def explicit(path):
    """Policies of plan files: parts of scales, whole scales, formats of numbers, everything."""
    parts = {
        "int8": [[[], [0], [0], [0]], [[], [], [1], [1]]],
        "int4": [[[], [], [[1, 1, 3]], [2]], [[], [0], [0], []]],
        "bfloat16": [[[], [], [], []], [[], [], [], [[2, 1, 7]]]],
    }
    mixed = [{"numbers": name, "rows": rows, "heads": [0, 1]} for name, rows in parts.items()]
    files = {
        "small": [[[], [], [[1, 1, 3]], [[1, 1, 2], [2, 5, 9]]], [[], [0], [0], [0]]],
        "middle": [[[], [0], [0, 1], [0, [2, 1, 7]]], {"kind": "mixed", "parts": mixed}],
        "everything": [[[], [0], [0, 1], [0, 1, 2]]] * 2,
    }
    for budget, keep in files.items():
        (path / budget).write_text(json.dumps({"keep": keep}))
    return [Explicit(str(path / budget)) for budget in BUDGETS]


# Similarities of keys of unit length are about minus the root of two; others are lower.
ONLINE = {"condensed": 1, "theta": -1.4}
CASES = {
    "full": [Full()] * 3,
    "ams": [AMSKV(1, 5, 1), AMSKV(5, 10, 1, demanding_layers=(1,)), AMSKV(EVERYTHING, EVERYTHING)],
    "ams-fitted": [FittedAMSKV(6), FittedAMSKV(20), FittedAMSKV(10 * EVERYTHING)],
    "optimal": [Optimal(900), Optimal(3000), Optimal(10**6)],
    "ams-online": [OnlineAMSKV(*both, **ONLINE) for both in ((1, 5), (5, 10), (EVERYTHING,) * 2)],
    "sink": [Sink(1, 2), Sink(3, 6), Sink(5, 16)],
    "heads": [Heads(4, protected=1), Heads(9, protected=1), Heads(EVERYTHING)],
    "heatkv": [HeatKV(0.25, protected=1), HeatKV(0.6, protected=1), HeatKV(1.0)],
    "explicit": explicit,
}
"""Policies without a budget, or whose defaults do not suit so small a one."""


def budgeted(policy):
    return [policy().with_budget(tokens, TINY) for tokens in (3, 9, EVERYTHING)]


CASES |= {
    name: budgeted(policy)
    for name, policy in REGISTRY.items()
    if name not in CASES and issubclass(policy, Budgeted)
}


@cache
def stats(model):
    """Made-up statistics in which heads differ."""
    random = np.random.default_rng(0)
    density = np.tril(random.random((2, 2, 4, 4)))
    density /= density.sum(-1, keepdims=True)
    history = np.sort(random.random((2, 4, 5)), axis=-1)
    numbers = -random.random((2, 4))
    schedule = MODELS[model].schedule
    damage = random_damage(0, schedule, 2, 2)
    return LayerStats(schedule, numbers, numbers, density, history, damage=damage)


@cache
def params(model, dtype):
    return random_params(MODELS[model], seed=1, dtype=dtype)


@cache
def condition(model):
    """Two classes, or two texts of different lengths."""
    kind = MODELS[model]
    wanted = np.array([0, 3])
    if kind.takes == "prompts":
        shape = (9, kind.transformer.text_channels)
        features = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        wanted = TextFeatures(features, np.array([5, 4]))
    return kind.conditions(wanted).batch(np.arange(2))


def policies(directory):
    """The policies by name, for the three budgets; plan files are written to a directory."""
    made = CASES | {"explicit": explicit(directory)}
    return {name: dict(zip(BUDGETS, cases, strict=True)) for name, cases in made.items()}


def make_sampler(plan, model, dtype, **options):
    sampling = TokenSampling(top_k=1)
    return Sampler(MODELS[model], plan, sampling=sampling, dtype=dtype, trace=True, **options)


def controls(model, cfg=1.5):
    kind = MODELS[model]
    return kind.controls(kind.schedule, Drawing(cfg=cfg))


@cache
def draw(plan, model, dtype):
    """Draw two pictures with a look into the cache; equal plans only once."""
    sampler = make_sampler(plan, model, dtype, observe=Recorder())
    return sampler(params(model, dtype), condition(model), KEYS, controls(model))
