"""What is left by processes that were killed while they wrote."""

import os
import signal
import subprocess
import sys

import pytest

from amskv_jax.files import new_directory, replacing

WRITER = """
import sys, time
from pathlib import Path
from amskv_jax.files import new_directory, replacing

make = {"folder": lambda path: new_directory(path, 10), "file": replacing}[sys.argv[1]]
with make(Path(sys.argv[2])) as temporary:
    (temporary / "half" if sys.argv[1] == "folder" else temporary).write_text("half")
    print("writing", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that writes and does not end; it is killed after the test."""
    started = []

    def start(kind, path):
        command = [sys.executable, "-c", WRITER, kind, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def write(kind, path):
    if kind == "folder":
        with new_directory(path, 10) as temporary:
            (temporary / "whole").write_text("whole")
    else:
        with replacing(path) as temporary:
            temporary.write_text("whole")


@pytest.mark.parametrize(("kind", "name"), [("folder", "out"), ("file", "out[1].npz")])
def test_what_a_killed_process_left_is_removed_by_the_next(kind, name, start, tmp_path, capsys):
    path = tmp_path / name
    killed = start(kind, path)
    running = start(kind, path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = sorted(tmp_path.iterdir())
    assert len(left) == 2
    others = [tmp_path / f".other.{killed.pid}.tmp", tmp_path / f".{name}.old.tmp"]
    for other in others:
        other.mkdir()

    write(kind, path)
    gone = next(place for place in left if str(killed.pid) in place.name)
    (kept,) = (place for place in left if str(running.pid) in place.name)
    assert sorted(tmp_path.iterdir()) == sorted([path, kept, *others])
    said = capsys.readouterr().err
    assert said == f"removed {gone}, left by a process that was killed\n"


def test_a_process_that_ended_is_told_from_one_that_runs(tmp_path, capsys):
    (tmp_path / f".out.{2**22 + 7}.tmp").mkdir()  # Linux numbers processes below
    (tmp_path / ".out.99999999999999999999.tmp").mkdir()
    (tmp_path / f".out.{os.getppid()}.tmp").mkdir()
    write("folder", tmp_path / "out")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f".out.{os.getppid()}.tmp", "out"]
    assert capsys.readouterr().err.count("removed") == 2
