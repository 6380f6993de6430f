"""``amskv bench``: speed and memory of policies, with random weights."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from amskv_jax.cli.console import make_console, print_line, progress
from amskv_jax.cli.files import check_outputs, check_suffix
from amskv_jax.cli.options import (
    Attention,
    CacheDtypeOption,
    ForceOption,
    MeshOption,
    ProductDtype,
    StatsOption,
)
from amskv_jax.cli.policy import PoliciesOption
from amskv_jax.cli.wanted import AspectOption, CfgOption, SizeOption, as_wanted, known_pipeline
from amskv_jax.files import replacing

LONGEST = 20
"""Kernels of a trace that are listed one by one."""


def bench(
    model: Annotated[str, typer.Option(help="Name of a known model, such as var-d30.")],
    policies: PoliciesOption = "full,ams",
    batch: Annotated[int, typer.Option(min=1, help="Pictures generated at once.")] = 1,
    dtype: Annotated[
        ProductDtype,
        typer.Option(
            help="Of weights, products and cache; float8, float8-fast: products with much work "
            "in 8 bits, all else in bfloat16."
        ),
    ] = ProductDtype.BFLOAT16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls; the median counts.")] = 3,
    attention: Annotated[Attention, typer.Option(help="Attention back end.")] = Attention.AUTO,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode/--no-decode", help="Turn tokens into pictures, or run the transformer alone."
        ),
    ] = True,
    cache_dtype: CacheDtypeOption = None,
    mesh: MeshOption = None,
    aspect: AspectOption = None,
    size: SizeOption = None,
    cfg: CfgOption = None,
    stats: StatsOption = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Say where the time of a call goes, by kind of kernel; profiles are kept here.",
            metavar="DIR",
            file_okay=False,
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write all numbers here (.json).")] = None,
    force: ForceOption = False,
) -> None:
    """Compare speed and memory of policies on this machine; every one runs in a fresh process.

    Ratios are to the first policy.
    """
    check_suffix(save, {".json"})
    check_outputs(save, force=force)
    # The device's memory is for the arms; this process only asks what device it is.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    from amskv_jax.policies.grammar import parse_policies  # noqa: PLC0415

    requests = parse_policies(policies)

    import json  # noqa: PLC0415

    import jax  # noqa: PLC0415

    from amskv_jax import __version__  # noqa: PLC0415
    from amskv_jax.benchmark import measure_in_new_process  # noqa: PLC0415
    from amskv_jax.errors import OutOfMemoryError  # noqa: PLC0415
    from amskv_jax.float8 import check_float8  # noqa: PLC0415
    from amskv_jax.mesh import MeshShape  # noqa: PLC0415
    from amskv_jax.plan.stats import LayerStats  # noqa: PLC0415

    check_float8(dtype.value)
    pipe = replace(known_pipeline(model, dtype), mesh=MeshShape.parse(mesh))
    pipe = as_wanted(pipe, aspect=aspect, size=size, cache_dtype=cache_dtype, cfg=cfg)
    statistics = LayerStats.load(stats) if stats else None
    geometry = pipe.geometry(batch)
    plans = {one.text: one.plan(pipe.shape, geometry, statistics) for one in requests}
    samplers = {name: pipe.sampler(plan, attention=attention.value) for name, plan in plans.items()}
    folders = {one.text: trace / one.name if trace else None for one in requests}
    results: dict[str, dict[str, Any]] = {}
    with progress("measuring") as update:
        for index, (name, sampler) in enumerate(samplers.items()):
            update(f"measuring {name}", index / len(samplers))
            try:
                folder = folders[name]
                measured = measure_in_new_process(sampler, batch, repeats, decode, folder)
                results[name] = asdict(measured)
            except OutOfMemoryError as error:
                results[name] = {"error": str(error)}
            results[name]["plan"] = sampler.plan.note
    _print(results)
    for name, folder in folders.items():
        if folder and "error" not in results[name]:
            results[name]["kinds"] = _print_profile(name, folder)
    if save:
        content = {
            "model": model,
            "batch": batch,
            "mesh": mesh,
            "dtype": dtype.value,
            "repeats": repeats,
            "decode": decode,
            "versions": {"amskv-jax": __version__, "jax": jax.__version__},
            "arms": results,
        }
        with replacing(save) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print_line(f"wrote {save}")


def _print_profile(name: str, folder: Path) -> dict[str, float]:
    """Print where the time of a traced call went; return the seconds of every kind of kernel."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from amskv_jax.reports.kernels import read_profile  # noqa: PLC0415

    profile = read_profile(folder)
    kinds = profile.kinds()
    whole = sum(kinds.values())
    print_line(
        f"{name}: {1e3 * whole:.1f} ms of kernels within {1e3 * profile.span_seconds:.1f} ms, "
        f"of which {1e3 * profile.idle_seconds:.1f} ms idle"
    )
    shares = Table(box=SIMPLE_HEAD)
    longest = Table(box=SIMPLE_HEAD)
    for table, titles in (
        (shares, ("kind", "ms", "share")),
        (longest, ("longest kernels", "kind", "ms", "launches")),
    ):
        for title in titles:
            right = title in {"ms", "share", "launches"}
            table.add_column(title, justify="right" if right else "left", overflow="fold")
    for kind, seconds in kinds.items():
        shares.add_row(kind, f"{1e3 * seconds:.2f}", f"{seconds / whole:.1%}")
    for kernel in profile.kernels[:LONGEST]:
        text = " ".join(dict.fromkeys(filter(None, (kernel.name[:60], kernel.operation))))
        longest.add_row(
            escape(text), kernel.kind, f"{1e3 * kernel.seconds:.2f}", str(kernel.launches)
        )
    make_console().print(shares, longest)
    return kinds


def _print(results: dict[str, dict[str, Any]]) -> None:
    """Print a table of what ``Measurement`` holds, with ratios to the first policy."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from amskv_jax.words import byte_size  # noqa: PLC0415

    measured = [result for result in results.values() if "error" not in result]
    for device, attention in dict.fromkeys((r["device"], r["attention"]) for r in measured):
        print_line(f"{device}, attention {attention}, random weights")
    first = next(iter(results.values()))
    table = Table(box=SIMPLE_HEAD)
    table.add_column("policy")
    columns = {
        "pictures_per_second": ("pictures/s", lambda value: f"{value:.2f}"),
        "compile_seconds": ("compile", lambda value: f"{value:.1f} s"),
        "predicted_bytes": ("predicted peak", byte_size),
        "peak_bytes": ("measured peak", byte_size),
    }
    for title, _ in columns.values():
        table.add_column(title, justify="right")
        table.add_column("ratio", justify="right")
    for name, result in results.items():
        cells = []
        for field, (_, show) in columns.items():
            value, base = result.get(field), first.get(field)
            cells.append("-" if value is None else show(value))
            cells.append(f"{value / base:.2f}" if value and base else "-")
        if "error" in result:
            cells[0] = "no memory"
        table.add_row(escape(name), *cells)
    make_console().print(table)
    if any(result.get("peak_bytes") is None for result in measured):
        print_line("This device does not report its peak memory; the prediction is the compiler's.")
