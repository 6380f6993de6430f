"""What the README and CONTRIBUTING show must work."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from infinity_checkpoints import save_sources

from amskv_jax.checkpoints import embedded
from amskv_jax.checkpoints.packed import pack_checkpoint
from amskv_jax.cli import app
from amskv_jax.convert import convert
from amskv_jax.policies import REGISTRY

ROOT = Path(__file__).parent.parent
README, INFINITY = (
    (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/infinity.md")
)


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands():
    for line in "".join(blocks("sh", README + INFINITY)).splitlines():
        for part in line.split("&&"):
            words = shlex.split(part)
            if Path(words[0]).name == "amskv":
                yield words[1:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_exist_and_take_their_options(words):
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context("amskv", list(words))  # raises if an option is unknown or missing


def test_python_runs(checkpoint, tmp_path, monkeypatch, capsys):
    """With small models in place of those that the pages name."""
    (tmp_path / "var-d30").symlink_to(checkpoint)
    convert("infinity", save_sources(tmp_path), tmp_path / "infinity-2b")
    pack_checkpoint(checkpoint, tmp_path / "var_cifar10.safetensors")
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["out"].tokens.shape == (2, 14)
    for block in blocks("python", INFINITY):
        exec(block, names)
    assert names["out"].pictures.shape == (1, 384, 672, 3)
    assert "MemoryReport(plan=" in capsys.readouterr().out


def test_every_policy_has_a_row():
    rows = re.findall(r"^\| `([a-z][\w-]*)` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted(REGISTRY)


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/infinity.md"]
)
def test_linked_and_named_files_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named = re.findall(r"`((?:amskv_jax|convert|configs|tests)/[\w/]+\.py)`", text)
    missing = [path for path in linked if not (ROOT / name).parent.joinpath(path).exists()]
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing
