"""The report of a study: Markdown with tables, a plot and a sheet, from the results alone."""

import json
from collections.abc import Iterable
from pathlib import Path

from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.results import read_arrays
from amskv_jax.files import replacing
from amskv_jax.study.findings import closer_than_full, finding, verdict
from amskv_jax.study.render_pictures import save_pareto_plot, save_sheet
from amskv_jax.study.summary import ArmResult, Spread, StudyResults
from amskv_jax.words import byte_size

TITLES = {
    "a": (
        "Dropped scales (the AMS-KV paper's table 1)",
        "These scales are never cached, all others to the end. What is dropped cannot come back, "
        'so "local" means the latest scales before the last step. First equal numbers of scales, '
        "then about equal numbers of tokens.",
    ),
    "b": (
        "Uniform against similarity-aware capacities (table 2)",
        "S1 spreads the sum of the layers' capacities evenly, S2 gives C_max to the layers whose "
        "keys are least similar from scale to scale. Upside down is the control: C_max goes to as "
        "many of the most similar layers. As only whole scales are kept, equal capacities are not "
        "quite equal bytes.",
    ),
    "c": (
        "AMS-KV at four savings (table 3)",
        "Capacities and theta are solved for each saving from the calibration.",
    ),
    "d": (
        "All policies at equal savings (table 5)",
        "Every policy gets the largest budget whose allocated bytes meet the saving.",
    ),
    "e": ("C_min against C_max (figure 7)", "Automatic theta throughout."),
    "f": (
        "Automatic theta against a sweep",
        "Equal capacities; theta decides how many layers get the larger one.",
    ),
    "g": (
        "Type of numbers",
        "Weights, products and cache in the other type; bytes against the study's type.",
    ),
}
"""Section -> title and what it does, in the order of the report."""
HEADER = (
    "| policy | cache | saved | Frechet | to full | score | precision | recall | accuracy "
    "| PSNR | SSIM | seeds |"
)


def render_study(directory: Path | str, report: Path | str) -> None:
    """Write the report of a study, finished or not.

    Args:
      directory: of the study.
      report: the Markdown file; its pictures go into a folder beside it, named like it.

    Raises:
      AmskvError: if there are no results, or matplotlib is missing.
    """
    directory, report = Path(directory), Path(report)
    results = StudyResults.read(directory)
    try:
        settings = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AmskvError(f"{directory} lacks the study's settings.json: {error}") from error
    pictures = report.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    save_pareto_plot(results, pictures / "pareto.png")
    samples = read_arrays(directory / "samples.npz")
    shown = save_sheet(results, samples, pictures / "pictures.png")
    folder = pictures.name
    parts = [
        "# What every policy costs in quality",
        "Written by `amskv study report`; do not edit.",
        _conditions(results, settings),
        _summary(results),
        f"![Frechet distance against the cache's bytes]({folder}/pareto.png)",
    ]
    for section, (title, text) in TITLES.items():
        parts += [f"## {section}. {title}", text, *_section(results, settings, section)]
    if shown:
        parts += [
            "## Pictures",
            "One column per class, the same seed in every row.",
            f"![Pictures of every policy]({folder}/pictures.png)",
        ]
    with replacing(report) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _conditions(results: StudyResults, settings: dict) -> str:
    conditions = settings["conditions"]
    devices = sorted({r["device"] for r in results.records if "device" in r})
    network = settings["features"].split()[0]
    lines = [
        f"{conditions['num']:,} pictures per cell and seed, the classes in turn; guidance "
        f"{conditions['cfg']}, top-k {conditions['top_k']}, top-p {conditions['top_p']}, "
        f"{conditions['dtype']}; drawn on {', '.join(devices)}.",
        f"Model {settings['model']}; {settings['real_pictures']:,} real pictures; feature network "
        f"{settings['features']}.",
        f'"Frechet" is the {network} Frechet distance and "score" the {network} inception-style '
        f"score: by their construction like FID and IS, but on the features and classes of the "
        f"{network}, so they compare with nothing but each other. Precision and recall are those "
        "of arXiv 1904.06991, accuracy is the share of pictures in which the classifier sees the "
        "class that was asked for. PSNR (dB) and SSIM compare with the full cache's picture of the "
        "same seed: once one token differs a picture goes its own way, so low values do not mean "
        "bad pictures.",
        '"Cache" is for one picture with guidance, "saved" is against a cache of all scales in '
        f'{conditions["dtype"]}, "to full" the change of the Frechet distance against the full '
        "cache of the same seeds. Numbers are means over seeds, ± half the distance between the "
        "extremes.",
    ]
    return "\n\n".join(lines)


