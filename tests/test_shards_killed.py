"""Bulk drawing, killed at every step, ends with the files of a run that nothing disturbed."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_shards import Run, contents

HERE = Path(__file__).parent


KILLER = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(HERE)!r})
from small_shards import Batch, Run
assert "jax" not in sys.modules, "a process with JAX cannot fork"

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


@pytest.mark.parametrize("png", [False, True], ids=["npz", "png"])
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
