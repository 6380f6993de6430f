"""``amskv sample``: pictures from a checkpoint, or from the model that comes with the package."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amskv_jax.checkpoints.embedded import find_checkpoint
from amskv_jax.cli.bulk import (
    BATCH,
    NumOption,
    PictureFormat,
    PictureFormatOption,
    ShardSizeOption,
    ShardsOption,
    ShardTokensOption,
    ShareOption,
    describe_wanted,
    draw_bulk,
    read_bulk,
)
from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.files import check_outputs, check_suffix, free_name
from amskv_jax.cli.hosts import DistributedOption, join
from amskv_jax.cli.memory import explaining_memory
from amskv_jax.cli.options import (
    Attention,
    CacheDtypeOption,
    CompilationCacheOption,
    DeviceMemoryOption,
    ForceOption,
    LowMemoryOption,
    MeshOption,
    ProductDtypeOption,
    SeedOption,
    StatsOption,
)
from amskv_jax.cli.policy import PlanFileOption, PolicyOption, choose_policy
from amskv_jax.cli.wanted import (
    AspectOption,
    CfgOption,
    GuideOption,
    LabelsOption,
    NegativePromptOption,
    PromptOption,
    PromptsOption,
    SizeOption,
    TauOption,
    TextFeaturesOption,
    TopKOption,
    TopPOption,
    check_low_memory,
    conditions_of,
    open_checkpoint,
    read_codes,
    with_weights,
)
from amskv_jax.files import replacing

if TYPE_CHECKING:
    import numpy as np

    from amskv_jax.generate import Sampler
    from amskv_jax.models.guidance import Controls
    from amskv_jax.models.protocol import Conditions
    from amskv_jax.pipeline import Pipeline

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def sample(
    *,
    policy: PolicyOption = None,
    plan_file: PlanFileOption = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Policies to draw with first, beside --policy. With neither --checkpoint nor a "
            "policy: --policy ams --compare full.",
            metavar="full,...",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder, packed file, or embedded model; the embedded var-cifar10 if not given."
        ),
    ] = None,
    labels: LabelsOption = None,
    prompt: PromptOption = None,
    negative_prompt: NegativePromptOption = None,
    prompts: PromptsOption = None,
    text_features: TextFeaturesOption = None,
    aspect: AspectOption = None,
    size: SizeOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Contact sheet of all pictures (.png, .jpg, .webp); amskv-sample.png, with a "
            "number if that exists, if not given."
        ),
    ] = None,
    num_per_label: Annotated[int, typer.Option(min=1, help="Pictures of each.")] = 1,
    seed: SeedOption = 0,
    cfg: CfgOption = None,
    tau: TauOption = None,
    guide: GuideOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    forced_codes: Annotated[
        Path | None,
        typer.Option(
            help="Codes (.npz, codes [pictures, tokens, ...] on the tokenizer's grids) which take "
            "the place of those that are drawn at the first scales."
        ),
    ] = None,
    more_smooth: Annotated[
        bool,
        typer.Option("--more-smooth", help="Feed back mixtures of tokens: smoother pictures."),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures generated at once; all if not given.")
    ] = None,
    dtype: ProductDtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    attention: Annotated[Attention, typer.Option(help="Attention back end.")] = Attention.AUTO,
    mesh: MeshOption = None,
    low_memory: LowMemoryOption = False,
    stats: StatsOption = None,
    save_tokens: Annotated[
        Path | None, typer.Option(help="Write tokens, labels and seed here (.npz).")
    ] = None,
    num: NumOption = None,
    shards: ShardsOption = None,
    picture_format: PictureFormatOption = PictureFormat.NPZ,
    shard_size: ShardSizeOption = None,
    with_tokens: ShardTokensOption = False,
    share: ShareOption = None,
    distributed: DistributedOption = False,
    force: ForceOption = False,
    device_memory: DeviceMemoryOption = None,
    compilation_cache: CompilationCacheOption = True,
) -> None:
    """Draw pictures of classes or prompts, with a cache that keeps what the policy says."""
    unfit = {
        "--compare": compare,
        "--out": out,
        "--num-per-label": num_per_label > 1,
        "--save-tokens": save_tokens,
        "--force": force,
    }
    bulk = read_bulk(
        num, shards, picture_format, shard_size, with_tokens, share, distributed, unfit
    )
    out = out or free_name(Path("amskv-sample.png"))
    check_suffix(out, PICTURE_SUFFIXES)
    check_suffix(save_tokens, {".npz"})
    check_outputs(out, save_tokens, force=force)
    if (checkpoint, policy, plan_file, compare) == (None, None, None, None):
        policy, compare = "ams", None if bulk else "full"
    request = choose_policy(policy, plan_file)
    if bulk and bulk.distributed:
        bulk = replace(bulk, share=join(bulk.share))

    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from amskv_jax.attention import choose_implementation  # noqa: PLC0415
    from amskv_jax.cli.tables import print_memory, print_plan  # noqa: PLC0415
    from amskv_jax.device_memory import check_memory, device_limit  # noqa: PLC0415
    from amskv_jax.drawing import Chosen  # noqa: PLC0415
    from amskv_jax.float8 import check_float8  # noqa: PLC0415
    from amskv_jax.plan.memory import MemoryReport  # noqa: PLC0415
    from amskv_jax.plan.stats import LayerStats  # noqa: PLC0415
    from amskv_jax.policies.grammar import parse_policies  # noqa: PLC0415
    from amskv_jax.reports.sheet import contact_sheet, side_by_side  # noqa: PLC0415
    from amskv_jax.words import byte_size  # noqa: PLC0415

    if compilation_cache:
        use_compilation_cache()
    others = parse_policies(compare) if compare else []
    place = find_checkpoint(checkpoint)
    pipe = open_checkpoint(
        place,
        dtype,
        mesh,
        aspect=aspect,
        size=size,
        cache_dtype=cache_dtype,
        cfg=cfg,
        tau=tau,
        guide=guide,
        top_k=top_k,
        top_p=top_p,
        more_smooth=more_smooth,
    )
    if low_memory:
        check_low_memory(pipe)
    check_float8(pipe.dtype)
    pipe = replace(pipe, low_memory=low_memory)
    with progress("reading"):
        conditions = conditions_of(
            pipe,
            labels=labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompts=prompts,
            text_features=text_features,
        )
    if bulk is not None:
        statistics = LayerStats.load(stats, pipe.fingerprint) if stats else None
        geometry = pipe.geometry(min(batch_size or BATCH, bulk.num))
        plan = request.plan(pipe.shape, geometry, statistics)
        if bulk.speaks:
            print_plan(plan)
        conditions = conditions or pipe.conditions(None)
        sampler = pipe.sampler(plan, attention=attention.value)
        one = conditions.batch(np.arange(1))
        at_once = geometry.rows // pipe.geometry(1).rows
        limit = device_memory or device_limit()
        check_memory(sampler, at_once, one, limit, in_turns=low_memory)
        texts = {"prompt": prompt, "negative_prompt": negative_prompt}
        named = {"prompts": prompts, "text_features": text_features, "forced_codes": forced_codes}
        draw_bulk(
            bulk,
            pipe,
            place,
            conditions,
            plan,
            sampler,
            wanted=describe_wanted(labels, texts, named),
            forced=read_codes(forced_codes, len(conditions), bulk.num) if forced_codes else None,
            seed=seed,
            batch=batch_size,
        )
        return
    if conditions is None:
        classes = pipe.conditions(None)
        conditions = Chosen(classes, tuple(range(min(10, len(classes)))))
    shown = np.repeat(np.arange(len(conditions)), num_per_label)
    conditions = Chosen(conditions, tuple(shown.tolist()))
    count = len(conditions)
    batch = min(batch_size or count, count)
    batch = pipe.mesh.filled(batch) if pipe.mesh else batch
    statistics = LayerStats.load(stats, pipe.fingerprint) if stats else None
    controls = pipe.controls(forced=read_codes(forced_codes, count) if forced_codes else None)
    shape, geometry = pipe.shape, pipe.geometry(batch)
    plans = [one.plan(shape, geometry, statistics) for one in (*others, request)]
    titles = [plan.note.partition(":")[0] for plan in plans]
    if len(set(titles)) < len(titles):
        titles = [one.text for one in (*others, request)]
    samplers = {
        title: pipe.sampler(plan, attention=attention.value)
        for title, plan in zip(titles, plans, strict=True)
    }
    backend = choose_implementation(attention.value, pipe.activation_dtype, shape.head_dim)
    device = jax.devices()[0]
    print_plan(plans[-1])
    numbers = pipe.activation_dtype
    held = pipe.model.held_bytes(geometry.rows, conditions.batch(np.arange(batch)), numbers)
    print_memory({"this plan": plans[-1]}, geometry, batch, numbers, held)
    print_line(f"{pipe.dtype} on {device.device_kind} ({device.platform}), attention {backend}")
    if pipe.mesh:
        print_line(f"mesh of {pipe.mesh}: {pipe.mesh.size} devices, {batch} pictures at once")

    limit = device_memory or device_limit()
    for sampler in samplers.values():
        condition = conditions.batch(np.arange(batch))
        check_memory(sampler, batch, condition, limit, in_turns=low_memory)
    pipe = with_weights(pipe, place)
    captions = conditions.captions(pipe.classes)
    panels = {}
    for name, sampler in samplers.items():
        tokens, pictures, seconds = _draw(pipe, sampler, conditions, controls, seed, batch, limit)
        size = byte_size(MemoryReport.of(sampler.plan, geometry).plan)
        drawn = f"{count} picture{'s'[: count > 1]} in {seconds:.2f} s"
        heading = f"{name}: cache of {size}, {drawn}"
        print_line(f"{heading}: {count / seconds:.2f} per second")
        panels[heading] = contact_sheet(pictures, captions, num_per_label * (5 if others else 1))
        sheet = side_by_side(panels) if others else panels[heading]
        with replacing(out) as temporary:  # after every panel, as the next one takes its time
            sheet.save(temporary)
    print_line(f"wrote {out}")
    if save_tokens:
        known = conditions.classes(np.arange(count))
        arrays = {} if known is None else {"labels": known}
        if tokens.ndim > 2:  # bits
            tokens = tokens.astype(np.uint8)
        arrays |= {"tokens": tokens, "seed": np.array(seed)}
        with replacing(save_tokens) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
        print_line(f"wrote {save_tokens}")


def _draw(
    pipe: "Pipeline",
    sampler: "Sampler",
    conditions: "Conditions",
    controls: "Controls",
    seed: int,
    batch: int,
    limit: int | None,
) -> "tuple[np.ndarray, np.ndarray, float]":
    """Return tokens, pictures and the seconds they took; compiling comes before, and is printed."""
    import numpy as np  # noqa: PLC0415

    from amskv_jax.drawing import Drawer  # noqa: PLC0415

    count = len(conditions)
    with explaining_memory(batch), progress("compiling") as update:
        drawer = Drawer(
            sampler,
            pipe.params,
            conditions,
            controls,
            batch,
            in_turns=pipe.low_memory,
            device_memory=limit,
        )
        print_line(
            f"compiled in {drawer.compile_seconds:.1f} s, "
            f"{drawer.trace_seconds:.1f} s of it tracing"
        )
        start = time.perf_counter()
        drawn = []
        for own in drawer.batches(pipe.params, seed, 0, count, controls):
            update("drawing", own.first / count if count > batch else None)
            drawn.append((own.tokens(), own.pictures()))
        seconds = time.perf_counter() - start
    tokens, pictures = map(np.concatenate, zip(*drawn, strict=True))
    return tokens, pictures, seconds
