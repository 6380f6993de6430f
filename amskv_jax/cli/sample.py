"""``amskv sample``: pictures from a checkpoint."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.cli.console import print_line, progress
from amskv_jax.cli.files import check_outputs, check_suffix, replacing
from amskv_jax.cli.options import (
    Attention,
    CheckpointOption,
    Dtype,
    ForceOption,
    StatsOption,
    parse_numbers,
)
from amskv_jax.cli.policy import takes_policy
from amskv_jax.errors import AmskvError

if TYPE_CHECKING:
    import numpy as np

    from amskv_jax.generate import Sampler
    from amskv_jax.policies import Policy

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@takes_policy
def sample(
    *,
    policy: "Policy",
    checkpoint: CheckpointOption,
    labels: Annotated[str, typer.Option(help="Classes to draw.", metavar="207,360 or 0-9")],
    out: Annotated[Path, typer.Option(help="Contact sheet of all pictures (.png, .jpg, .webp).")],
    num_per_label: Annotated[int, typer.Option(min=1, help="Pictures of each class.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")] = 0,
    cfg: Annotated[float, typer.Option(help="Guidance strength at the last scale.")] = 1.5,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0: all, 1: greedy.")
    ] = 900,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="Draw from tokens of this probability in total; 0: all."),
    ] = 0.96,
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
    compilation_cache: Annotated[
        bool,
        typer.Option(
            "--compilation-cache/--no-compilation-cache",
            help="Keep compiled programs in the user's cache folder.",
        ),
    ] = True,
) -> None:
    """Draw pictures of classes, with a cache that keeps what the policy says."""
    check_suffix(out, PICTURE_SUFFIXES)
    check_suffix(save_tokens, {".npz"})
    check_outputs(out, save_tokens, force=force)
    numbers = parse_numbers(labels, "--labels")

    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from amskv_jax.attention import choose_implementation  # noqa: PLC0415
    from amskv_jax.checkpoint import load_checkpoint, read_info  # noqa: PLC0415
    from amskv_jax.cli.tables import print_memory, print_plan  # noqa: PLC0415
    from amskv_jax.generate import Sampler  # noqa: PLC0415
    from amskv_jax.pipeline import check_labels, model_configs  # noqa: PLC0415
    from amskv_jax.sampling import TokenSampling  # noqa: PLC0415
    from amskv_jax.sheet import contact_sheet  # noqa: PLC0415
    from amskv_jax.stats import LayerStats  # noqa: PLC0415

    if compilation_cache:
        use_compilation_cache()
    info = read_info(checkpoint)
    transformer, tokenizer = model_configs(info)
    classes = np.repeat(check_labels(numbers, transformer.num_classes), num_per_label)
    batch = min(batch_size or len(classes), len(classes))
    statistics = LayerStats.load(stats, info.fingerprint) if stats else None
    plan = policy.plan(transformer.schedule, transformer.depth, statistics)
    sampler = Sampler(
        transformer,
        tokenizer,
        plan,
        TokenSampling(top_k, top_p, more_smooth),
        dtype.value if dtype else info.dtype,
        attention.value,
    )
    backend = choose_implementation(attention.value, sampler.dtype, transformer.head_dim)
    device = jax.devices()[0]
    print_plan(plan)
    print_memory({"this plan": plan}, transformer, batch, sampler.dtype)
    print_line(f"{sampler.dtype} on {device.device_kind} ({device.platform}), attention {backend}")

    with progress("loading weights"):
        params = load_checkpoint(checkpoint, sampler.dtype).params
    tokens, pictures = _generate(sampler, params, classes, seed, cfg, batch)

    captions = [f"class {label}" for label in classes]
    with replacing(out) as temporary:
        contact_sheet(pictures, captions, num_per_label).save(temporary)
    print_line(f"wrote {out}")
    if save_tokens:
        with replacing(save_tokens) as temporary:
            np.savez(temporary, tokens=tokens, labels=classes, seed=seed)
        print_line(f"wrote {save_tokens}")


def _generate(
    sampler: "Sampler", params: Any, labels: "np.ndarray", seed: int, cfg: float, batch: int
) -> "tuple[np.ndarray, np.ndarray]":
    """Return tokens and pictures, and print how long it took."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from amskv_jax.generate import picture_keys  # noqa: PLC0415

    count = len(labels)
    batches = -(-count // batch)
    # The last batch is filled up with the last label, so that one compiled program serves all.
    labels = np.pad(labels, (0, batches * batch - count), mode="edge")
    keys = picture_keys(jax.random.key(seed), len(labels))
    tokens, pictures = [], []
    try:
        with progress("compiling") as update:
            start = time.perf_counter()
            first = (params, labels[:batch], keys[:batch], cfg)
            lowered = type(sampler).__call__.lower(sampler, *first)
            traced = time.perf_counter()
            compiled = lowered.compile()
            print_line(
                f"compiled in {time.perf_counter() - start:.1f} s, "
                f"{traced - start:.1f} s of it tracing"
            )
            start = time.perf_counter()
            for index in range(batches):
                update("drawing", index / batches if batches > 1 else None)
                own = slice(index * batch, (index + 1) * batch)
                samples = compiled(params, labels[own], keys[own], cfg)
                tokens.append(np.asarray(samples.tokens))
                pictures.append(np.asarray(samples.pictures))
            seconds = time.perf_counter() - start
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise AmskvError(
            f"not enough memory for {batch} pictures at once: give a smaller --batch-size"
        ) from error
    print_line(f"{count} pictures in {seconds:.2f} s: {count / seconds:.2f} per second")
    return np.concatenate(tokens)[:count], np.concatenate(pictures)[:count]
