"""The report of a study: Markdown with tables, a plot and a sheet, from the results alone."""

import json
from pathlib import Path

import numpy as np

from amskv_jax.errors import AmskvError
from amskv_jax.evaluation.results import Record, read_arrays, read_cells
from amskv_jax.files import read_json_lines, replacing
from amskv_jax.plan.stats import LayerStats
from amskv_jax.study.arms import FULL
from amskv_jax.study.cells import IMPORTANCE, study_arms
from amskv_jax.study.render_pictures import save_pareto_plot, save_sheet
from amskv_jax.study.scores import score_report
from amskv_jax.study.sections import SECTIONS
from amskv_jax.study.summary import ALLOWED_LOSS, ArmResult, StudyResults
from amskv_jax.study.tables import figures_table

TARGET_SAVING = 0.787
"""The least saving that the verdict is about."""


def render_study(directory: Path | str, report: Path | str) -> None:
    """Write the report of a study, finished or not.

    Args:
      directory: of the study.
      report: the Markdown file; its pictures go into a folder beside it, named like it.

    Raises:
      AmskvError: if there are no results, or matplotlib is missing.
    """
    directory, report = Path(directory), Path(report)
    results = read_results(directory)
    pictures = report.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    save_pareto_plot(results, pictures / "pareto.png")
    samples = read_arrays(directory / "samples.npz")
    shown = save_sheet(results, samples, pictures / "pictures.png")
    parts = [
        "# What every policy costs in quality",
        "Written by `amskv study report`; do not edit.",
        *score_report(directory, results.settings["model"]),
        *_conditions(results),
        *_summary(results),
        f"![Frechet distance against the cache's bytes]({pictures.name}/pareto.png)",
    ]
    for section in SECTIONS.values():
        parts += section.report(results)
    if shown:
        parts += [
            "## Pictures",
            "One column per class, the same seed in every row.",
            f"![Pictures of every policy]({pictures.name}/pictures.png)",
        ]
    with replacing(report) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def read_results(directory: Path) -> StudyResults:
    """Read a study's folder.

    Raises:
      AmskvError: if there is no result of the full cache, or no settings.
    """
    records = read_json_lines(directory / "results.jsonl")
    if not any(record["section"] == FULL for record in records):
        raise AmskvError(
            f"{directory} holds no result of the full cache: run the study there first"
        )
    try:
        settings = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AmskvError(f"{directory} lacks the study's settings.json: {error}") from error
    if any("seed" in record and "facts" not in record for record in records):
        records = _with_facts(records, directory, settings["conditions"]["dtype"])
    return StudyResults(tuple(records), tuple(read_cells(directory)), settings)


def _with_facts(records: list[Record], directory: Path, dtype: str) -> list[Record]:
    """Return records of before arms had facts with those of the arms that the study has now."""
    stats = LayerStats.load(directory / "stats.npz")
    arms = study_arms(IMPORTANCE, stats.shape, dtype)
    found = []
    for record in records:
        name = record["name"].rpartition("/")[0]
        if "seed" in record and name not in arms:
            raise AmskvError(
                f"{directory} holds {record['name']}, which no study of this version draws: remove "
                "its line from results.jsonl"
            )
        found.append({"facts": arms[name].facts} | record if name in arms else record)
    return found


def _conditions(results: StudyResults) -> list[str]:
    settings, conditions = results.settings, results.settings["conditions"]
    devices = sorted({r["device"] for r in results.records if "device" in r})
    network = settings["features"].split()[0]
    return [
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


def _summary(results: StudyResults) -> list[str]:
    parts = [figures_table(results, [results.full])]
    if results.noise is not None:
        parts.append(
            "Noise: the Frechet distances of two seeds of one policy lie up to "
            f"{results.noise:.1%} apart; smaller differences between policies mean nothing."
        )
    parts += filter(None, [verdict(results), closer_than_full(results)])
    if real := results.real:
        parts.append(
            f"For comparison, {real['num']:,} held-out real pictures: Frechet "
            f"{real['frechet_distance']:.3f}, score {real['score']:.3f}, precision "
            f"{real['precision']:.3f}, recall {real['recall']:.3f}."
        )
    return parts


def verdict(results: StudyResults) -> str:
    """Return which policies save much for almost nothing; empty if too little is measured."""
    goal = f"at {TARGET_SAVING:.1%} saving or more"
    enough = [
        arm
        for arm in results.all_arms("cdef")
        if arm.saving >= TARGET_SAVING and not np.isnan(results.excess(arm))
    ]
    lines = []
    for title, group in (
        ("AMS-KV", [arm for arm in enough if arm.policy == "ams"]),
        ("all policies", enough),
    ):
        free = [arm for arm in group if results.excess(arm) <= ALLOWED_LOSS]
        if free:
            best = max(free, key=lambda arm: arm.saving)
            lines.append(
                f"- Of {title} {goal}, `{best.name}` ({best.saving:.1%}) saves most while losing "
                f"at most {ALLOWED_LOSS:.0%} ({results.change(best)})"
                f"{_accuracies(best, results.full)}."
            )
        elif group:
            best = results.by_harm(group)[0]
            lines.append(
                f"- Of {title} {goal}, none stays within {ALLOWED_LOSS:.0%} of the full cache's "
                f"Frechet distance; the nearest is `{best.name}` ({best.saving:.1%} saved, "
                f"{results.change(best)})."
            )
    return "\n".join(lines)


def _accuracies(arm: ArmResult, full: ArmResult) -> str:
    """Return the accuracy beside the full cache's; the distance alone does not see it fall."""
    own, whole = arm.figure("class_accuracy"), full.figure("class_accuracy")
    return f"; accuracy {own.mean:.1%}, full cache {whole.mean:.1%}" if own and whole else ""


def closer_than_full(results: StudyResults) -> str:
    """Return what to think of cut caches whose pictures come closer to the real ones; may be empty.

    These are the arms whose Frechet distance is lower than the full cache's by more than the noise.
    """
    noise, full = results.noise, results.full
    recall, precision = full.figure("recall"), full.figure("precision")
    if noise is None or recall is None or precision is None:
        return ""
    closer = [arm for arm in results.all_arms("abcd") if results.excess(arm) < -noise]
    recalls = sorted(spread.mean for arm in closer if (spread := arm.figure("recall")))
    if not recalls:
        return ""
    real = results.real
    compared = f" (real pictures: {real['precision']:.3f} and {real['recall']:.3f})" if real else ""
    return (
        f"More than noise closer to the real pictures than the full cache: "
        f"{results.listed(results.by_harm(closer))}. The full cache has precision "
        f"{precision.mean:.3f} and recall {recall.mean:.3f}{compared}, these have recall "
        f"{recalls[0]:.3f} to {recalls[-1]:.3f}. Guidance trades variety for typical pictures; a "
        "lower distance with more recall says that a cut cache takes back some of that trade, not "
        "that forgetting draws better pictures."
    )
