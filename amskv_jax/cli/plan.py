"""``amskv plan``: what a policy keeps and what it costs, without weights."""

from pathlib import Path
from typing import Annotated

import typer

from amskv_jax.checkpoints.embedded import find_checkpoint
from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.files import check_outputs, check_suffix
from amskv_jax.cli.options import (
    CacheDtypeOption,
    DeviceMemoryOption,
    ForceOption,
    LowMemoryOption,
    ProductDtype,
    StatsOption,
    finding,
)
from amskv_jax.cli.policy import PlanFileOption, PolicyOption, choose_policy
from amskv_jax.cli.wanted import (
    AspectOption,
    CfgOption,
    SizeOption,
    as_wanted,
    check_low_memory,
    known_pipeline,
    open_checkpoint,
)
from amskv_jax.errors import UsageError
from amskv_jax.files import replacing


def plan(
    *,
    policy: PolicyOption = None,
    plan_file: PlanFileOption = None,
    model: Annotated[
        str | None, typer.Option(help="Name of a known model, such as var-d30.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint to plan for, in place of a known model.",
            parser=finding(find_checkpoint),
            metavar="PATH",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures generated at once.")] = 1,
    dtype: Annotated[ProductDtype, typer.Option(help="Of the products.")] = ProductDtype.BFLOAT16,
    cache_dtype: CacheDtypeOption = None,
    aspect: AspectOption = None,
    size: SizeOption = None,
    cfg: CfgOption = None,
    stats: StatsOption = None,
    device_memory: DeviceMemoryOption = None,
    low_memory: LowMemoryOption = False,
    find_largest: Annotated[
        bool,
        typer.Option(
            "--largest-batch", help="Say how many pictures at once --device-memory has room for."
        ),
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write the plan here (.json).")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help='Draw the plan here (.png, .svg, .pdf); needs the extra "plot".'),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Show which scales every layer keeps at every step, and the memory this takes."""
    check_suffix(plot, {".png", ".svg", ".pdf"})
    check_outputs(save, plot, force=force)
    if find_largest and device_memory is None:
        raise UsageError("--largest-batch needs --device-memory")
    if low_memory and device_memory is None:
        raise UsageError("--low-memory needs --device-memory")
    request = choose_policy(policy, plan_file)

    from amskv_jax.cli.tables import print_device_memory, print_memory, print_plan  # noqa: PLC0415
    from amskv_jax.device_memory import (  # noqa: PLC0415
        DeviceMemory,
        largest_batch,
        predict_on_gpu,
    )
    from amskv_jax.plan.stats import LayerStats  # noqa: PLC0415
    from amskv_jax.policies import AMSKV, Full  # noqa: PLC0415
    from amskv_jax.reports.plots import save_plan_plot  # noqa: PLC0415
    from amskv_jax.words import byte_size  # noqa: PLC0415

    wanted = {"aspect": aspect, "size": size, "cache_dtype": cache_dtype, "cfg": cfg}
    if model is not None and checkpoint is None:
        pipe = as_wanted(known_pipeline(model, dtype), **wanted)
    elif checkpoint is not None and model is None:
        pipe = open_checkpoint(checkpoint, dtype, **wanted)
    else:
        raise UsageError("give either --model or --checkpoint")
    if low_memory:
        check_low_memory(pipe)
    shape, geometry = pipe.shape, pipe.geometry(batch)
    statistics = LayerStats.load(stats, pipe.fingerprint or None) if stats else None
    made = request.plan(shape, geometry, statistics)
    plans = {"this plan": made}
    if request.policy != AMSKV() or request.max_bytes is not None:
        plans = {"AMS-KV with its defaults": AMSKV().plan(shape)} | plans
    print_plan(made)
    numbers = pipe.activation_dtype
    held = pipe.model.held_bytes(geometry.rows, None, numbers)
    print_memory(plans, geometry, batch, numbers, held)
    if device_memory is not None:

        def predicted(pictures: int) -> DeviceMemory:
            own = request.plan(shape, pipe.geometry(pictures), statistics)
            return predict_on_gpu(pipe.sampler(own), pictures, in_turns=low_memory)

        print_device_memory(predicted(batch), batch, device_memory)
        if find_largest:
            most = largest_batch(lambda count: predicted(count).total, device_memory)
            taken = byte_size(predicted(most).total) if most else "nothing"
            print_line(
                f"The largest batch within {byte_size(device_memory)}: {most} "
                f"picture{'s'[: most != 1]} at once, which take {taken}."
            )
    if save:
        with replacing(save) as temporary:
            temporary.write_text(made.to_json(), encoding="utf-8")
        print_line(f"wrote {save}")
    if plot:
        full = Full().plan(shape)
        with progress("drawing"), replacing(plot) as temporary:
            title = made.note.partition(";")[0]
            save_plan_plot({full.note: full, title: made}, temporary)
        print_line(f"wrote {plot}")
