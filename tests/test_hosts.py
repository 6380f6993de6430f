"""Processes that ``jax.distributed`` brings together draw into one folder, and are killed there.

``AMSKV_KILLS=10 pytest tests/test_hosts.py`` kills as often, at moments of the whole run.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

KILLS = int(os.environ.get("AMSKV_KILLS", "0"))
COMMAND = """
import sys, time
from amskv_jax.cli import main
from amskv_jax.drawing import Drawer
seconds, batches = float(sys.argv.pop(1)), Drawer.batches
def slow(self, *arguments):
    for batch in batches(self, *arguments):
        time.sleep(seconds)
        yield batch
Drawer.batches = slow
main()
"""
SAMPLE = ("sample", "--num", 46, "--batch-size", 4, "--shard-size", 5, "--with-tokens")


class Hosts:
    """Starts as many processes, each as if on a host of its own."""

    def __init__(self, count, checkpoint, cwd, devices=1):
        self.count, self.cwd = count, cwd
        self.options = [*SAMPLE, "--checkpoint", checkpoint]
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        self.environment = {
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, folder, *options, seconds=0.0):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        words = [*self.options, "--shards", folder, *options]
        return [
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(seconds), *map(str, [*words, *share])],
                env={**self.environment, "JAX_COORDINATOR_ADDRESS": address},
                cwd=self.cwd,  # where no folder of sources hides the installed package
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for share in self.shares()
        ]

    def shares(self):
        if self.count == 1:
            return [[]]
        return [["--distributed", "--share", f"{i}/{self.count}"] for i in range(self.count)]

    def run(self, folder, *options, code=0):
        """Draw, and return what the processes printed."""
        outputs = []
        for process in self.start(folder, *options):
            out, err = process.communicate(timeout=300)
            assert process.returncode == code, out + err
            outputs.append(err if code else out)
        return outputs


def contents(folder):
    """The bytes of every file but locks."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")
    }


@pytest.fixture(scope="module")
def undisturbed(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "undisturbed"
    Hosts(1, checkpoint, folder.parent).run(folder)
    return folder


def kill(processes, wait):
    """Kill all when the waiting is over; return whether all were at work."""
    wait(processes)
    running = [process.poll() is None for process in processes]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    return all(running)


def some_time_after_the_first_shard(folder, moments):
    def wait(processes):
        while not list(folder.glob("*.shard-*")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))

    return wait


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2] if KILLS else [2])
def test_killed_hosts_end_with_the_pictures_of_an_undisturbed_run(
    count, checkpoint, undisturbed, tmp_path
):
    hosts, moments = Hosts(count, checkpoint, tmp_path), random.Random(count)
    kills, folders, span = 0, [tmp_path / "0"], 0.0
    if not KILLS:
        kills += kill(
            hosts.start(folders[0], seconds=0.15),
            some_time_after_the_first_shard(folders[0], moments),
        )
        assert kills == 1
    else:
        begin = time.monotonic()
        for process in hosts.start(tmp_path / "span", seconds=1.0):
            process.communicate()
        span = time.monotonic() - begin
    while kills < KILLS:
        seconds = moments.uniform(0, span)
        done = kill(
            hosts.start(folders[-1], seconds=1.0),
            lambda processes, seconds=seconds: time.sleep(seconds),
        )
        kills += done
        shards = len(list(folders[-1].glob("*.shard-*")))
        print(f"{count} hosts after {seconds:.2f} of {span:.2f} s: {done}, {shards} shards")
        if not done:  # all is drawn: begin again
            hosts.run(folders[-1])
            folders.append(tmp_path / str(len(folders)))
    printed = hosts.run(folders[-1])
    if not KILLS:
        assert re.search(r"\d+ of \d+ pictures of this share are there, going on", printed[0])
        assert len(list(folders[0].glob(".*.tmp"))) == 0
    for folder in folders:
        assert contents(folder) == contents(undisturbed)


@pytest.mark.slow
def test_hosts_with_meshes_of_their_own(checkpoint, undisturbed, tmp_path):
    """Another mesh rounds otherwise; one process speaks for all."""
    hosts = Hosts(2, checkpoint, tmp_path, devices=2)
    first, second = hosts.run(tmp_path / "a", "--mesh", "data=2")
    assert "compiled in" in first
    assert "20 pictures in 0:" in first or "25 pictures in 0:" in first
    assert [line for line in second.splitlines() if not line.startswith("wrote")] == []
    assert (first + second).count("wrote ") == 1
    with (
        np.load(tmp_path / "a" / "pictures.npz") as found,
        np.load(undisturbed / "pictures.npz") as expected,
    ):
        np.testing.assert_array_equal(found["tokens"], expected["tokens"])
        np.testing.assert_array_equal(found["arr_1"], expected["arr_1"])
        assert np.abs(found["arr_0"].astype(int) - expected["arr_0"]).max() <= 1
    for said in hosts.run(tmp_path / "a", "--mesh", "data=2", "--seed", "5", code=2):
        assert "other settings: seed (there 0, now 5)" in said


def test_processes_that_do_not_know_of_each_other(amskv, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    words = "sample", "--num", 3, "--shards", tmp_path / "a", "--distributed"
    code = "from amskv_jax.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "--share", "0/2"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "set JAX_COORDINATOR_ADDRESS=HOST:PORT, the same for all" in done.stderr
    assert not (tmp_path / "a").exists()
    done = amskv("sample", "--distributed")
    assert done.code == 2
    assert "--distributed needs --num and --shards" in done.err
