"""``amskv study``: what every policy costs in quality."""

from pathlib import Path
from typing import Annotated

import typer

from amskv_jax.checkpoints.embedded import find_classifier
from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.cli.console import print_line
from amskv_jax.cli.files import check_suffix
from amskv_jax.cli.options import (
    Attention,
    AttentionOption,
    CheckpointOption,
    ClassifierOption,
    CompilationCacheOption,
    Dtype,
    ManyOption,
    parse_seeds,
)
from amskv_jax.cli.wanted import CfgOption, TopKOption, TopPOption, drawing_of

app = typer.Typer(
    help="Measure every policy on a trained model, and write the report.", no_args_is_help=True
)

REPORT_HELP = "Write the report here (.md), its pictures into a folder beside it."


@app.command()
def run(
    checkpoint: CheckpointOption,
    real: Annotated[
        Path, typer.Option(help="Real pictures: a packed .npz or a folder of class folders.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the study; one there already goes on.")],
    classifier: ClassifierOption = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Other real pictures, measured for comparison.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures per cell.")] = 10_000,
    seeds: Annotated[str, typer.Option(help="Seeds of the pictures.", metavar="0,1")] = "0,1",
    sections: Annotated[
        str, typer.Option(help="Sections to run, letters out of a-g.", metavar="a,b,...")
    ] = "a,b,c,d,e,f,g",
    only: Annotated[
        str, typer.Option(help="Run only cells whose names contain this, and the full cache.")
    ] = "",
    stop_after: Annotated[
        float | None, typer.Option(help="Seconds after which no further cell begins.")
    ] = None,
    batch_size: ManyOption = 500,
    compilers: Annotated[
        int, typer.Option(min=1, help="Programs compiled at a time, before they draw.")
    ] = 6,
    cfg: CfgOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Of all cells but those of g.")] = Dtype.BFLOAT16,
    calibration: Annotated[
        int, typer.Option(min=1, help="Pictures that calibration looks at.")
    ] = 128,
    attention: AttentionOption = Attention.AUTO,
    report: Annotated[Path | None, typer.Option(help=REPORT_HELP)] = None,
    compilation_cache: CompilationCacheOption = True,
) -> None:
    """Draw and measure all cells which have no result yet, the most important first.

    All local devices draw at the same time, each with programs of its own.

    Sections: a: dropped scales; b: uniform or similarity-aware capacities; c: AMS-KV at four
    savings; d: all policies at three savings; e: C_min and C_max; f: theta; g: dtype.
    """
    check_suffix(report, {".md"})
    from amskv_jax.checkpoints.folder import read_info  # noqa: PLC0415
    from amskv_jax.evaluation.classifier import load_classifier  # noqa: PLC0415
    from amskv_jax.evaluation.comparison import Comparison  # noqa: PLC0415
    from amskv_jax.evaluation.measures import Judge  # noqa: PLC0415
    from amskv_jax.evaluation.metrics import check_picture_count  # noqa: PLC0415
    from amskv_jax.pipeline import load  # noqa: PLC0415
    from amskv_jax.study.study import Extent, run_study  # noqa: PLC0415
    from amskv_jax.training.data import load_pictures  # noqa: PLC0415

    if compilation_cache:
        use_compilation_cache()
    network = load_classifier(classifier or find_classifier(read_info(checkpoint).classes))
    check_picture_count(num, network.dimension)
    extent = Extent(
        sections=sections.replace(",", ""),
        seeds=parse_seeds(seeds, "--seeds"),
        batch=batch_size,
        compilers=compilers,
        stop_after=float("inf") if stop_after is None else stop_after,
        only=only,
        attention=attention.value,
    )
    model = load(checkpoint, dtype.value)
    drawing = drawing_of(model.drawing, cfg=cfg, top_k=top_k, top_p=top_p)
    comparison = Comparison(
        num=num,
        cfg=drawing.cfg,
        top_k=drawing.top_k,
        top_p=drawing.top_p,
        dtype=dtype.value,
        calibration_pictures=calibration,
    )
    size, classes = model.model.picture_size(model.schedule), len(model.conditions(None))
    network.check_classes(classes)
    pictures = load_pictures(real, size)
    pictures.check(size, classes)
    left = run_study(
        comparison,
        extent,
        lambda wanted: model if wanted == dtype.value else load(checkpoint, wanted),
        Judge.of(network, pictures.pixels),
        out,
        held_out=None if held_out is None else load_pictures(held_out, size).pixels,
        report=print_line,
    )
    if left:
        print_line(f"time is up: {len(left)} cells are left, start the study again to go on")
    if report:
        write(out, report)


@app.command("report")
def write(
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    report: Annotated[Path, typer.Option(help=REPORT_HELP)],
) -> None:
    """Write the report from the results of a study, finished or not; needs no accelerator."""
    check_suffix(report, {".md"})
    from amskv_jax.study.render import render_study  # noqa: PLC0415

    render_study(out, report)
    print_line(f"wrote {report}")
