"""What stayed as it was when the package was rebuilt, see golden/recorded/README.md."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from amskv_jax.checkpoints.embedded import find_stats
from amskv_jax.generate import picture_keys
from amskv_jax.pipeline import load
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import REGISTRY

RECORDED = Path(__file__).parent / "golden/recorded"
PLANS = json.loads((RECORDED / "plans.json").read_text(encoding="utf-8"))
ROUNDING = 1e-4
"""Logits nearer to each other than this may change places when a compiler rounds otherwise."""
SELECTING = ("scalekv",)
"""Policies which rank tokens by attention while they draw: where two are as near, another processor
may keep the other one, and a token of the last scale may change with it."""


def summary(printed):
    """The plan's note, the line of its bytes, and a hash of everything, whatever the layout."""
    lines = [" ".join(line.split()) for line in printed.splitlines() if line.strip()]
    plan = [line for line in lines if line.startswith("this plan")]
    return [lines[0], *plan, hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]]


@pytest.mark.parametrize("options", PLANS)
def test_plans_and_bytes_are_those_that_were_recorded(amskv, options):
    finished = amskv("plan", *options.split())
    assert summary(finished.out + finished.err) == PLANS[options]


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED / "tokens.npz") as tokens:
        return dict(tokens)


@pytest.fixture(scope="module")
def pipe():
    return load(dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(f"{policy}/greedy" for policy in ("full", "ams", "window", "sink", "h2o", "scalekv")),
        "heads/greedy",
        "full/sampled",
    ],
)
def test_tokens_of_the_embedded_model_are_those_that_were_recorded(name, recorded, pipe):
    policy, how = name.split("/")
    greedy = {"top_k": 1, "top_p": 0.0} if how == "greedy" else {"top_k": 900, "top_p": 0.96}
    drawing = replace(pipe.drawing, cfg=6.0, **greedy)
    stats = LayerStats.load(find_stats("var-cifar10"))
    options = {"patterns": 8} if policy == "heads" else {}  # what was its default
    sampler = pipe.sampler(REGISTRY[policy](**options), drawing, stats=stats, trace=True)
    expected = recorded[name]
    count = len(expected)
    keys = picture_keys(jax.random.key(0), count)
    labels = np.arange(count, dtype=np.int32)
    out = sampler(pipe.params, labels, keys, pipe.controls(drawing))
    tokens, logits = np.asarray(out.tokens), np.asarray(out.logits)
    schedule = pipe.schedule
    for picture, place in np.argwhere(tokens != expected):
        # No step reads the last scale, so nothing else can come of a difference there.
        assert how == "greedy" and place >= schedule.offsets[-2], (picture, place)
        own, other = logits[picture, place, [tokens[picture, place], expected[picture, place]]]
        assert own - other < ROUNDING or policy in SELECTING, (picture, place, own - other)
    if policy in SELECTING:
        assert (tokens != expected).sum() <= 1
