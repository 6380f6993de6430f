"""``amskv analyze``: pictures and tables that explain why a plan looks as it does."""

import csv
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from amskv_jax.checkpoints.embedded import find_stats
from amskv_jax.checkpoints.hub import fetch
from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.files import check_outputs
from amskv_jax.cli.options import ForceOption, finding, parse_numbers
from amskv_jax.files import replacing


def analyze(
    *,
    stats: Annotated[
        Path,
        typer.Option(
            help="Layer statistics, as `amskv calibrate` writes them, or an embedded model's.",
            parser=finding(find_stats),
            metavar="PATH",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the files; made if it does not exist.")],
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to show apart; if not given, some from the first to the last.",
            metavar="0,9-11",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Plan file, or its address on the hub (hf://...): what it keeps, where, and as "
            "which numbers.",
            parser=finding(fetch),
            metavar="PATH",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Draw where the attention goes and what AMS-KV keeps; needs the extra "plot".

    Pictures: attention between scales, similarity of keys with the cache-demanding layers marked,
    tokens kept by the default AMS-KV plan, attention of every head. Their numbers: CSV files.
    With --plan also plan.png and, block by block, blocks.csv.
    """
    numbers = parse_numbers(layers, "--layers") if layers is not None else None

    from amskv_jax.plan.stats import LayerStats  # noqa: PLC0415
    from amskv_jax.policies import Explicit  # noqa: PLC0415
    from amskv_jax.reports.analysis import Analysis, plan_blocks  # noqa: PLC0415
    from amskv_jax.reports.heatmaps import FIGURES  # noqa: PLC0415
    from amskv_jax.reports.plots import plan_figure  # noqa: PLC0415

    analysis = Analysis(LayerStats.load(stats))
    chosen, tables = analysis.chosen_layers(numbers), analysis.tables()
    drawn = {name: partial(figure, analysis, chosen) for name, figure in FIGURES.items()}
    if plan is not None:
        shape = analysis.stats.shape
        made = Explicit(str(plan)).plan(shape)
        tables["blocks"] = plan_blocks(made, shape.num_heads)
        drawn["plan"] = partial(plan_figure, {made.note.partition(";")[0] or plan.stem: made})
    pictures = {name: out / f"{name}.png" for name in drawn}
    sheets = {name: out / f"{name}.csv" for name in tables}
    if out.exists() or not out.parent.is_dir():
        check_outputs(*pictures.values(), *sheets.values(), force=force)
    with progress("drawing"):
        figures = {path: drawn[name]() for name, path in pictures.items()}
        out.mkdir(exist_ok=True)
        for path, figure in figures.items():
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=150)
    for name, path in sheets.items():
        head, rows = tables[name]
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([head, *rows])
    for path in (*pictures.values(), *sheets.values()):
        print_line(f"wrote {path}")
