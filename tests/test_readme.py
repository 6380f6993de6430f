"""What the README and CONTRIBUTING show must work."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from amskv_jax.checkpoints import embedded
from amskv_jax.checkpoints.packed import pack_checkpoint
from amskv_jax.cli import app
from amskv_jax.policies import REGISTRY

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands():
    for line in "".join(blocks("sh")).splitlines():
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
    """With a small model in place of those that the README names."""
    (tmp_path / "var-d30").symlink_to(checkpoint)
    pack_checkpoint(checkpoint, tmp_path / "var_cifar10.safetensors")
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["out"].tokens.shape == (2, 14)
    assert "MemoryReport(plan=" in capsys.readouterr().out


def test_every_policy_has_a_row():
    rows = re.findall(r"^\| `([a-z][\w-]*)` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted(REGISTRY)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_linked_and_named_files_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named = re.findall(r"`((?:amskv_jax|convert|configs|tests)/[\w/]+\.py)`", text)
    missing = [path for path in linked + named if not (ROOT / path).exists()]
    assert not missing
