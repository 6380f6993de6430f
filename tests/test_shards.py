"""Bulk drawing: shards of the pictures, whole or drawn again, whatever happens to the folder."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from small_shards import BATCH, Batch, Run, Settings, contents

from amskv_jax.bulk.files import ShardFiles
from amskv_jax.bulk.shards import Progress
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.files import locked


@pytest.fixture(params=[False, True], ids=["npz", "png"])
def png(request):
    return request.param


@pytest.fixture
def undisturbed(png, tmp_path):
    folder = tmp_path / "undisturbed"
    assert Run(folder, png)()
    return contents(folder)


def test_files_are_in_the_layout_of_openais_evaluator(tmp_path):
    assert Run(tmp_path)()
    assert sorted(contents(tmp_path)) == ["pictures.npz", "settings.json"]
    with np.load(tmp_path / "pictures.npz") as content:
        assert content.files == ["arr_0", "arr_1", "tokens"]
        assert content["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(content["arr_0"], Batch(0, 29).pictures())
        np.testing.assert_array_equal(content["arr_1"], np.arange(29) % 3)
        np.testing.assert_array_equal(content["tokens"], Batch(0, 29).tokens())


def test_png_files_hold_the_pictures(tmp_path):
    assert Run(tmp_path, png=True)()
    names = [f"{number:06d}.png" for number in range(29)]
    assert sorted(contents(tmp_path)) == [*names, "labels.npz", "settings.json"]
    for number, name in enumerate(names):
        with Image.open(tmp_path / name) as picture:
            np.testing.assert_array_equal(picture, Batch(number, 1).pictures()[0])
    with np.load(tmp_path / "labels.npz") as content:
        assert content.files == ["numbers", "arr_1", "tokens"]
        np.testing.assert_array_equal(content["numbers"], np.arange(29))


def test_batches_are_filled_to_the_last_picture_and_drawn_once(tmp_path):
    run, seen = Run(tmp_path), []
    run(update=seen.append)
    assert run.drawn == list(range(0, 29, BATCH))
    assert [progress.done for progress in seen] == [0, *range(4, 29, 4), 29]
    assert seen[1].rate is None
    assert seen[-1].seconds_left == 0
    assert Progress(10, 30, 4.0).seconds_left == 5
    assert Run(tmp_path)()
    again = Run(tmp_path)
    assert again()
    assert again.drawn == []


def test_processes_draw_their_shares(undisturbed, png, tmp_path):
    folder = tmp_path / "shared"
    runs = [Run(folder, png, process=(index, 3)) for index in range(3)]
    assert [runs[index]() for index in (2, 0, 1)] == [False, False, True]
    assert contents(folder) == undisturbed
    assert [run.drawn for run in runs] == [[0, 4, 8], [8, 12, 16], [20, 24, 28]]


def test_one_process_goes_on_with_what_several_left(undisturbed, png, tmp_path):
    folder = tmp_path / "shared"
    assert not Run(folder, png, process=(1, 2))()
    last = Run(folder, png)
    assert last()
    assert last.drawn == [0, 4, 8, 12]
    assert contents(folder) == undisturbed


class StoppedError(Exception):
    pass


def stop_after(count, run):
    """Let a run draw so many batches, and stop."""
    batches = run.batches

    def stopping(first, wanted):
        for batch in batches(first, wanted):
            if len(run.drawn) > count:
                raise StoppedError
            yield batch

    run.batches = stopping
    with pytest.raises(StoppedError):
        run()


def test_a_damaged_shard_is_drawn_again(undisturbed, png, tmp_path):
    folder = tmp_path / "damaged"
    stop_after(6, Run(folder, png))
    shards = sorted(folder.glob("*.shard-*.npz"))
    assert len(shards) == 4
    shards[1].write_bytes(shards[1].read_bytes()[:-30])
    content = bytearray(shards[3].read_bytes())
    content[len(content) // 3] ^= 1
    shards[3].write_bytes(content)
    again = Run(folder, png)
    assert again()
    assert [line.partition(" is damaged")[0] for line in again.told] == [
        str(shards[1]),
        str(shards[3]),
    ]
    assert again.drawn == [4, 8, 12, 16, 20, 24, 28]
    assert contents(folder) == undisturbed


def test_a_shard_with_other_arrays_is_drawn_again(tmp_path):
    stop_after(6, Run(tmp_path))
    np.savez(tmp_path / "pictures.shard-00000.npz", arr_0=np.zeros((5, 4, 6, 3), np.uint8))
    again = Run(tmp_path)
    assert again()
    assert "it holds arr_0.npy): drawing it again" in again.told[0]


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: b"", None])
def test_a_damaged_or_missing_png_is_drawn_again(damage, tmp_path):
    assert Run(tmp_path, png=True)()
    before, path = contents(tmp_path), tmp_path / "000007.png"
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    again = Run(tmp_path, png=True)
    assert again()
    assert len(again.told) == bool(damage)
    assert again.drawn == [4, 8]
    assert contents(tmp_path) == before


def test_the_damaged_whole_is_left_to_its_owner(tmp_path):
    assert Run(tmp_path)()
    path = tmp_path / "pictures.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AmskvError, match=r"pictures.npz is damaged .*remove it to draw it again"):
        Run(tmp_path)()


def test_foreign_files_are_left_alone(undisturbed, png, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / ".notes.tmp").write_text("mine")
    assert Run(folder, png)()
    expected = {**undisturbed, "notes.txt": b"mine", ".notes.tmp": b"mine"}
    assert contents(folder) == expected


@pytest.mark.parametrize("name", ["cat.png", "000029.png", "7.png", "labels.shard-00099.npz"])
def test_files_that_would_be_taken_for_ours_are_refused(name, tmp_path):
    assert Run(tmp_path, png=True)()
    (tmp_path / name).write_text("mine")
    with pytest.raises(AmskvError, match=f"holds {name}, not of these 29 pictures: move such"):
        Run(tmp_path, png=True)()
    assert (tmp_path / name).read_text() == "mine"


def test_files_of_our_names_without_settings_are_refused(tmp_path):
    (tmp_path / "pictures.npz").write_text("mine")
    with pytest.raises(AmskvError, match=r"holds pictures.npz, but no settings.json"):
        Run(tmp_path)()
    assert (tmp_path / "pictures.npz").read_text() == "mine"
    (tmp_path / "pictures.npz").unlink()
    (tmp_path / "pictures.shard-00002.npz").mkdir()
    with pytest.raises(AmskvError, match=r"holds pictures.shard-00002.npz, but no"):
        Run(tmp_path)()


def test_a_folder_of_other_settings_is_refused_by_name(tmp_path):
    stop_after(3, Run(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"other settings: seed \(there 0, now 1\)"):
        Run(tmp_path, settings=Settings(1))()
    assert contents(tmp_path) == before


def test_a_full_disk_is_said_once_and_loses_nothing(undisturbed, png, tmp_path, monkeypatch):
    folder = tmp_path / "full"
    save, calls = np.savez, []

    def full(file, **arrays):
        calls.append(file)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(AmskvError, match=r"shard-00002.npz: .*No space left .*make room"):
            Run(folder, png)()
    assert {path.name for path in folder.glob("*.shard-*")} >= {
        f"{'labels' if png else 'pictures'}.shard-0000{index}.npz" for index in (0, 1)
    }
    assert not list(folder.glob(".*.tmp"))
    again = Run(folder, png)
    assert again()
    assert 0 not in again.drawn
    assert contents(folder) == undisturbed


def test_too_small_a_disk_is_refused_at_once(tmp_path):
    run = Run(tmp_path, num=10**15)
    run.files = ShardFiles(run.files.path, 10**15, (256, 256), 10**15)
    with pytest.raises(AmskvError, match=r"it needs .* GiB, the disk has .* GiB left"):
        run()
    assert run.drawn == []


HOLDER = """
import sys, time
from pathlib import Path
from amskv_jax.files import locked
with locked(*map(Path, sys.argv[1:])):
    print("locked", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("names", [["lock"], ["lock", "0.lock"]])
def test_one_process_at_a_time_and_the_dead_do_not_count(names, tmp_path):
    paths = [str(tmp_path / f".pictures.{name}") for name in names]
    command = [sys.executable, "-c", HOLDER, *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        for process in [(0, 1), (0, 2)]:
            with pytest.raises(AmskvError, match=r"another process draws into .*choose another"):
                Run(tmp_path, process=process)()
        if len(names) == 2:  # the other of two
            assert not Run(tmp_path, process=(1, 2))()
        holder.send_signal(signal.SIGKILL)
    assert Run(tmp_path)()


def test_a_disk_without_locks_is_mentioned(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr("amskv_jax.files.fcntl.flock", flock)
    lines = []
    with locked(tmp_path / "lock", tell=lines.append):
        pass
    assert "cannot lock" in lines[0]
