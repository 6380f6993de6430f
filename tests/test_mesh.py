"""Several devices; what needs them is in ``mesh_checks``, for a process with eight."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import typer
from checks import message, page_commands

from amskv_jax.cli import app
from amskv_jax.errors import UsageError
from amskv_jax.mesh import MeshShape, gathered, mean_over, shards

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
FLAG = "--xla_force_host_platform_device_count=8"


@pytest.mark.slow
def test_on_eight_devices(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
    checks = Path(__file__).with_name("mesh_checks.py")
    options = ["-p", "no:cacheprovider", "--rootdir", checks.parent.parent]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, checks],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_benchmark(tmp_path):
    """On two devices, with a small model."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG.replace('8', '2')}"
    options = ["--data", "var-tiny:2", "--model", "var-tiny:2", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "mesh.py", *options, "--repeats", "1", "--out", "."],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "mesh.json").read_text())
    assert (found["devices"], found["float32"]) == (2, True)
    assert set(found["compared"].values()) == {1.0}
    counted = {name: arm["all_reduces"] for name, arm in found["arms"].items()}
    names = [f"var-tiny, {mesh}" for mesh in ("one device, batch 2", "data=2, batch 4")]
    assert counted == {names[0]: 0, names[1]: 0, "var-tiny, model=2, batch 2": 8}
    assert (tmp_path / "mesh.md").read_text().count("| var-tiny | ") == 3


@pytest.mark.parametrize("words", list(page_commands(PAGE)), ids=" ".join)
def test_commands_of_the_page_exist_and_name_meshes(words):
    command = typer.main.get_command(app).commands[words[0]]
    context = command.make_context("amskv", words[1:])  # raises if an option is unknown
    assert MeshShape.parse(context.params["mesh"]).size > 1


def test_meshes_in_words():
    assert MeshShape.parse("data=4,model=2") == MeshShape.parse(" model=2, data=4 ")
    assert MeshShape.parse("model=2") == MeshShape(1, 2)
    assert MeshShape.parse(None) is None
    assert str(MeshShape(4, 2)) == "data=4,model=2"
    assert MeshShape(4, 2).size == 8
    assert [MeshShape(4).filled(batch) for batch in (1, 4, 5)] == [4, 4, 8]


@pytest.mark.parametrize("text", ["", "4", "data=4,data=2", "data=-1", "rows=2", "data=2,model="])
def test_words_that_name_no_mesh(text):
    with pytest.raises(UsageError, match="expected data=N, model=M or data=N,model=M"):
        MeshShape.parse(text)


def test_sizes_that_cannot_be():
    assert message(MeshShape, 0) == "a mesh of data=0: expected 1 or more"
    said = message(MeshShape(data=9).place, "transformer/bias", None)
    assert "takes 9 devices, this host has" in said


def test_a_mesh_survives_pickling_after_use():
    shape = MeshShape()
    assert shape.mesh.size == 1
    assert pickle.loads(pickle.dumps(shape)) == shape


def test_outside_of_a_mesh_nothing_happens():
    x = jax.numpy.ones((2, 3))
    assert shards() == shards("data") == 1
    assert gathered(x, 1) is x
    assert mean_over(x, "data", "model") is x
