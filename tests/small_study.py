"""A small study without a model, which other processes run too."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from reference_weights import recipe_params
from small_evaluation import MEAN_COLOUR, MODEL, TOKENIZER, TRANSFORMER, make_stats

from amskv_jax import pipeline
from amskv_jax.evaluation.comparison import Comparison
from amskv_jax.evaluation.measures import Judge
from amskv_jax.files import read_json_lines
from amskv_jax.pipeline import Pipeline
from amskv_jax.study.study import Extent, run_study

COMPARISON = Comparison(num=12, dtype="float32")
EXTENT = Extent(sections="cdg", batch=5, compilers=2)


class FakeDrawer:
    """Draws noise that depends on plan, seed and picture, without a model.

    It fails if something is compiled while a device draws, or two threads draw on one device.
    """

    drawn = 0
    kill_at = -1
    lock = threading.Lock()
    drawing: ClassVar = []

    def __init__(self, sampler, params, conditions, controls, batch, **how):
        self.slots = sum(row.capacity for row in sampler.plan.rows)
        assert not self.drawing

    def draw(self, params, seed, first, count, controls):
        device = jax.config.jax_default_device
        assert device not in self.drawing
        self.drawing.append(device)
        with self.lock:
            if FakeDrawer.drawn == FakeDrawer.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            FakeDrawer.drawn += 1
        time.sleep(0.002)
        self.drawing.remove(device)
        generator = np.random.default_rng((self.slots, seed))
        return generator.integers(0, 256, (count, 12, 12, 3)).astype(np.uint8)


def load(dtype):
    return Pipeline(MODEL, {}, MODEL.schedule, dtype, MODEL.drawing, "weights")


def run(directory, **options):
    """Run a study with the fake drawer on statistics that are there already."""
    directory = Path(directory)
    directory.mkdir(exist_ok=True)
    if not (directory / "stats.npz").exists():
        make_stats(TRANSFORMER).save(directory / "stats.npz")
    real = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3)).astype(np.uint8)
    judge = Judge.of(MEAN_COLOUR, real)
    FakeDrawer.drawn = 0
    extent = options.pop("extent", EXTENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Drawer", FakeDrawer)
        return run_study(COMPARISON, extent, load, judge, directory, held_out=real[:20], **options)


def comparable(directory):
    records = {r["name"]: r for r in read_json_lines(directory / "results.jsonl")}
    return {
        name: {k: v for k, v in record.items() if k not in ("draw_seconds", "same_as", "device_id")}
        for name, record in records.items()
    }


def draw_window(directory):
    """Run two cells with a model; return their devices."""
    directory.mkdir(exist_ok=True)
    make_stats(TRANSFORMER).save(directory / "stats.npz")
    params = {"transformer": recipe_params(TRANSFORMER), "tokenizer": recipe_params(TOKENIZER)}
    model = Pipeline(MODEL, params, MODEL.schedule, "float32", MODEL.drawing, "weights")
    real = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3)).astype(np.uint8)
    extent = Extent(sections="d", only="d/window-75%", seeds=(0,), batch=5)
    judge = Judge.of(MEAN_COLOUR, real)
    assert run_study(COMPARISON, extent, lambda dtype: model, judge, directory) == []
    records = {r["name"]: r for r in read_json_lines(directory / "results.jsonl")}
    return [records[f"{name}/seed0"]["device_id"] for name in ("full/full", "d/window-75%")]
