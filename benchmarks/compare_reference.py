"""Compare this package with the PyTorch references of VAR and Infinity, side by side on one device.

    python benchmarks/compare_reference.py --var-checkout VAR --infinity-checkout Infinity \
        --models var-d30,infinity-2b --batches 64,1 --policies full,ams --out comparison

Every measurement is a process of its own with a time limit, one after the other on the same device:
random weights of the real shapes, guidance on, the transformer without the decoder, medians of
repeated calls, peak memory by each framework's own allocator with nothing set aside beforehand. The
reference runs from the user's own checkout, and so does the code of ScaleKV and HeatKV, which are
forks of Infinity. What is found is printed and written at once; what fails becomes an entry of the
table.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparison_table import markdown
from forks import FORKS, SIZES
from shapes import model_of, shape_of

from amskv_jax.policies.grammar import parse_policies

WARM = """compile our arms first, N at a time, into the persistent cache: less time for all of them
together, but the compiler then tries its kernels on a busy device"""
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Arm:
    """One measurement.

    Attributes:
      side: "reference" or "ours".
      model: name of the model.
      batch: pictures at once.
      policy: what our cache keeps, as it was spelled; "" for the reference.
      method: of the reference's fork, a name of ``FORKS``; "" for the reference itself, and ours.
    """

    side: str
    model: str
    batch: int
    policy: str = ""
    method: str = ""


class Comparison:
    """Runs arms one after the other and keeps what they found in two files.

    Attributes:
      found: everything so far, as it is written to ``comparison.json``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + 60 * options.minutes
        self.folder: Path = options.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cache = options.cache or Path(tempfile.mkdtemp(prefix="compare-cache-"))
        self.found: dict[str, Any] = {
            "settings": {
                "repeats": options.repeats,
                "dtype": options.dtype,
                "cache_dtype": options.cache_dtype,
                "compiled_in_parallel": options.warm,
            },
            "ceiling": None,
            "compiled": [],
            "arms": [],
        }

    def run(self, arms: Sequence[Arm]) -> None:
        """Measure the ceiling, then all arms, those of the reference first."""
        ceiling = ["our_side.py", "ceiling", "--size", str(self.options.ceiling_size)]
        self.found["ceiling"] = self.process(ceiling, self.options.arm_minutes * 60)
        self.write(self.found["ceiling"])
        for arm in (arm for arm in arms if arm.side == "reference"):
            self.add(arm, self.process(self.reference(arm), self.options.arm_minutes * 60))
        ours = [arm for arm in arms if arm.side == "ours"]
        cold = self.warm(ours)
        for arm in ours:
            result = self.process(self.ours("arm", arm), self.options.arm_minutes * 60)
            if "compile_seconds" in result:
                warmed = "compile_seconds" in cold.get(arm, {})
                loaded = result.pop("compile_seconds")
                result["cold_compile_seconds"] = cold[arm]["compile_seconds"] if warmed else loaded
                result["cached_compile_seconds"] = loaded if warmed else None
            self.add(arm, result)

    def warm(self, arms: Sequence[Arm]) -> dict[Arm, dict[str, Any]]:
        """Compile arms in parallel into the persistent compilation cache."""
        if not self.options.warm or not arms:
            return {}
        results: dict[Arm, dict[str, Any]] = {}
        deadline = time.monotonic() + 60 * self.options.warm_minutes

        def compiled(arm: Arm) -> dict[str, Any]:
            return self.process(self.ours("compile", arm), deadline - time.monotonic())

        with ThreadPoolExecutor(self.options.warm) as executor:
            running = {executor.submit(compiled, arm): arm for arm in arms}
            for done in as_completed(running):
                results[running[done]] = done.result()
                self.found["compiled"].append({**asdict(running[done]), **done.result()})
                self.write(self.found["compiled"][-1])
        return results

    def add(self, arm: Arm, result: dict[str, Any]) -> None:
        """Keep what an arm found."""
        self.found["arms"].append({**asdict(arm), **result})
        self.write(self.found["arms"][-1])

    def write(self, latest: dict[str, Any]) -> None:
        """Print the latest finding and write all of them."""
        print(json.dumps(latest), flush=True)
        (self.folder / "comparison.json").write_text(json.dumps(self.found, indent=2) + "\n")
        (self.folder / "comparison.md").write_text(markdown(self.found))

    def reference(self, arm: Arm) -> list[str]:
        """Return the command of an arm of the reference."""
        shape = shape_of(model_of(arm.model))
        checkout = getattr(self.options, f"{arm.method or shape['kind']}_checkout")
        command = ["reference_side.py", "--checkout", str(checkout), "--shape", json.dumps(shape)]
        if arm.method:
            command += ["--method", arm.method, "--size", SIZES[arm.model]]
        command += ["--batch", str(arm.batch), "--repeats", str(self.options.repeats)]
        return command + (["--eager"] if self.options.reference_eager else [])

    def ours(self, task: str, arm: Arm) -> list[str]:
        """Return the command of one of our arms."""
        options = self.options
        command = ["our_side.py", task, "--model", arm.model, "--policy", arm.policy]
        command += ["--batch", str(arm.batch), "--repeats", str(options.repeats)]
        command += ["--dtype", options.dtype, "--attention", options.attention]
        return command + (["--cache-dtype", options.cache_dtype] if options.cache_dtype else [])

    def process(self, command: list[str], limit: float) -> dict[str, Any]:
        """Run a script of this folder; what went wrong is under "error".

        Args:
          command: its file and arguments.
          limit: seconds after which it is stopped, together with all that it started.
        """
        limit = min(limit, self.deadline - time.monotonic())
        if limit < 1:
            return {"error": "not begun: the time for it was over"}
        python = sys.executable
        if command[0] == "reference_side.py" and self.options.reference_python:
            python = self.options.reference_python
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            with (Path(folder) / "log").open("w+") as log:
                running = subprocess.Popen(
                    [python, str(HERE / command[0]), *command[1:], "--out", str(out)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment(),
                    start_new_session=True,
                )
                try:
                    code = running.wait(limit)
                except subprocess.TimeoutExpired:
                    return {"error": f"not done after {limit:.0f} s"}
                finally:
                    _stop(running)
                if out.exists():
                    result: dict[str, Any] = json.loads(out.read_text())
                    return result
                log.seek(0)
                return _failure(code, log.read())

    def environment(self) -> dict[str, str]:
        """Return what a process of ours needs to be measured; the reference's ignores it."""
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # JAX's own is 0.75
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }


