"""Where a device's time goes, by kind of kernel: read from a trace of ``jax.profiler``.

The profiler writes trace events (the format of Chrome and Perfetto) as JSON. A GPU's kernels stand
on its streams; on a CPU, every operation of a compiled program is an event of the host.
"""

import gzip
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amskv_jax.errors import AmskvError

KINDS = ("products", "attention", "elementwise", "copies", "sorting", "decoder", "other")
"""Kinds of kernels; "elementwise" has reductions among it, such as norms and softmax."""

DECODER = "decode"
"""What the name of a decoder's program has in it, see ``decode.decode_pixels``."""

_PATTERNS = (
    ("attention", r"sdpa|flash|fmha|attention|mass_kernel"),
    ("sorting", r"sort|radix|top_?k"),
    (
        "products",
        r"gemm|nvjet|cutlass|cublas|xmma|matmul|product|splitk|\bdot|_dot|conv(?!ert)|fprop|ynn",
    ),
    ("copies", r"memcpy|memset|concatenate|dynamic[-_]update[-_]slice"),
    ("other", r"^(while|call|conditional)\b"),
)
"""Kind and what a kernel's name or operation has in it; the first that fits counts."""

_FRAMES = frozenset({"loop", "input", "wrapped", "fusion"})
_MOVES = frozenset(
    {
        *("bitcast", "broadcast", "copy", "dynamic", "gather", "pad", "reshape", "reverse"),
        *("slice", "transpose"),
    }
)
"""What a fusion names if it only moves numbers; one other operation, and it computes."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, or operation, over all its launches.

    Attributes:
      name: as the device calls it.
      operation: the operation of the compiled program; "" if the trace does not say.
      program: the compiled program; "" likewise.
      kind: one of ``KINDS``.
      seconds: time of all launches together, without what ran inside of them. A GPU may run several
        at once: their times may add up to more than it was busy.
      launches: how many.
    """

    name: str
    operation: str
    program: str
    kind: str
    seconds: float
    launches: int


@dataclass(frozen=True)
class Profile:
    """What a device did.

    Attributes:
      kernels: those which took longest first.
      span_seconds: from the beginning of the first to the end of the last.
      idle_seconds: those of the span in which none ran.
    """

    kernels: tuple[Kernel, ...]
    span_seconds: float
    idle_seconds: float

    def kinds(self) -> dict[str, float]:
        """Return the seconds of every kind."""
        return {
            kind: sum(kernel.seconds for kernel in self.kernels if kernel.kind == kind)
            for kind in KINDS
        }


def kind_of(name: str, operation: str = "", program: str = "") -> str:
    """Return the kind of a kernel, one of ``KINDS``; see ``Kernel`` for the arguments."""
    if DECODER in program:
        return "decoder"
    for kind, pattern in _PATTERNS:
        if re.search(pattern, f"{name} {operation}".lower()):
            return kind
    words = set(re.findall(r"[a-z]+", name.lower())) - _FRAMES
    return "copies" if words and words <= _MOVES else "elementwise"


def read_profile(folder: str | os.PathLike[str]) -> Profile:
    """Return what the latest trace below a folder says.

    Args:
      folder: as given to ``jax.profiler.trace``.

    Raises:
      AmskvError: if there is no trace, or it cannot be read, or no kernel is in it.
    """
    files = sorted(
        Path(folder).glob("**/*.trace.json.gz"), key=lambda path: (path.stat().st_mtime, path.name)
    )
    if not files:
        raise AmskvError(f"no trace of jax.profiler below {folder}: expected a *.trace.json.gz")
    try:
        with gzip.open(files[-1], "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        return _profile(events)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise AmskvError(f"cannot read the trace {files[-1]}: {error!r}") from error


def _profile(events: list[dict[str, Any]]) -> Profile:
    on_streams, in_programs = _launches(events)
    launches = on_streams or in_programs
    if not launches:
        raise AmskvError("the trace has no kernel of any device in it")
    seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    # Kernels of a stream lie in each other only where they ran at the same time.
    timed = [(event, event["dur"]) for event in on_streams] or _own_times(in_programs)
    for event, own in timed:
        arguments = event.get("args", {})
        operation = arguments.get("hlo_op", "")
        if operation.startswith("command_buffer"):  # a graph of kernels, whose operations are lost
            operation = ""
        key = event["name"], operation, arguments.get("hlo_module", "")
        seconds[key] += own / 1e6
        counts[key] += 1
    kernels = [Kernel(*key, kind_of(*key), seconds[key], counts[key]) for key in seconds]
    start = min(event["ts"] for event in launches)
    span = max(event["ts"] + event["dur"] for event in launches) - start
    busy = _covered((event["ts"], event["ts"] + event["dur"]) for event in launches)
    ordered = sorted(kernels, key=lambda kernel: -kernel.seconds)
    return Profile(tuple(ordered), span / 1e6, (span - busy) / 1e6)


def _launches(
    events: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the events that are kernels: those on devices' streams, and the host's operations.

    Other lines of a device repeat the kernels, summed up by operation and by program.
    """
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    streams = {
        key
        for key, name in threads.items()
        if name.startswith("Stream") and processes.get(key[0], "").startswith("/device:")
    }
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    on_streams = [event for event in complete if (event["pid"], event["tid"]) in streams]
    in_programs = [event for event in complete if "hlo_op" in event.get("args", {})]
    return on_streams, in_programs


def _own_times(launches: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield every event and its microseconds without those of events inside it."""
    lines: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in launches:
        lines[event["pid"], event["tid"]].append(event)
    for line in lines.values():
        line.sort(key=lambda event: (event["ts"], -event["dur"]))
        own = [event["dur"] for event in line]
        around: list[int] = []
        for index, event in enumerate(line):
            while around and line[around[-1]]["ts"] + line[around[-1]]["dur"] <= event["ts"]:
                around.pop()
            if around:
                own[around[-1]] -= event["dur"]
            around.append(index)
        yield from zip(line, own, strict=True)


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
