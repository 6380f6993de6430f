"""The wheel: what is in it, and that it works where nothing of the source tree is in reach."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    "amskv_jax": "amskv_jax",
    "models": "amskv_jax/models",
    "convert": "amskv_jax/convert",
    "configs": "amskv_jax/configs",
}
"""Folder of the source tree -> where it is installed."""

SCRIPT = """
import sys
from pathlib import Path

import amskv_jax

assert "jax" not in sys.modules, "importing the package must not import JAX"

import jax
import amskv_jax.convert
from amskv_jax import configs
from amskv_jax.models.var.transformer import VAR

place = Path(sys.argv[1])
for module in (amskv_jax, amskv_jax.convert, configs, sys.modules[VAR.__module__]):
    assert Path(module.__file__).is_relative_to(place), module.__file__
assert "var-d30" in configs.names()
for name in amskv_jax.__all__:
    getattr(amskv_jax, name)
print(amskv_jax.__version__)
"""


def run(*command, cwd):
    """Run a command that sees neither the source tree nor this environment's settings of Python."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the source tree stays clean."""
    source = tmp_path_factory.mktemp("source")
    for folder in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    run(sys.executable, "-c", build, cwd=source)
    (path,) = (source / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An empty environment with the wheel, and with the dependencies of this one in reach."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False)
    python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=directory)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", purelib, cwd=directory).strip())
    # Folders named in a .pth file come after the environment's own, and .pth files in them are not
    # read, so that an editable installation of this package stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, site


def test_every_module_and_nothing_else_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    weights = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "amskv_jax/weights").rglob("*.*")
    }
    assert found == modules | weights | {"amskv_jax/py.typed"}


def test_one_name_is_installed_and_the_licence_travels_along(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"amskv_jax"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_works_from_another_folder(environment, tmp_path):
    python, site = environment
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert run(python, script, site, cwd=tmp_path) == "0.1.0\n"


def test_the_command_is_installed(environment, tmp_path):
    python, _ = environment
    command = python.parent / "amskv"
    out = run(command, "plan", "--model", "var-tiny", "--policy", "ams", cwd=tmp_path)
    assert "AMS-KV: C_min" in out
    assert list(tmp_path.iterdir()) == []
