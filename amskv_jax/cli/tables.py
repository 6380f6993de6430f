"""Tables about retention plans."""

from collections.abc import Iterable, Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from amskv_jax.cli.console import make_console, print_line
from amskv_jax.describe import byte_size, layers_by_row, number_ranges
from amskv_jax.memory import CacheGeometry, MemoryReport
from amskv_jax.models.config import VARConfig
from amskv_jax.plan import RetentionPlan, Segment
from amskv_jax.schedule import ScaleSchedule


def print_plan(plan: RetentionPlan) -> None:
    """Print what every group of layers reads from the cache at every step."""
    schedule = plan.schedule
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layers")
    table.add_column("slots", justify="right")
    for step, (height, width) in enumerate(schedule.grids):
        table.add_column(f"{step}\n{height}x{width}", justify="right")
    for row, layers in layers_by_row(plan).items():
        cells = [
            f"{tokens}\n{_scales(schedule, segments)}"
            for tokens, segments in zip(row.kept_tokens, row.keep, strict=True)
        ]
        table.add_row(number_ranges(layers), str(row.capacity), *cells)
    print_line(plan.note)
    print_line("Tokens read from the cache at each step, and their scales (*: in part):")
    make_console().print(table)


def print_memory(
    plans: Mapping[str, RetentionPlan], config: VARConfig, batch: int, dtype: str
) -> None:
    """Print the bytes of caches beside those of the baselines.

    Args:
      plans: name -> plan of this model.
      config: the model.
      batch: pictures generated at once.
      dtype: "float32" or "bfloat16", of the cache.
    """
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    # Guidance carries a row without label for every picture.
    geometry = CacheGeometry(2 * batch, config.num_heads, config.head_dim, itemsize)
    reports = {name: MemoryReport.of(plan, geometry) for name, plan in plans.items()}
    baseline = next(iter(reports.values()))
    scales = f"all {config.schedule.num_scales} scales"
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
    print_line(f"Key/value cache for {batch} picture{'s'[: batch > 1]}, with guidance:")
    make_console().print(table)
    print_line(
        f"The reference holds {scales}, keys in float32, values in half precision. "
        "No step reads the last scale, so it is never stored here."
    )


def _scales(schedule: ScaleSchedule, segments: Iterable[Segment]) -> str:
    """Return the ids of scales which are held whole, then of those held in part, with a star."""
    held: dict[int, int] = {}
    for segment in segments:
        held[segment.scale] = held.get(segment.scale, 0) + segment.tokens
    whole = [scale for scale, tokens in held.items() if tokens == schedule.tokens[scale]]
    partly = [f"{scale}*" for scale in held if scale not in whole]
    return ", ".join([*filter(None, [number_ranges(whole)]), *partly])
