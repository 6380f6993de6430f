"""``amskv sample``: pictures from a checkpoint, or from the model that comes with the package."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amskv_jax.checkpoints.embedded import find_checkpoint
from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.files import check_outputs, check_suffix, free_name
from amskv_jax.cli.memory import explaining_memory
from amskv_jax.cli.options import (
    Attention,
    CompilationCacheOption,
    Dtype,
    ForceOption,
    GuidanceOption,
    SeedOption,
    StatsOption,
    TopKOption,
    TopPOption,
    parse_numbers,
)
from amskv_jax.cli.policy import WithinBytes, plan_for, takes_policy
from amskv_jax.files import replacing

if TYPE_CHECKING:
    import numpy as np

    from amskv_jax.generate import Sampler
    from amskv_jax.policies import Policy

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@takes_policy
def sample(
    *,
    policy: "Policy | WithinBytes",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder, packed file, or embedded model. If not given, the embedded var-cifar10 "
            "draws with the full cache and, beside it, with the policy (ams unless another is "
            "named)."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Classes to draw; the first ten if not given.", metavar="207,360 or 0-9"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Contact sheet of all pictures (.png, .jpg, .webp); amskv-sample.png, with a "
            "number if that exists, if not given."
        ),
    ] = None,
    num_per_label: Annotated[int, typer.Option(min=1, help="Pictures of each class.")] = 1,
    seed: SeedOption = 0,
    cfg: GuidanceOption = None,
    top_k: TopKOption = 900,
    top_p: TopPOption = 0.96,
    more_smooth: Annotated[
        bool,
        typer.Option("--more-smooth", help="Feed back mixtures of tokens: smoother pictures."),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures generated at once; all if not given.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights, products and cache; as stored if not given.")
    ] = None,
    attention: Annotated[Attention, typer.Option(help="Attention back end.")] = Attention.AUTO,
    stats: StatsOption = None,
    save_tokens: Annotated[
        Path | None, typer.Option(help="Write tokens, labels and seed here (.npz).")
    ] = None,
    force: ForceOption = False,
    compilation_cache: CompilationCacheOption = True,
) -> None:
    """Draw pictures of classes, with a cache that keeps what the policy says."""
    out = out or free_name(Path("amskv-sample.png"))
    check_suffix(out, PICTURE_SUFFIXES)
    check_suffix(save_tokens, {".npz"})
    check_outputs(out, save_tokens, force=force)
    numbers = None if labels is None else parse_numbers(labels, "--labels")

    from dataclasses import replace  # noqa: PLC0415

    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from amskv_jax.attention import choose_implementation  # noqa: PLC0415
    from amskv_jax.checkpoints.folder import load_checkpoint, read_info  # noqa: PLC0415
    from amskv_jax.cli.tables import print_memory, print_plan  # noqa: PLC0415
    from amskv_jax.generate import Sampler  # noqa: PLC0415
    from amskv_jax.pipeline import check_labels, model_configs  # noqa: PLC0415
    from amskv_jax.plan.memory import CacheGeometry, MemoryReport  # noqa: PLC0415
    from amskv_jax.plan.stats import LayerStats  # noqa: PLC0415
    from amskv_jax.policies import AMSKV, Full  # noqa: PLC0415
    from amskv_jax.reports.sheet import contact_sheet, side_by_side  # noqa: PLC0415
    from amskv_jax.sampling import TokenSampling  # noqa: PLC0415
    from amskv_jax.words import byte_size  # noqa: PLC0415

    if compilation_cache:
        use_compilation_cache()
    compare = checkpoint is None
    place = find_checkpoint(checkpoint)
    info = read_info(place)
    transformer, tokenizer = model_configs(info)
    shape = transformer.cache_shape
    if numbers is None:
        numbers = tuple(range(min(10, transformer.num_classes)))
    classes = np.repeat(check_labels(numbers, transformer.num_classes), num_per_label)
    batch = min(batch_size or len(classes), len(classes))
    statistics = LayerStats.load(stats, info.fingerprint) if stats else None
    number_type = dtype.value if dtype else info.dtype
    strength = info.guidance if cfg is None else cfg
    full = Full()
    if compare and policy == full:
        policy = AMSKV()
    plan = plan_for(policy, shape, batch, number_type, statistics)
    sampler = Sampler(
        transformer,
        tokenizer,
        plan,
        TokenSampling(top_k, top_p, more_smooth),
        number_type,
        attention.value,
    )
    backend = choose_implementation(attention.value, sampler.dtype, transformer.head_dim)
    device = jax.devices()[0]
    print_plan(plan)
    print_memory({"this plan": plan}, shape, batch, sampler.dtype)
    print_line(f"{sampler.dtype} on {device.device_kind} ({device.platform}), attention {backend}")

    with progress("loading weights"):
        params = load_checkpoint(place, sampler.dtype).params
    samplers = {plan.note.partition(":")[0]: sampler}
    if compare:
        complete = full.plan(shape)
        samplers = {"full cache": replace(sampler, plan=complete), **samplers}
    names = info.classes or [f"class {label}" for label in range(transformer.num_classes)]
    captions = [names[label] for label in classes]
    geometry = CacheGeometry.of(shape, batch, number_type)
    panels = {}
    for name, own in samplers.items():
        tokens, pictures, seconds = _generate(own, params, classes, seed, strength, batch)
        size = byte_size(MemoryReport.of(own.plan, geometry).plan)
        drawn = f"{len(classes)} picture{'s'[: len(classes) > 1]} in {seconds:.2f} s"
        heading = f"{name}: cache of {size}, {drawn}"
        print_line(f"{heading}: {len(classes) / seconds:.2f} per second")
        panels[heading] = contact_sheet(pictures, captions, num_per_label * (5 if compare else 1))
        sheet = side_by_side(panels) if compare else panels[heading]
        with replacing(out) as temporary:  # after every panel, as the next one takes its time
            sheet.save(temporary)
    print_line(f"wrote {out}")
    if save_tokens:
        with replacing(save_tokens) as temporary:
            np.savez(temporary, tokens=tokens, labels=classes, seed=seed)
        print_line(f"wrote {save_tokens}")


def _generate(
    sampler: "Sampler", params: Any, labels: "np.ndarray", seed: int, cfg: float, batch: int
) -> "tuple[np.ndarray, np.ndarray, float]":
    """Return tokens, pictures and the seconds they took; compiling comes before, and is printed."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from amskv_jax.generate import picture_keys  # noqa: PLC0415

    count = len(labels)
    batches = -(-count // batch)
    # The last batch is filled up with the last label, so that one compiled program serves all.
    labels = np.pad(labels, (0, batches * batch - count), mode="edge")
    keys = picture_keys(jax.random.key(seed), len(labels))
    tokens, pictures = [], []
    with explaining_memory(batch), progress("compiling") as update:
        start = time.perf_counter()
        first = (params, labels[:batch], keys[:batch], cfg)
        lowered = type(sampler).__call__.lower(sampler, *first)
        traced = time.perf_counter()
        compiled = lowered.compile()
        print_line(
            f"compiled in {time.perf_counter() - start:.1f} s, {traced - start:.1f} s of it tracing"
        )
        start = time.perf_counter()
        for index in range(batches):
            update("drawing", index / batches if batches > 1 else None)
            own = slice(index * batch, (index + 1) * batch)
            samples = compiled(params, labels[own], keys[own], cfg)
            tokens.append(np.asarray(samples.tokens))
            pictures.append(np.asarray(samples.pictures))
        seconds = time.perf_counter() - start
    return np.concatenate(tokens)[:count], np.concatenate(pictures)[:count], seconds
