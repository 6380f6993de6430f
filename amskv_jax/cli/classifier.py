"""``amskv train classifier``: the network through which the metrics look at pictures."""

from pathlib import Path
from typing import Annotated

import typer

from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.cli.console import print_line
from amskv_jax.cli.files import check_outputs, check_suffix
from amskv_jax.cli.options import CompilationCacheOption, ForceOption, SeedOption


def classifier(
    data: Annotated[Path, typer.Option(help="Packed .npz file or folder of class folders.")],
    run: Annotated[Path, typer.Option(help="Folder of the training run; one there goes on.")],
    out: Annotated[Path, typer.Option(help="Write the classifier here (.safetensors).")],
    validation: Annotated[
        Path | None, typer.Option(help="Held-out pictures: their accuracy is reported.")
    ] = None,
    side: Annotated[int, typer.Option(min=8, help="Height and width of the pictures.")] = 32,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per step.")] = 512,
    width: Annotated[int, typer.Option(min=1, help="Factor of the network's channels.")] = 4,
    seed: SeedOption = 0,
    force: ForceOption = False,
    compilation_cache: CompilationCacheOption = True,
) -> None:
    """Train the small classifier whose features and classes `amskv eval` and `study` look at.

    Three minutes on a recent GPU for CIFAR-10.
    """
    check_suffix(out, {".safetensors"})
    check_outputs(out, force=force)

    from dataclasses import replace  # noqa: PLC0415

    from amskv_jax.evaluation.classifier import save_classifier  # noqa: PLC0415
    from amskv_jax.training import classifier as network  # noqa: PLC0415
    from amskv_jax.training.data import load_pictures  # noqa: PLC0415

    if compilation_cache:
        use_compilation_cache()
    size = side, side
    pictures = load_pictures(data, size)
    held_out = load_pictures(validation, size) if validation else None
    per_epoch = max(1, len(pictures) // batch_size)
    steps = epochs * per_epoch
    config = network.ClassifierTraining(
        network.ClassifierConfig(len(pictures.classes), width),
        replace(network.OPTIMIZATION, warmup_steps=max(1, steps // 10)),
        replace(
            network.RUN,
            steps=steps,
            batch_size=batch_size,
            steps_per_call=per_epoch,
            checkpoint_every=10 * per_epoch,
            seed=seed,
        ),
    )
    params = network.train_classifier(config, pictures, run, validation=held_out)
    save_classifier(out, config.model, params)
    print_line(f"wrote {out}")
    if held_out:
        _, logits = network.apply_classifier(config.model, params, held_out.pixels)
        accuracy = (logits.argmax(1) == held_out.labels).mean()
        print_line(f"accuracy on {len(held_out)} held-out pictures: {accuracy:.2%}")
