"""``amskv score``: how well a model predicts real pictures with the caches of policies."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.cli.console import make_console, print_line, progress
from amskv_jax.cli.files import check_outputs, check_suffix
from amskv_jax.cli.memory import explaining_memory
from amskv_jax.cli.options import (
    Attention,
    AttentionOption,
    CheckpointOption,
    CompilationCacheOption,
    ForceOption,
    ProductDtypeOption,
    StatsOption,
)
from amskv_jax.cli.policy import PoliciesOption
from amskv_jax.cli.real import real_pictures
from amskv_jax.cli.wanted import (
    AspectOption,
    SizeOption,
    open_checkpoint,
    with_weights,
)
from amskv_jax.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

    from amskv_jax.evaluation.score import Mean, Score
    from amskv_jax.schedule import ScaleSchedule


def score(
    checkpoint: CheckpointOption,
    real: Annotated[
        Path,
        typer.Option(
            help="Real pictures which the model was not trained on: a packed .npz or a folder of "
            "class folders."
        ),
    ],
    policies: PoliciesOption = "full,ams",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="What the pictures show, one in a line in their order, for text-to-image models."
        ),
    ] = None,
    text_features: Annotated[
        Path | None, typer.Option(help="The same as features (.npz), made by `amskv encode`.")
    ] = None,
    aspect: AspectOption = None,
    size: SizeOption = None,
    num: Annotated[
        int,
        typer.Option(min=2, help="Most pictures, spread evenly over all there are."),
    ] = 1000,
    crop: Annotated[
        bool, typer.Option("--crop", help="Scale and crop pictures of another size.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 50,
    dtype: ProductDtypeOption = None,
    cache_dtypes: Annotated[
        str | None,
        typer.Option(
            "--cache-dtype",
            help="Numbers in the caches of the policies, each of these in turn; those of --dtype "
            "if not given. The full cache that all are compared with keeps those of --dtype.",
            metavar="bfloat16,int8,int4,...",
        ),
    ] = None,
    attention: AttentionOption = Attention.AUTO,
    stats: StatsOption = None,
    out: Annotated[Path | None, typer.Option(help="Write all figures here (.json).")] = None,
    force: ForceOption = False,
    compilation_cache: CompilationCacheOption = True,
) -> None:
    """Measure how well real pictures are predicted when the cache keeps what each policy says.

    Their tokens are forced through the sampler, without guidance: a loss, and the lower the better.
    There are no random numbers in it, and no feature network.
    """
    check_suffix(out, {".json"})
    check_outputs(out, force=force)

    import jax  # noqa: PLC0415

    from amskv_jax.evaluation import score as scoring  # noqa: PLC0415
    from amskv_jax.numbers import numbers_of  # noqa: PLC0415
    from amskv_jax.plan.stats import LayerStats  # noqa: PLC0415
    from amskv_jax.policies import Full  # noqa: PLC0415
    from amskv_jax.policies.budgets import memory_report  # noqa: PLC0415
    from amskv_jax.policies.grammar import parse_policies  # noqa: PLC0415

    requests = parse_policies(policies)
    if compilation_cache:
        use_compilation_cache()
    pipe = open_checkpoint(checkpoint, dtype, aspect=aspect, size=size)
    numbers = cache_dtypes.split(",") if cache_dtypes else [pipe.activation_dtype]
    for name in numbers:
        numbers_of(name)
    statistics = LayerStats.load(stats, pipe.fingerprint) if stats else None
    geometry = pipe.geometry(batch_size)
    plans = {one.text: one.plan(pipe.shape, geometry, statistics) for one in requests}
    caches = {
        text if name == pipe.activation_dtype else f"{text}, {name}": (plan, name)
        for text, plan in plans.items()
        for name in numbers
    }
    full = pipe.plan(Full()), pipe.activation_dtype
    if full not in caches.values():
        caches = {"full": full, **caches}
    texts = {"prompts": prompts, "text_features": text_features}
    pixels, conditions, total = real_pictures(pipe, real, num, crop=crop, **texts)
    count = len(pixels)
    device = jax.devices()[0]
    print_line(
        f"{count} of {total} pictures, {pipe.dtype} on {device.device_kind} ({device.platform})"
    )
    pipe = with_weights(pipe, checkpoint)
    samplers = {
        name: replace(
            pipe.sampler(plan, attention=attention.value),
            cache_dtype=None if kept == pipe.activation_dtype else kept,
        )
        for name, (plan, kept) in caches.items()
    }
    with explaining_memory(batch_size), progress("making tokens") as update:
        codes = scoring.encode(pipe, pixels, min(batch_size, count))
        scores = scoring.score(
            pipe,
            samplers,
            codes,
            conditions,
            batch=batch_size,
            attention=attention.value,
            update=update,
        )
    records = {}
    for name, (plan, kept) in caches.items():
        report = memory_report(plan, pipe.shape, kept)
        records[name] = {
            "note": plan.note,
            "cache_dtype": kept,
            "states_formats": plan.states_formats,
            "cache_bytes": report.plan,
            "saving": report.saving(report.full),
            **scores[name].record(),
        }
    savings = {name: record["saving"] for name, record in records.items()}
    _print_scores(scores, savings, pipe.schedule)
    if out:
        found = {
            "fingerprint": pipe.fingerprint,
            "dtype": pipe.dtype,
            "device": device.device_kind,
            "pictures": count,
            "policies": records,
        }
        with replacing(out) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print_line(f"wrote {out}")


def _print_scores(
    scores: "Mapping[str, Score]", savings: Mapping[str, float], schedule: "ScaleSchedule"
) -> None:
    from amskv_jax.words import decimal  # noqa: PLC0415

    codes = next(iter(scores.values())).codes
    table = _table("policy", "saved", codes=codes)
    for name, own in scores.items():
        table.add_row(name, f"{decimal(100 * savings[name])}%", *_cells(own, None))
    make_console().print(table)
    table = _table("policy", "scale", codes=codes)
    for name, own in scores.items():
        for scale, (height, width) in enumerate(schedule.grids):
            first = name if scale == 0 else ""
            table.add_row(first, f"{scale}: {height}x{width}", *_cells(own, scale))
        table.add_section()
    make_console().print(table)
    print_line(
        "Cross-entropy of the true tokens with each policy's cache, what it is above the full "
        "cache's on the same pictures, and the divergence KL(full || policy), in nats per token; "
        "± one standard error over pictures. Saved: of a cache of all scales (bfloat16 if the "
        "policy's holds codes)."
    )


def _table(*columns: str, codes: int) -> "Table":
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(*columns, box=SIMPLE_HEAD)
    per_code = ["bits per code"] if codes > 1 else []
    for column in ("cross-entropy", "above full", "divergence", "in bits", *per_code):
        table.add_column(column, justify="right")
    return table


def _cells(score: "Score", scale: int | None) -> list[str]:
    """Return what a row says of one scale, None for all."""
    figures = [
        score.entropy,
        score.above_full,
        score.divergence,
        score.bits(score.entropy),
        *([score.bits_per_code(score.entropy)] if score.codes > 1 else []),
    ]
    return [_words(one.total if scale is None else one.scales[scale]) for one in figures]


def _words(mean: "Mean") -> str:
    rounded = round(mean.mean, 4) + 0.0  # which is never minus zero
    return f"{rounded:.4f} ± {mean.error:.4f}"
