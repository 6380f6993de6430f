"""A file imports from lower floors only, and nothing goes round in a circle."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import amskv_jax

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "amskv_jax.models": ROOT / "models",
    "amskv_jax.convert": ROOT / "convert",
    "amskv_jax.configs": ROOT / "configs",
    "amskv_jax": ROOT / "amskv_jax",
}
FLOORS = [
    ["errors", "words", "precision", "schedule", "hopper"],
    ["files", "resize", "numbers", "packed_weight", "float8", "stacked", "fused_attention"],
    ["attention", "similarity", "sampling", "mesh", "eight_bits"],
    ["plan"],
    ["policies", "models"],
    ["cache"],
    ["configs"],
    ["checkpoints"],
    ["convert", "text"],
    ["generate", "decode"],
    ["device_memory"],
    ["drawing"],
    ["pipeline", "bulk"],
    ["calibrate", "benchmark"],
    ["training"],
    ["reports", "evaluation"],
    ["study"],
    ["testing"],
    ["cli"],
]
"""Rooms, the lowest floor first. Rooms of one floor do not know each other."""


def modules():
    """Return every module's name and file."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found.setdefault(name, path)
    return found


MODULES = modules()


@cache
def imports(name):
    """Return the modules of this package which a module imports, wherever in it."""
    found = set()
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("amskv_jax"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found - {name}


def room(name):
    return name.split(".")[1]


def floor(name):
    return next(level for level, rooms in enumerate(FLOORS) if room(name) in rooms)


# The package itself gives names from everywhere, on first use.
INNER = sorted(name for name in MODULES if name != "amskv_jax")


@pytest.mark.parametrize("name", INNER)
def test_imports_come_from_lower_floors(name):
    for other in imports(name) - {"amskv_jax"}:
        same_room = room(other) == room(name)
        assert same_room or floor(other) < floor(name), f"{name} imports {other}"


def test_no_circles():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for other in sorted(imports(name) - {"amskv_jax"}):
            visit(other)
        path.pop()
        done.add(name)

    for name in INNER:
        visit(name)


def test_tests_import_no_tests():
    """Not even in the code that they hand to other processes; helpers are files of their own."""
    tests = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py")}
    for name, text in tests.items():
        imported = re.findall(r"\b(?:import|from) (test_\w+)", text)
        assert not tests.keys() & set(imported), f"{name} imports {imported}"


def test_public_names_are_no_modules():
    """A module, once it is imported, would hide the name."""
    assert not {f"amskv_jax.{name}" for name in amskv_jax.__all__} & MODULES.keys()


def test_files_are_short():
    for name, path in MODULES.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, name


def test_the_hallway_is_not_crowded():
    assert len(list((ROOT / "amskv_jax").glob("*.py"))) <= 22
