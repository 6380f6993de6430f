"""``amskv calibrate``: where a model's attention goes, measured while it draws."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.cli.console import make_console, print_line, progress
from amskv_jax.cli.files import check_outputs, check_suffix
from amskv_jax.cli.memory import explaining_memory
from amskv_jax.cli.options import (
    CheckpointOption,
    CompilationCacheOption,
    ForceOption,
    MeshOption,
    SeedOption,
    StoredDtypeOption,
)
from amskv_jax.cli.real import real_pictures
from amskv_jax.cli.wanted import (
    AspectOption,
    CfgOption,
    LabelsOption,
    PromptsOption,
    SizeOption,
    TauOption,
    TextFeaturesOption,
    TopKOption,
    TopPOption,
    conditions_of,
    open_checkpoint,
    with_weights,
)
from amskv_jax.errors import UsageError

if TYPE_CHECKING:
    from amskv_jax.plan.stats import LayerStats


def calibrate(
    *,
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option(help="Write the layer statistics here (.npz).")],
    samples: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 4,
    labels: LabelsOption = None,
    prompts: PromptsOption = None,
    text_features: TextFeaturesOption = None,
    aspect: AspectOption = None,
    size: SizeOption = None,
    seed: SeedOption = 0,
    cfg: CfgOption = None,
    tau: TauOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    dtype: StoredDtypeOption = None,
    mesh: MeshOption = None,
    real: Annotated[
        Path | None,
        typer.Option(
            help="Real pictures, as `amskv train` takes them: measure on them, too, what the loss "
            "or rounding of every block of the cache damages, for the policy optimal. They should "
            "not be those which are scored later."
        ),
    ] = None,
    real_num: Annotated[
        int, typer.Option(min=1, help="Most real pictures, spread evenly over all there are.")
    ] = 64,
    real_prompts: Annotated[
        Path | None,
        typer.Option(help="What they show, one in a line, for text-to-image models."),
    ] = None,
    crop: Annotated[
        bool, typer.Option("--crop", help="Scale and crop real pictures of another size.")
    ] = False,
    formats: Annotated[
        str | None,
        typer.Option(
            help="Formats in which a block may be kept, the most exact first; if not given, "
            "bfloat16 and all of whole numbers.",
            metavar="bfloat16,int8,...",
        ),
    ] = None,
    savings: Annotated[
        str | None,
        typer.Option(
            help="Savings around whose best plans damage is measured once more, as blocks act "
            "together, after the formats of such a plan if it has not all; none for the full cache "
            "alone. If not given, five from 0.75 to 0.975.",
            metavar="0.85,bfloat16:0.85,...",
        ),
    ] = None,
    force: ForceOption = False,
    compilation_cache: CompilationCacheOption = True,
) -> None:
    """Measure where a model's attention goes, and how alike the keys of successive scales are.

    The policies ams (arXiv 2511.16047), scalekv (arXiv 2505.19602), heads and heatkv (arXiv
    2605.14877) plan from these; optimal from the damage that --real measures besides.
    """
    check_suffix(out, {".npz"})
    check_outputs(out, force=force)
    rungs = None if savings is None else _read_savings(savings)
    if real is None and (real_prompts is not None or crop):
        raise UsageError("--real-prompts and --crop are of --real: give it, or leave them out")
    if real is not None and mesh is not None:
        raise UsageError("damage is measured on one device: leave out --mesh, or --real")

    import jax  # noqa: PLC0415

    from amskv_jax.calibrate.attention import measure_attention  # noqa: PLC0415
    from amskv_jax.calibrate.damage import BASES, FORMATS, Base, measure_damage  # noqa: PLC0415
    from amskv_jax.drawing import Chosen  # noqa: PLC0415
    from amskv_jax.evaluation.score import encode  # noqa: PLC0415
    from amskv_jax.numbers import numbers_of  # noqa: PLC0415

    offered = FORMATS if formats is None else tuple(formats.split(","))
    for name in offered:
        numbers_of(name)
    if compilation_cache:
        use_compilation_cache()
    drawing = {"cfg": cfg, "tau": tau, "top_k": top_k, "top_p": top_p}
    pipe = open_checkpoint(checkpoint, dtype, mesh, aspect=aspect, size=size, **drawing)
    conditions = conditions_of(pipe, labels=labels, prompts=prompts, text_features=text_features)
    if conditions is None:
        classes = pipe.conditions(None)
        spread = range(0, samples * len(classes), len(classes))
        conditions = Chosen(classes, tuple(number // samples for number in spread))
    pictures = (
        real_pictures(pipe, real, real_num, crop=crop, prompts=real_prompts) if real else None
    )
    pipe = with_weights(pipe, checkpoint)
    device = jax.devices()[0]
    print_line(f"{pipe.dtype} on {device.device_kind} ({device.platform})")

    batch = min(batch_size, samples)
    start = time.perf_counter()
    with explaining_memory(batch), progress("compiling") as update:
        stats = measure_attention(
            pipe,
            conditions,
            count=samples,
            batch=batch,
            seed=seed,
            settings={"conditions": list(conditions.captions(pipe.classes))},
            progress=lambda done: update(f"{done} of {samples} pictures", done / samples),
        )
    print_line(f"{samples} pictures measured in {time.perf_counter() - start:.1f} s")
    _print_layers(stats)
    if pictures is not None:
        pixels, shown, _ = pictures
        start = time.perf_counter()
        with explaining_memory(batch_size), progress("making tokens") as update:
            codes = encode(pipe, pixels, batch_size)
            damage = measure_damage(
                pipe,
                codes,
                shown,
                batch=batch_size,
                formats=offered,
                bases=BASES if rungs is None else [Base(*rung) for rung in rungs],
                seed=seed,
                update=update,
            )
        stats = replace(stats, damage=damage)
        seconds = time.perf_counter() - start
        print_line(f"damage measured on {len(pixels)} real pictures in {seconds:.1f} s")
    stats.save(out)
    print_line(f"wrote {out}")


def _read_savings(text: str) -> list[tuple[float, tuple[str, ...] | None]]:
    """Read savings such as "0.85,bfloat16+int8:0.9", with formats; none if it is "none".

    Raises:
      UsageError: if it is anything else.
    """
    found: list[tuple[float, tuple[str, ...] | None]] = []
    for part in () if text.strip() == "none" else text.split(","):
        names, colon, share = part.strip().rpartition(":")
        try:
            saving = float(share)
        except ValueError:
            saving = 1.0
        if not 0 <= saving < 1:
            raise UsageError(
                f"--savings {text!r}: expected shares from 0 to below 1, or none; formats may "
                "stand before a share, as in bfloat16+int8:0.85"
            )
        found.append((saving, tuple(names.split("+")) if colon else None))
    return found


def _print_layers(stats: "LayerStats") -> None:
    """Print what the default AMS-KV policy makes of every layer."""
    import numpy as np  # noqa: PLC0415
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.table import Column, Table  # noqa: PLC0415

    from amskv_jax.policies import AMSKV  # noqa: PLC0415
    from amskv_jax.words import number_ranges  # noqa: PLC0415

    classes = AMSKV().classify(stats)
    if not classes.overflows:
        print_line(
            "AMS-KV with its defaults has room for all scales of this model, so no layer is "
            "cache-demanding."
        )
        return
    names = "layer", "lowest similarity", "at scale", "attention to own map"
    table = Table(*(Column(name, justify="right") for name in names), "AMS-KV", box=SIMPLE_HEAD)
    scales = np.array(classes.overflows)
    own = np.diagonal(stats.density, axis1=1, axis2=2).mean(1)
    for layer, similarity in enumerate(stats.similarity):
        at = scales[np.argmin(similarity[scales])]
        table.add_row(
            str(layer),
            f"{similarity[at]:.4f}",
            str(at),
            f"{own[layer]:.1%}",
            "demanding" if layer in classes.demanding else "efficient",
        )
    print_line(
        "Similarity of keys to those of the scale before, at the scales that overflow the default "
        f"C_min: {number_ranges(classes.overflows)}"
    )
    make_console().print(table)
    print_line(
        f"{classes.how}; cache-demanding layers: {number_ranges(classes.demanding) or 'none'}"
    )