def _summary(results: StudyResults) -> str:
    parts = [HEADER, _rule(), _row(results, results.full)]
    text = ["\n".join(parts)]
    noise = results.noise
    if noise is not None:
        text.append(
            f"Noise: the Frechet distances of two seeds of one policy lie up to {noise:.1%} apart; "
            "smaller differences between policies mean nothing."
        )
    text += filter(None, [verdict(results), closer_than_full(results)])
    real = results.real
    if real:
        text.append(
            f"For comparison, {real['num']:,} held-out real pictures: Frechet "
            f"{real['frechet_distance']:.3f}, score {real['score']:.3f}, precision "
            f"{real['precision']:.3f}, recall {real['recall']:.3f}."
        )
    return "\n\n".join(text)


def _section(results: StudyResults, settings: dict, section: str) -> Iterable[str]:
    arms, impossible = results.arms.get(section, []), results.impossible(section)
    missing = results.missing(section)
    if not arms and not impossible and not missing:
        yield "Not run yet."
    if arms:
        yield "\n".join([HEADER, _rule(), *(_row(results, arm) for arm in arms)])
        if section == "e":
            yield _grid(results, arms)
        yield "\n".join(f"- {sentence}" for sentence in finding(results, section))
    if missing:
        yield "Not run yet: " + ", ".join(f"`{name}`" for name in missing) + "."
    for name, reason in impossible:
        yield f"`{name}` cannot be: {reason}."
    yield f"`{_command(results, settings, section)}`; one row alone by `--only {section}/...`."
    notes = [f"- `{arm.name}`: {arm.note}" for arm in arms]
    if notes:
        yield "<details><summary>Plans</summary>"
        yield "\n".join(notes)
        yield "</details>"


def _command(results: StudyResults, settings: dict, section: str) -> str:
    conditions = settings["conditions"]
    seeds = sorted({r["seed"] for r in results.records if r["section"] == section and "seed" in r})
    return (
        "amskv study run --checkpoint CHECKPOINT --real TRAINING_PICTURES --out STUDY "
        f"--sections {section} --seeds {','.join(map(str, seeds or [0, 1]))} "
        f"--num {conditions['num']} --cfg {conditions['cfg']} --top-k {conditions['top_k']} "
        f"--top-p {conditions['top_p']} --dtype {conditions['dtype']} "
        f"--calibration {conditions['calibration_pictures']}"
    )


def _rule() -> str:
    return "|---|" + "---:|" * (HEADER.count("|") - 2)


def _row(results: StudyResults, arm: ArmResult) -> str:
    excess = "" if arm.name == results.full.name else f"{results.excess(arm):+.1%}"
    cells = [
        arm.label,
        byte_size(arm.cache_bytes),
        f"{arm.saving:.1%}",
        _spread(arm.figure("frechet_distance"), "{:.3f}"),
        excess,
        _spread(arm.figure("score"), "{:.3f}"),
        _spread(arm.figure("precision"), "{:.3f}"),
        _spread(arm.figure("recall"), "{:.3f}"),
        _spread(arm.figure("class_accuracy"), "{:.2%}"),
        _spread(arm.figure("psnr"), "{:.2f}"),
        _spread(arm.figure("ssim"), "{:.3f}"),
        ", ".join(str(record["seed"]) for record in arm.records),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(spread: Spread | None, form: str) -> str:
    if spread is None:
        return ""
    mean = form.format(spread.mean)
    return mean if spread.count == 1 else f"{mean} ± {form.format(spread.half)}"


def _grid(results: StudyResults, arms: list[ArmResult]) -> str:
    """Return the change of the Frechet distance as a table of C_min and C_max."""
    values = {}
    for arm in arms:
        _, low, _, high = arm.label.split()
        values[int(low), int(high)] = f"{results.excess(arm):+.1%} ({arm.saving:.0%} saved)"
    columns = sorted({c_max for _, c_max in values})
    lines = [
        "| C_min \\ C_max | " + " | ".join(map(str, columns)) + " |",
        "|---:|" + "---:|" * len(columns),
    ]
    for c_min in sorted({c_min for c_min, _ in values}):
        cells = [values.get((c_min, c_max), "") for c_max in columns]
        lines.append(f"| {c_min} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