def _stop(running: subprocess.Popen[bytes]) -> None:
    """Stop a process and all that it started, so that the next one has the device for itself."""
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def _failure(code: int, log: str) -> dict[str, Any]:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if code == -signal.SIGKILL:
        reason = "killed, most likely for want of memory"
    else:
        reason = next((line for line in reversed(lines) if "Error" in line), f"exit status {code}")
    return {"error": reason[:300], "log": lines[-20:]}


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """Return what the command line asks for; a batch for all models, or one for each."""
    models, batches = (
        options.models.split(","),
        [int(batch) for batch in options.batches.split(",")],
    )
    if len(batches) not in (1, len(models)):
        raise SystemExit(f"--batches has {len(batches)} numbers: expected 1 or {len(models)}")
    if len(batches) == 1:
        batches *= len(models)
    policies = [str(request) for request in parse_policies(options.policies)]
    arms = []
    for model, batch in zip(models, batches, strict=True):
        if not options.ours_only:
            arms += references(options, model, batch)
        if not options.reference_only:
            arms += [Arm("ours", model, batch, policy) for policy in policies]
    return arms


def references(options: argparse.Namespace, model: str, batch: int) -> list[Arm]:
    """Return the arms of the reference, and of its forks, whose checkouts are given."""
    kind = model_of(model).kind
    arms = [Arm("reference", model, batch)] if getattr(options, f"{kind}_checkout", None) else []
    for method, fork in FORKS.items() if kind == "infinity" else ():
        if getattr(options, f"{method}_checkout"):
            fork.check(model)
            arms.append(Arm("reference", model, batch, method=method))
    return arms


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--var-checkout", type=Path, help="folder of FoundationVision/VAR")
    add("--infinity-checkout", type=Path, help="folder of FoundationVision/Infinity")
    add("--scalekv-checkout", type=Path, help="folder of StargazerX0/ScaleKV, a fork of Infinity")
    add("--heatkv-checkout", type=Path, help="folder of HeatKV's code, a fork of Infinity")
    add("--models", default="var-d30,infinity-2b", help="names of known models")
    add("--batches", default="64,1", help="one number for all models, or one for each")
    add("--policies", default="full,ams", help="what our cache keeps, several arms")
    add("--repeats", type=int, default=3, help="timed calls; the median counts")
    add("--dtype", default="bfloat16", help="of our weights and products")
    add("--cache-dtype", help="of our cached numbers; by default --dtype")
    add("--attention", default="auto", help="our attention back end")
    add("--out", type=Path, default=Path("comparison"), help="folder of comparison.{json,md}")
    add("--warm", type=int, default=0, metavar="N", help=WARM)
    add("--cache", type=Path, help="folder of compiled programs; by default a new one")
    add("--minutes", type=float, default=8.8, help="of the whole comparison")
    add("--arm-minutes", type=float, default=3.0, help="of one measurement")
    add("--warm-minutes", type=float, default=4.0, help="of compiling all arms beforehand")
    add("--ceiling-size", type=int, default=8192, help="of the matrices whose product is the most")
    add("--reference-python", help="interpreter with PyTorch, if it is another one")
    add("--reference-eager", action="store_true", help="without torch.compile (Infinity's norms)")
    side = found.add_mutually_exclusive_group()
    side.add_argument("--reference-only", action="store_true")
    side.add_argument("--ours-only", action="store_true")
    return found


def main() -> None:
    """Compare."""
    options = parser().parse_args()
    comparison = Comparison(options)
    comparison.run(arms_of(options))
    print(markdown(comparison.found))


if __name__ == "__main__":
    main()
