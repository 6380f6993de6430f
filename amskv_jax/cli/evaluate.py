"""``amskv eval``: figures of chosen policies."""

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amskv_jax.checkpoints.embedded import find_classifier
from amskv_jax.cli.compilation_cache import use_compilation_cache
from amskv_jax.cli.console import make_console, print_line, progress
from amskv_jax.cli.options import (
    Attention,
    AttentionOption,
    CheckpointOption,
    ClassifierOption,
    CompilationCacheOption,
    ManyOption,
    MeshOption,
    ProductDtypeOption,
    SeedOption,
    StatsOption,
)
from amskv_jax.cli.policy import PoliciesOption
from amskv_jax.cli.wanted import (
    AspectOption,
    CfgOption,
    PromptsOption,
    SizeOption,
    TextFeaturesOption,
    TopKOption,
    TopPOption,
    conditions_of,
    open_checkpoint,
    with_weights,
)
from amskv_jax.errors import UsageError
from amskv_jax.files import replacing

if TYPE_CHECKING:
    from amskv_jax.evaluation.features import FeatureNetwork


class Features(StrEnum):
    """Networks through which the metrics look at pictures."""

    CLASSIFIER = "classifier"
    INCEPTION = "inception"
    NONE = "none"


def evaluate(
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option(help="Folder to write into; one there already goes on.")],
    policies: PoliciesOption = "full,ams",
    num: Annotated[int, typer.Option(min=1, help="Pictures per policy.")] = 10_000,
    features: Annotated[
        Features, typer.Option(help="Feature network; none: draw and compare with full only.")
    ] = Features.CLASSIFIER,
    classifier: ClassifierOption = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="Weights of Inception, if not where torch-fidelity looks.")
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(help="Real pictures: a packed .npz or a folder of class folders."),
    ] = None,
    seed: SeedOption = 0,
    prompts: PromptsOption = None,
    text_features: TextFeaturesOption = None,
    aspect: AspectOption = None,
    size: SizeOption = None,
    cfg: CfgOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    batch_size: ManyOption = 500,
    shard: Annotated[int, typer.Option(min=1, help="Pictures per file while drawing.")] = 1000,
    dtype: ProductDtypeOption = None,
    attention: AttentionOption = Attention.AUTO,
    mesh: MeshOption = None,
    stats: StatsOption = None,
    compilation_cache: CompilationCacheOption = True,
) -> None:
    """Draw many pictures with several policies and measure them; resumes where it was stopped.

    NAME.npz is in the layout that OpenAI's ADM evaluator reads. Only features of Inception make
    the Frechet distance an FID; those of a classifier compare policies of one model.
    """
    from amskv_jax.checkpoints.folder import read_info  # noqa: PLC0415
    from amskv_jax.evaluation.evaluate import Evaluation  # noqa: PLC0415
    from amskv_jax.evaluation.evaluate import evaluate as run  # noqa: PLC0415
    from amskv_jax.evaluation.measures import Judge  # noqa: PLC0415
    from amskv_jax.evaluation.metrics import check_picture_count  # noqa: PLC0415
    from amskv_jax.float8 import check_float8  # noqa: PLC0415
    from amskv_jax.plan.stats import LayerStats  # noqa: PLC0415
    from amskv_jax.policies.grammar import parse_policies  # noqa: PLC0415
    from amskv_jax.training.data import load_pictures  # noqa: PLC0415

    requests = parse_policies(policies)
    if compilation_cache:
        use_compilation_cache()
    classes = read_info(checkpoint).classes
    network = _network(features, classifier, classes, inception_weights)
    if network is not None:
        check_picture_count(num, network.dimension)
        if real is None:
            raise UsageError("the metrics compare with real pictures: give --real")
    drawing = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    model = open_checkpoint(checkpoint, dtype, mesh, aspect=aspect, size=size, **drawing)
    check_float8(model.dtype)
    conditions = conditions_of(model, prompts=prompts, text_features=text_features)
    model = replace(with_weights(model, checkpoint), default=conditions)
    evaluation = Evaluation(
        num=num,
        cfg=model.drawing.cfg,
        top_k=model.drawing.top_k,
        top_p=model.drawing.top_p,
        dtype=model.dtype,
        seed=seed,
        shard=shard,
    )
    with progress("reading") as update:
        judge = None
        if network is not None and real is not None:
            pictures = load_pictures(real, model.model.picture_size(model.schedule))
            network.check_classes(len(model.conditions(None)))
            update("measuring the real pictures", None)
            judge = Judge.of(network, pictures.pixels)
        records = run(
            evaluation,
            model,
            requests,
            judge,
            out,
            batch=batch_size,
            attention=attention.value,
            stats=LayerStats.load(stats, model.fingerprint) if stats else None,
            update=update,
        )
    path = out / "metrics.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    _print_records(records, network)
    print_line(f"wrote {path} and the pictures beside it")


def _network(
    features: Features, classifier: Path | None, classes: tuple[str, ...], weights: Path | None
) -> "FeatureNetwork | None":
    from amskv_jax.evaluation.classifier import load_classifier  # noqa: PLC0415
    from amskv_jax.evaluation.features import inception  # noqa: PLC0415

    if features is Features.NONE:
        return None
    if features is Features.INCEPTION:
        return inception(weights)
    return load_classifier(classifier or find_classifier(classes))


def _print_records(records: list[dict[str, Any]], network: "FeatureNetwork | None") -> None:
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.table import Column, Table  # noqa: PLC0415

    from amskv_jax.evaluation.measures import FIGURES  # noqa: PLC0415
    from amskv_jax.words import byte_size  # noqa: PLC0415

    frechet = "FID" if network and network.name == "inception" else "Frechet"
    columns = {"frechet_distance": (frechet, "{:.3f}"), **FIGURES}
    figures = (Column(title, justify="right") for title, _ in columns.values())
    table = Table("policy", "cache", "saved", *figures, box=SIMPLE_HEAD)
    for record in records:
        cells = (
            "" if record.get(name) is None else form.format(record[name])
            for name, (_, form) in columns.items()
        )
        size, saving = byte_size(record["cache_bytes"]), f"{record['saving']:.1%}"
        table.add_row(record["name"], size, saving, *cells)
    if network:
        print_line(f"Features of: {network.name}. Cache of one picture with guidance.")
    make_console().print(table)
