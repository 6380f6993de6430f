"""Several GPUs of one machine against one of them: speed, memory, and whether they draw the same.

    python benchmarks/mesh.py --out FOLDER

Every arm is a process of its own. All arms make their weights and trace at once; then they compile
and are timed in turn, each with the devices it uses for itself. What does not fit into the time is
reported as not run. Writes ``mesh.json`` and ``mesh.md``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from amskv_jax import configs
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.generate import picture_keys
from amskv_jax.mesh import MeshShape, put_on
from amskv_jax.pipeline import Pipeline
from amskv_jax.policies.grammar import parse_policy

POLICY = "ams:saving=0.787"
SHARED = 16
"""Pictures whose tokens are compared with those of one device."""


@dataclass(frozen=True)
class Arm:
    """One measurement.

    Attributes:
      model: a known model.
      mesh: as ``--mesh`` takes it; None for one device.
      batch: pictures at once, on all devices together.
    """

    model: str
    mesh: str | None
    batch: int

    @property
    def name(self) -> str:
        """Its name in results."""
        return f"{self.model}, {self.mesh or 'one device'}, batch {self.batch}"


def arms_of(devices: int, data: dict[str, int], model: dict[str, int]) -> list[Arm]:
    """Return pairs of arms on one device and on all of them.

    Args:
      devices: how many there are.
      data: model -> pictures at once on each device that draws pictures of its own.
      model: model -> pictures at once where devices share the heads.
    """
    by_data = [
        Arm(name, mesh, batch * factor)
        for name, batch in data.items()
        for mesh, factor in ((None, 1), (f"data={devices}", devices))
    ]
    by_model = [
        Arm(name, mesh, batch)
        for name, batch in model.items()
        for mesh in (None, f"model={devices}")
    ]
    return list(dict.fromkeys(by_data + by_model))


def main() -> None:
    """Run all arms and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", default="var-d30:64,infinity-2b:4", help="MODEL:BATCH per device")
    parser.add_argument("--model", default="var-d30:16,infinity-2b:1", help="MODEL:BATCH in all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=520, help="limit for everything")
    parser.add_argument("--arm", type=json.loads, help="run this one (internal)")
    options = parser.parse_args()
    if options.arm is not None:
        run_arm(Arm(**options.arm), options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    devices = int(_python("import jax; print(jax.local_device_count())"))
    arms = arms_of(devices, _batches(options.data), _batches(options.model))
    results = {arm.name: result for arm, result in run_all(arms, options, deadline)}
    compared = compare_tokens(arms, results, options.out)
    found = {
        "devices": devices,
        "policy": POLICY,
        "dtype": options.dtype,
        "float32": float32_agrees(devices, deadline),
        "compared": compared,
        "arms": results,
    }
    (options.out / "mesh.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = render(arms, found)
    (options.out / "mesh.md").write_text(text, encoding="utf-8")
    print(text)


def run_all(
    arms: list[Arm], options: argparse.Namespace, deadline: float
) -> Iterator[tuple[Arm, dict[str, Any]]]:
    """Yield every arm with its result, those on one device two at a time."""
    alone = [arm for arm in arms if arm.mesh is None]
    waves = [alone[start : start + 2] for start in range(0, len(alone), 2)]
    waves += [[arm] for arm in arms if arm.mesh is not None]
    processes = {
        arm: _start(arm, options, number) for wave in waves for number, arm in enumerate(wave)
    }
    try:
        for wave in waves:
            for arm in wave:
                processes[arm].stdin.write("go\n")
                processes[arm].stdin.close()
            for arm in wave:
                yield arm, _result(arm, processes[arm], options.out, deadline)
    finally:
        for process in processes.values():
            process.kill()


def _start(arm: Arm, options: argparse.Namespace, number: int) -> subprocess.Popen[str]:
    """Start the process of an arm, which waits; one without a mesh sees GPU ``number`` alone."""
    words = [__file__, "--out", options.out, "--dtype", options.dtype]
    words += ["--repeats", options.repeats, "--arm", json.dumps(asdict(arm))]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if arm.mesh is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[min(number, len(visible) - 1)]
    with _file(options.out, arm, "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            env=environment,
        )


def _result(arm: Arm, process: subprocess.Popen[str], out: Path, deadline: float) -> dict[str, Any]:
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return {"error": "not run to its end: out of time"}
    if code:
        log = _file(out, arm, "log").read_text()
        return {"error": f"exit code {code}", "log": log[-3000:]}
    result: dict[str, Any] = json.loads(_file(out, arm, "json").read_text())
    return result


def run_arm(arm: Arm, options: argparse.Namespace) -> None:
    """Measure one arm: prepare, wait for a line of input, compile, run."""
    model = configs.get(arm.model).model
    mesh = MeshShape.parse(arm.mesh)
    pipe = Pipeline(model, None, model.schedule, options.dtype, model.drawing, mesh=mesh)
    plan = parse_policy(POLICY).plan(pipe.shape, pipe.geometry(arm.batch))
    sampler, controls = pipe.sampler(plan), pipe.controls()
    parts = "transformer", "tokenizer"
    params = random_params(model, dtype=options.dtype, parts=parts, put=put_on(mesh))
    condition = model.conditions(None).batch(np.arange(arm.batch))
    keys = picture_keys(jax.random.key(0), arm.batch)
    start = time.perf_counter()
    lowered = sampler.lower(params, condition, keys, controls)
    trace_seconds = time.perf_counter() - start
    sys.stdin.readline()
    start = time.perf_counter()
    program = lowered.compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        samples = jax.block_until_ready(program(params, condition, keys, controls))
        seconds.append(time.perf_counter() - start)
    devices = jax.local_devices()[: mesh.size if mesh else 1]
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    analysis: Any = program.memory_analysis()
    tokens = np.asarray(samples.tokens)[:SHARED]
    np.savez(_file(options.out, arm, "npz"), tokens=tokens)
    text = program.as_text() or ""
    result = {
        "device": devices[0].device_kind,
        "jax": jax.__version__,
        "plan": plan.note,
        "seconds": seconds[1:],
        "median": median(seconds[1:]),
        "trace_seconds": trace_seconds,
        "compile_seconds": compile_seconds,
        "peak_bytes": peaks,
        "predicted_bytes": int(
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            + analysis.temp_size_in_bytes
            - analysis.alias_size_in_bytes
        ),
        "all_reduces": text.count(" all-reduce(") + text.count(" all-reduce-start("),
    }
    _file(options.out, arm, "json").write_text(json.dumps(result))


def compare_tokens(arms: list[Arm], results: dict[str, Any], out: Path) -> dict[str, float]:
    """Return which share of the first pictures' tokens a mesh draws as one device does."""
    shares = {}
    for arm, one in _pairs(arms):
        if "error" in results[arm.name] or "error" in results[one.name]:
            continue
        with np.load(_file(out, arm, "npz")) as mine, np.load(_file(out, one, "npz")) as theirs:
            count = min(len(mine["tokens"]), len(theirs["tokens"]))
            same = mine["tokens"][:count] == theirs["tokens"][:count]
        shares[arm.name] = float(same.mean())
    return shares


FLOAT32 = """
import sys
from dataclasses import replace
import jax, numpy as np
from amskv_jax.checkpoints.initialize import random_params
from amskv_jax.generate import Sampler, picture_keys
from amskv_jax.mesh import MeshShape, put_on
from amskv_jax.models.var.config import VARConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.policies.grammar import parse_policy
from amskv_jax.pipeline import Pipeline
from amskv_jax.testing import SCHEDULE, TOKENIZER, VAR_FIELDS
devices = int(sys.argv[1])
model = VARModel(VARConfig(3, 128, 8, **VAR_FIELDS), TOKENIZER)
drawing = replace(model.drawing, top_k=1, top_p=0.0)
labels, keys = np.arange(8, dtype=np.int32) % 10, picture_keys(jax.random.key(0), 8)
for policy in ("full", "window:window=3", "h2o:budget=3"):
    tokens = []
    for mesh in (None, MeshShape(data=devices), MeshShape(model=devices)):
        pipe = Pipeline(model, None, SCHEDULE, "float32", drawing, mesh=mesh)
        params = random_params(model, put=put_on(mesh))
        sampler = pipe.sampler(parse_policy(policy).plan(pipe.shape, pipe.geometry(8)))
        tokens.append(np.asarray(sampler(params, labels, keys, pipe.controls()).tokens))
    print(all((one == tokens[0]).all() for one in tokens))
"""


def float32_agrees(devices: int, deadline: float) -> bool | str:
    """Return whether greedy float32 tokens of a small VAR are the same on meshes as on one."""
    try:
        lines = _python(FLOAT32, str(devices), timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.SubprocessError as error:
        return f"not found out: {error}"
    return lines.split() == ["True"] * 3


def render(arms: list[Arm], found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    results, partners = found["arms"], dict(_pairs(arms))
    kind = next((r["device"] for r in results.values() if "error" not in r), "unknown")
    lines = [
        f"{found['devices']} x {kind}; {found['policy']}, {found['dtype']}, transformer without "
        "decoding, random weights; median times.",
        "",
        "| model | devices | batch | s | pictures/s | against one device | peak per device "
        "| tokens as on one |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in arms:
        result, one = results[arm.name], results.get(getattr(partners.get(arm), "name", None))
        start = f"| {arm.model} | {arm.mesh or 'one'} | {arm.batch} |"
        if "error" in result:
            lines.append(f"{start} {result['error']} | | | | |")
            continue
        rate = arm.batch / result["median"]
        against, same = "", found["compared"].get(arm.name)
        if one is not None and "error" not in one:
            speedup = rate / (partners[arm].batch / one["median"])
            against = f"{speedup:.2f} x ({speedup / found['devices']:.0%})"
        peak = max((p for p in result["peak_bytes"] if p), default=result["predicted_bytes"])
        lines.append(
            f"{start} {result['median']:.3f} | {rate:.2f} | {against} | {peak / 2**30:.2f} GiB | "
            f"{'' if same is None else f'{same:.1%}'} |"
        )
    lines += ["", f"Greedy float32 tokens of a small VAR the same on all: {found['float32']}.", ""]
    return "\n".join(lines)


def _pairs(arms: list[Arm]) -> list[tuple[Arm, Arm]]:
    """Return every arm on a mesh with the one on one device that it is compared to."""
    pairs = []
    for index, arm in enumerate(arms):
        if arm.mesh is not None:
            one = next(a for a in reversed(arms[:index]) if a.mesh is None and a.model == arm.model)
            pairs.append((arm, one))
    return pairs


def _batches(text: str) -> dict[str, int]:
    parts = [part.rpartition(":") for part in text.split(",") if part]
    return {name: int(batch) for name, _, batch in parts}


def _file(out: Path, arm: Arm, suffix: str) -> Path:
    return out / f"{arm.model}-{arm.mesh or 'one'}-{arm.batch}.{suffix}"


def _python(code: str, *arguments: str, timeout: float = 120) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        check=True,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.stdout


if __name__ == "__main__":
    main()
