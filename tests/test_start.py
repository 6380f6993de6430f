"""What is compiled: nothing twice in a process, nothing at all where another has done it before."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.drawing import Drawer
from amskv_jax.generate import Sampler
from amskv_jax.policies import Full, Window
from amskv_jax.sampling import TokenSampling
from amskv_jax.testing import TINY_VAR

SAMPLER, DECODER = "jit(generate)", "jit(decode_pixels)"
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """Names of what is compiled from now on."""
    names = []

    def listen(event, seconds, **details):
        if event == COMPILED:
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_plans_and_policies_share_the_decoder(compiled):
    params, conditions = random_params(TINY_VAR), TINY_VAR.conditions(None)
    controls = TINY_VAR.controls(TINY_VAR.schedule, TINY_VAR.drawing)
    shape = TINY_VAR.cache_shape(TINY_VAR.schedule)

    def make(policy, batch):
        compiled.clear()
        sampler = Sampler(TINY_VAR, policy.plan(shape), sampling=TokenSampling(top_k=3))
        Drawer(sampler, params, conditions, controls, batch)
        return compiled

    assert make(Full(), 7) == [SAMPLER, DECODER]
    assert make(Window(window=2), 7) == [SAMPLER]
    assert make(Window(window=2), 7) == []  # of an equal plan nothing


SCRIPT = """
import collections, json, sys
import jax
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.pipeline import Pipeline
from amskv_jax.policies import H2O
from amskv_jax.testing import TINY_VAR

found = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **details: found.update([event]))
use_compilation_cache()
model = TINY_VAR
pipe = Pipeline(model, random_params(model), model.schedule, "float32", model.drawing)
drawer = pipe.drawer(pipe.sampler(H2O(budget=3)), pipe.conditions([1, 2]), 2)
pictures = drawer.draw(pipe.params, 3, 0, 2, pipe.controls())
kinds = "hits", "misses"
counts = [found[f"/jax/compilation_cache/cache_{kind}"] for kind in kinds]
print(json.dumps([*counts, int(pictures.sum())]))
"""


def test_another_process_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run():
        command = [sys.executable, "-c", SCRIPT]
        finished = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
        return json.loads(finished.stdout)

    hits, misses, total = run()
    assert misses >= 2  # sampler and decoder at least
    hits_later, misses_later, total_later = run()
    assert misses_later == 0
    assert hits_later == hits + misses
    assert total_later == total
