"""Tables about retention plans."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from amskv_jax.cli.console import make_console, print_line
from amskv_jax.device_memory import DeviceMemory
from amskv_jax.plan.memory import CacheGeometry, MemoryReport
from amskv_jax.plan.retention import RetentionPlan, layers_by_row
from amskv_jax.words import byte_size, decimal, number_ranges


def print_plan(plan: RetentionPlan) -> None:
    """Print what every group of layers reads from the cache at every step."""
    schedule = plan.schedule
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layers")
    table.add_column("slots", justify="right")
    for step, (height, width) in enumerate(schedule.grids):
        table.add_column(f"{step}\n{height}x{width}", justify="right")
    for row, layers in layers_by_row(plan).items():
        read = map(decimal, row.kept_tokens)
        scales = map(_scales, row.shares(schedule).T)
        cells = [f"{tokens}\n{names}" for tokens, names in zip(read, scales, strict=True)]
        table.add_row(number_ranges(layers), str(row.capacity), *cells)
    print_line(plan.note)
    print_line(
        "Tokens read from the cache at each step, and their scales "
        "(*: in part, or by some heads; ?: decided while drawing):"
    )
    make_console().print(table)


def print_memory(
    plans: Mapping[str, RetentionPlan],
    geometry: CacheGeometry,
    batch: int,
    dtype: str,
    held: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Print the bytes of caches beside those of the baselines.

    Args:
      plans: name -> plan of this model.
      geometry: of the batch.
      batch: pictures generated at once.
      dtype: "float32" or "bfloat16", of the cache.
      held: bytes of what is large besides, see ``protocol.Model.held_bytes``.
    """
    unguided = geometry.rows == batch
    reports = {name: MemoryReport.of(plan, geometry) for name, plan in plans.items()}
    baseline = next(iter(reports.values()))
    scales = f"all {next(iter(plans.values())).schedule.num_scales} scales"
    table = Table(box=SIMPLE_HEAD)
    table.add_column("cache")
    for column in ("size", "saved of reference", f"saved of {scales}"):
        table.add_column(column, justify="right")
    table.add_row("reference implementation", byte_size(baseline.reference))
    sizes = {
        f"{scales}, {dtype}": baseline.full,
        "last scale not stored": baseline.stored,
        **{name: report.plan for name, report in reports.items()},
    }
    for name, size in sizes.items():
        savings = [1 - size / other for other in (baseline.reference, baseline.full)]
        table.add_row(name, byte_size(size), *(f"{saving:.1%}" for saving in savings))
    guided = "without guidance (one row per picture)" if unguided else "with guidance"
    print_line(f"Key/value cache for {batch} picture{'s'[: batch > 1]}, {guided}:")
    make_console().print(table)
    print_line(
        f"The reference holds {scales}, keys in float32, values in half precision. "
        "No step reads the last scale, so it is never stored here."
    )
    for what, size in held.items():
        print_line(f"Besides, {what} take {byte_size(size)}.")
    if unguided:
        print_line("The reference draws two rows per picture all the same; here it is given one.")


def print_device_memory(needed: DeviceMemory, batch: int, limit: int) -> None:
    """Print what drawing a batch needs of a device that has ``limit`` bytes, term by term."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("on the device")
    for column in ("size", "share"):
        table.add_column(column, justify="right")
    for name, size in [*needed.terms.items(), ("all", needed.total)]:
        table.add_row(name, byte_size(size), f"{size / needed.total:.1%}")
    fits = "fit" if needed.total <= limit else "do not fit"
    print_line(f"To draw {batch} picture{'s'[: batch > 1]} at once on a GPU with fused attention:")
    make_console().print(table)
    print_line(f"They {fits} in {byte_size(limit)}.")


def _scales(shares: np.ndarray) -> str:
    """Return the ids of scales which are read whole, then of those read in part, with a star."""
    if np.isnan(shares).any():
        return "?"
    whole = number_ranges(np.flatnonzero(shares == 1).tolist())
    partly = [f"{scale}*" for scale in np.flatnonzero((shares > 0) & (shares < 1))]
    return ", ".join([*filter(None, [whole]), *partly])
