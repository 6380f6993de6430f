"""``amskv sample --num --shards``, and its page."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import typer
from checks import page_commands
from PIL import Image
from small_shards import contents

from amskv_jax.cli import app
from amskv_jax.pipeline import load

HERE = Path(__file__).parent
SAMPLE = ("sample", "--num", 23, "--batch-size", 4, "--shard-size", 5, "--seed", 3)

KILLED_SAMPLE = """
import os, signal, sys
from amskv_jax.cli import main
from amskv_jax.drawing import Drawer
kill, batches = int(sys.argv.pop(1)), Drawer.batches
def dying(self, *arguments):
    for number, batch in enumerate(batches(self, *arguments)):
        if number == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
Drawer.batches = dying
main()
"""


def test_killed_command_ends_with_the_pictures_of_an_undisturbed_one(amskv, checkpoint, tmp_path):
    arguments = [*SAMPLE, "--checkpoint", checkpoint, "--with-tokens", "--shards"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    for kill in (4, 2):
        command = [sys.executable, "-c", KILLED_SAMPLE, str(kill), *map(str, arguments)]
        done = subprocess.run(
            [*command, str(tmp_path / "a")],
            check=False,
            capture_output=True,
            env=environment,
            cwd=tmp_path,  # where no folder of sources hides the installed package
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "a").glob("*.shard-*"))
    done = amskv(*arguments, tmp_path / "a")
    assert done.code == 0, done.err
    assert "of 23 pictures are there, going on" in done.out
    assert amskv(*arguments, tmp_path / "b").code == 0
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name: hashlib.sha256(data).digest() for name, data in a.items()} == {
        name: hashlib.sha256(data).digest() for name, data in b.items()
    }


def test_command_draws_what_the_pipeline_draws(amskv, checkpoint, tmp_path):
    arguments = [*SAMPLE, "--checkpoint", checkpoint, "--labels", "4,0-1"]
    done = amskv(*arguments, "--with-tokens", "--shards", tmp_path / "npz")
    assert (done.code, done.err) == (0, "")
    assert "23 pictures in 0:" in done.out
    assert f"wrote {tmp_path / 'npz' / 'pictures.npz'}" in done.out
    with np.load(tmp_path / "npz" / "pictures.npz") as content:
        arrays = dict(content)
    np.testing.assert_array_equal(arrays["arr_1"], np.resize([4, 0, 1], 23))
    expected = load(checkpoint).sample(arrays["arr_1"], key=jax.random.key(3))
    np.testing.assert_array_equal(arrays["tokens"], expected.tokens)
    difference = arrays["arr_0"] - np.rint(255 * np.asarray(expected.pictures))
    assert np.abs(difference).max() <= 1  # another batch size rounds otherwise
    done = amskv(*arguments, "--format", "png", "--shards", tmp_path / "png")
    assert (done.code, done.err) == (0, "")
    for number in range(23):
        with Image.open(tmp_path / "png" / f"{number:06d}.png") as picture:
            np.testing.assert_array_equal(picture, arrays["arr_0"][number])
    done = amskv(*arguments, "--format", "png", "--shards", tmp_path / "png")
    assert "all pictures were there" in done.out


def test_command_forces_codes(amskv, checkpoint, tmp_path):
    """Of two pictures, over and over; another file is another run."""
    codes = np.arange(2 * 5).reshape(2, 5)
    np.savez(tmp_path / "codes.npz", codes=codes)
    arguments = [*SAMPLE, "--checkpoint", checkpoint, "--labels", "4,7", "--top-k", 1]
    arguments += ["--forced-codes", tmp_path / "codes.npz", "--shards", tmp_path / "a"]
    done = amskv(*arguments, "--with-tokens")
    assert (done.code, done.err) == (0, "")
    pipe = load(checkpoint)
    wanted, key = np.resize([4, 7], 4), jax.random.key(3)
    expected = pipe.sample(wanted, key=key, forced=np.resize(codes, (4, 5)), top_k=1)
    with np.load(tmp_path / "a" / "pictures.npz") as content:
        np.testing.assert_array_equal(content["tokens"][:4], expected.tokens)
        np.testing.assert_array_equal(content["tokens"][20:], expected.tokens[:3])
    np.savez(tmp_path / "codes.npz", codes=codes + 1)
    done = amskv(*arguments, "--with-tokens")
    assert done.code == 2
    assert "other settings: wanted.forced_codes (there " in done.err
    np.savez(tmp_path / "codes.npz", codes=np.resize(codes, (3, 5)))
    done = amskv(*arguments, "--with-tokens")
    assert done.code == 1
    assert "expected those of one picture, or of all 2, or 23" in done.err


def test_command_draws_shares(amskv, checkpoint, tmp_path):
    arguments = [*SAMPLE, "--checkpoint", checkpoint, "--shards"]
    done = amskv(*arguments, tmp_path / "a", "--share", "1/2")
    assert (done.code, done.err) == (0, "")
    assert "share 1/2 is drawn; the last process to end writes" in done.out
    assert len(list((tmp_path / "a").glob("*.shard-*"))) == 3
    done = amskv(*arguments, tmp_path / "a", "--share", "0/2")
    assert (done.code, done.err) == (0, "")
    assert amskv(*arguments, tmp_path / "b").code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_command_refuses_other_settings(amskv, checkpoint, tmp_path):
    arguments = [*SAMPLE, "--checkpoint", checkpoint, "--shards", tmp_path / "a"]
    assert amskv(*arguments).code == 0
    other = ("--labels", "1", "--policy", "window", "--cfg", 3)
    for options, named in [
        (other, ["drawing.cfg (there ", "cache (there ", "wanted.labels (there None, now [1])"]),
        (("--num", 24), ["settings: num (there 23, now 24)"]),
        (("--format", "png"), ["format (there npz, now png)"]),
    ]:
        done = amskv(*arguments, *options)
        assert done.code == 2
        assert all(name in done.err for name in named), done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num", 3), "--num and --shards belong together"),
        (("--shards", "x"), "--num and --shards belong together"),
        (("--with-tokens",), "--with-tokens and --share need --num and --shards"),
        (("--num", 3, "--shards", "x", "--share", "2/2"), "--share '2/2': expected which of how"),
        (("--num", 3, "--shards", "x", "--save-tokens", "t.npz"), "--with-tokens keeps tokens"),
        (("--num", 3, "--shards", "x", "--compare", "full"), "--compare has no meaning"),
    ],
)
def test_command_refuses_what_does_not_fit(options, message, amskv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = amskv("sample", *options)
    assert done.code == 2
    assert message in done.err
    assert not list(tmp_path.iterdir())


PAGE = (HERE.parent / "docs" / "bulk.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", list(page_commands(PAGE)), ids=" ".join)
def test_commands_of_the_page_are_of_bulk_drawing(words):
    command = typer.main.get_command(app).commands[words[0]]
    context = command.make_context("amskv", words[1:])  # raises if an option is unknown
    assert context.params["num"] == 50_000
    assert context.params["shards"]


def test_linked_pages_exist():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE):
        assert (HERE.parent / "docs" / path).exists()
