"""Bulk drawing: killed anywhere, it ends with the files of a run that nothing disturbed."""

import errno
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import typer
from PIL import Image

from amskv_jax.cli import app
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.files import locked
from amskv_jax.pipeline import load
from amskv_jax.shard_files import ShardFiles
from amskv_jax.shards import Progress, draw_shards

HERE = Path(__file__).parent


@dataclass
class Batch:
    """What a drawer yields, with pictures that tell their number."""

    first: int
    count: int

    def pictures(self):
        numbers = np.arange(self.first, self.first + self.count)
        return np.broadcast_to(numbers[:, None, None, None], (self.count, 4, 6, 3)).astype(np.uint8)

    def tokens(self):
        return np.arange(self.first, self.first + self.count, dtype=np.int32)[:, None] + np.arange(
            5
        )


@dataclass(frozen=True)
class Settings:
    seed: int = 0


BATCH = 4


def classes(numbers):
    return (numbers % 3).astype(np.int32)


class Run:
    """A run in a folder, which counts what it draws."""

    def __init__(self, folder, png=False, num=29, **options):
        path = folder / ("labels.npz" if png else "pictures.npz")
        self.files = ShardFiles(path, num, (4, 6), 5, tokens=True, png=png)
        self.options = {"settings": Settings(), **options}
        self.drawn, self.told = [], []

    def batches(self, first, count):
        assert first % BATCH == 0
        for start in range(first, first + count, BATCH):
            self.drawn.append(start)
            yield Batch(start, min(BATCH, first + count - start))

    def __call__(self, **options):
        return draw_shards(
            self.files,
            self.batches,
            batch=BATCH,
            classes=classes,
            tell=self.told.append,
            **self.options,
            **options,
        )


def contents(folder):
    """The bytes of every file but locks."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")
    }


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


KILLER = f"""
import os, pathlib, signal, sys
from dataclasses import dataclass
sys.path.insert(0, {str(HERE)!r})
assert "jax" not in sys.modules, "a process with JAX cannot fork"
source = open({str(HERE / "test_shards.py")!r}).read()
import numpy as np
from amskv_jax.shard_files import ShardFiles
from amskv_jax.shards import draw_shards
start, end = source.index("@dataclass"), source.index("def contents")
exec(compile(source[start:end], "test_shards", "exec"))

def dying(method, state, late):
    def call(*arguments, **options):
        state[0] -= 1
        if state[0] == 0 and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*arguments, **options)
        if state[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

def attempt(folder, png, count, late, process):
    "Draw in a child that kills itself before or after its count-th step; return whether it did."
    child = os.fork()
    if not child:
        state = [count]
        for name in ("open", "replace", "unlink"):
            setattr(pathlib.Path, name, dying(getattr(pathlib.Path, name), state, late))
        Batch.pictures = dying(Batch.pictures, state, late)
        Run(folder, png, 13, process=process)()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0

folder, png, processes, chained = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
kills = 0
for late in (False, True):
    count, going = 1, True
    while going:
        place = folder / "chained" if chained else folder / f"{{late}}-{{count}}"
        index = count % processes
        going = attempt(place, png, 1 + count % 7 if chained else count, late, (index, processes))
        kills += going
        going = going or (index < processes - 1 and not chained)
        if not chained:
            for other in range(processes):
                assert not attempt(place, png, 0, late, ((other + count) % processes, processes))
        count += 1
        if chained and count > 40:
            for other in range(processes):
                assert not attempt(place, png, 0, late, (other, processes))
            break
print(kills)
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("chained", [False, True])
def test_killed_at_every_step_nothing_is_lost_or_repeated(processes, chained, png, tmp_path):
    """A step is a file opened, renamed or removed, or a batch; each is killed before and after."""
    Run(tmp_path / "undisturbed", png, 13)()
    expected = contents(tmp_path / "undisturbed")
    arguments = [tmp_path / "killed", int(png), processes, int(chained)]
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-c", KILLER, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= (2 if chained else 20)
    for folder in (tmp_path / "killed").iterdir():
        assert contents(folder) == expected, folder


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


# The command

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


def page_commands():
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        yield from (shlex.split(line)[1:] for line in block.splitlines())


@pytest.mark.parametrize("words", list(page_commands()), ids=" ".join)
def test_commands_of_the_page_are_of_bulk_drawing(words):
    command = typer.main.get_command(app).commands[words[0]]
    context = command.make_context("amskv", words[1:])  # raises if an option is unknown
    assert context.params["num"] == 50_000
    assert context.params["shards"]


def test_linked_pages_exist():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE):
        assert (HERE.parent / "docs" / path).exists()
