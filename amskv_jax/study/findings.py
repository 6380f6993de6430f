"""What the results of a study's sections say, in sentences, whether the paper likes it or not."""

import numpy as np

from amskv_jax.study.summary import ArmResult, StudyResults

ALLOWED_LOSS = 0.01
"""Most by which the Frechet distance may grow for a saving to count as free."""
TARGET_SAVING = 0.787
"""The least saving that the verdict is about."""


def finding(results: StudyResults, section: str) -> list[str]:
    """Return sentences on a section; none where results are missing."""
    arms = results.arms.get(section, [])
    if not arms:
        return []
    return {
        "a": _dropped,
        "b": _allocation,
        "c": _savings,
        "d": _policies,
        "e": _best,
        "f": _theta,
        "g": _dtype,
    }[section](results, arms)


def _percent(share: float) -> str:
    return f"{share:+.1%}"


def _list(results: StudyResults, arms: list[ArmResult]) -> str:
    return ", ".join(f"{arm.label} ({_percent(results.excess(arm))})" for arm in arms)


def _by_harm(results: StudyResults, arms: list[ArmResult]) -> list[ArmResult]:
    return sorted(arms, key=results.excess)


def _dropped(results: StudyResults, arms: list[ArmResult]) -> list[str]:
    sentences = []
    counted = [arm for arm in arms if "tokens" not in arm.label]
    for count in sorted({arm.label.split()[1] for arm in counted}):
        group = _by_harm(results, [arm for arm in counted if arm.label.split()[1] == count])
        sentences.append(f"Dropping {count}, least harmful first: {_list(results, group)}.")
        if len(group) == 3:
            sentences.append(_on_intermediate(results, group))
    by_tokens = _by_harm(results, [arm for arm in arms if "tokens" in arm.label])
    if by_tokens:
        sentences.append(f"At about equal tokens: {_list(results, by_tokens)}.")
    return sentences


def _on_intermediate(results: StudyResults, group: list[ArmResult]) -> str:
    """Return how dropping intermediate scales compares with dropping condensed and local ones."""
    own = next(arm for arm in group if "intermediate" in arm.label)
    other = next(arm for arm in group if arm is not own)
    lead = results.excess(other) - results.excess(own)
    if abs(lead) <= (results.noise or 0.0):
        outcome = f"here they are missed no more and no less than the {other.label.split()[2]} ones"
    elif lead > 0:
        outcome = "here too they are the least missed"
    else:
        outcome = f"here they are missed more than the {other.label.split()[2]} ones"
    return f"The paper does without the intermediate scales; {outcome}."


def _allocation(results: StudyResults, arms: list[ArmResult]) -> list[str]:
    sentences = []
    pairs: dict[str, dict[str, ArmResult]] = {}
    for arm in arms:
        kind, *_, c_min, c_max = arm.label.rsplit(" ", 2)
        pairs.setdefault(f"C_min {c_min}, C_max {c_max}", {})[kind] = arm
    for pair, kinds in pairs.items():
        if len(kinds) == 3:
            ordered = _by_harm(results, list(kinds.values()))
            sentences.append(
                f"{pair}, best first: "
                + ", ".join(
                    f"{arm.label.rsplit(' ', 2)[0]} ({_percent(results.excess(arm))}, "
                    f"{arm.saving:.1%} saved)"
                    for arm in ordered
                )
                + "."
            )
    return sentences


def _savings(results: StudyResults, arms: list[ArmResult]) -> list[str]:
    return [
        f"{arm.label} (in fact {arm.saving:.1%}) changes the Frechet distance by "
        f"{_percent(results.excess(arm))}."
        for arm in arms
    ]


def verdict(results: StudyResults) -> str:
    """Return which policies save much for almost nothing; empty if too little is measured."""
    goal = f"at {TARGET_SAVING:.1%} saving or more"
    enough = [
        arm
        for arm in results.all_arms("cdef")
        if arm.saving >= TARGET_SAVING and not np.isnan(results.excess(arm))
    ]
    if not enough:
        return ""
    lines = []
    for title, group in (
        ("AMS-KV", [arm for arm in enough if arm.records[0]["policy"] == "ams"]),
        ("all policies", enough),
    ):
        free = [arm for arm in group if results.excess(arm) <= ALLOWED_LOSS]
        if free:
            best = max(free, key=lambda arm: arm.saving)
            lines.append(
                f"- Of {title} {goal}, `{best.name}` ({best.saving:.1%}) saves most while losing "
                f"at most {ALLOWED_LOSS:.0%} ({_percent(results.excess(best))})"
                f"{_accuracies(results, best)}."
            )
        elif group:
            best = _by_harm(results, group)[0]
            lines.append(
                f"- Of {title} {goal}, none stays within {ALLOWED_LOSS:.0%} of the full cache's "
                f"Frechet distance; the nearest is `{best.name}` ({best.saving:.1%} saved, "
                f"{_percent(results.excess(best))})."
            )
    return "\n".join(lines)


def _accuracies(results: StudyResults, arm: ArmResult) -> str:
    """Return the accuracy beside the full cache's; the distance alone does not see it fall."""
    own, full = arm.figure("class_accuracy"), results.full.figure("class_accuracy")
    return f"; accuracy {own.mean:.1%}, full cache {full.mean:.1%}" if own and full else ""


def closer_than_full(results: StudyResults) -> str:
    """Return what to think of cut caches whose pictures come closer to the real ones; may be empty.

    These are the arms whose Frechet distance is lower than the full cache's by more than the noise.
    """
    noise, full = results.noise, results.full
    recall, precision = full.figure("recall"), full.figure("precision")
    if noise is None or recall is None or precision is None:
        return ""
    closer = [
        arm
        for arm in results.all_arms("abcd")
        if results.excess(arm) < -noise and arm.figure("recall") is not None
    ]
    if not closer:
        return ""
    recalls = sorted(spread.mean for arm in closer if (spread := arm.figure("recall")))
    real = results.real
    compared = f" (real pictures: {real['precision']:.3f} and {real['recall']:.3f})" if real else ""
    return (
        f"More than noise closer to the real pictures than the full cache: "
        f"{_list(results, _by_harm(results, closer))}. The full cache has precision "
        f"{precision.mean:.3f} and recall {recall.mean:.3f}{compared}, these have recall "
        f"{recalls[0]:.3f} to {recalls[-1]:.3f}. Guidance trades variety for typical pictures; a "
        "lower distance with more recall says that a cut cache takes back some of that trade, not "
        "that forgetting draws better pictures."
    )


def _policies(results: StudyResults, arms: list[ArmResult]) -> list[str]:
    sentences = []
    for target in sorted({arm.label.rpartition(" ")[2] for arm in arms}):
        group = [arm for arm in arms if arm.label.endswith(f" {target}")]
        ordered = _by_harm(results, group)
        listed = ", ".join(
            f"{arm.label.rpartition(' ')[0]} ({_percent(results.excess(arm))})" for arm in ordered
        )
        sentences.append(f"At {target}, best first: {listed}.")
    return sentences


def _best(results: StudyResults, arms: list[ArmResult]) -> list[str]:
    free = [arm for arm in arms if results.excess(arm) <= ALLOWED_LOSS]
    if not free:
        best = _by_harm(results, arms)[0]
        return [
            f"No pair stays within {ALLOWED_LOSS:.0%} of the full cache; the nearest is "
            f"{best.label} ({best.saving:.1%} saved, {_percent(results.excess(best))})."
        ]
    best = max(free, key=lambda arm: arm.saving)
    return [
        f"{len(free)} of {len(arms)} pairs stay within {ALLOWED_LOSS:.0%} of the full cache; of "
        f"these {best.label} saves most ({best.saving:.1%}, {_percent(results.excess(best))})."
    ]


def _theta(results: StudyResults, arms: list[ArmResult]) -> list[str]:
    automatic = next((arm for arm in arms if arm.label.startswith("automatic")), None)
    swept = [arm for arm in arms if arm is not automatic]
    if automatic is None or not swept:
        return []
    better = [
        arm
        for arm in swept
        if arm.cache_bytes <= automatic.cache_bytes
        and results.excess(arm) < results.excess(automatic)
    ]
    own = f"{automatic.saving:.1%} saved, {_percent(results.excess(automatic))}"
    if better:
        return [f"The automatic theta ({own}) is beaten by {_list(results, better)}."]
    return [f"No theta of the sweep beats the automatic one ({own}) with as few or fewer bytes."]


def _dtype(results: StudyResults, arms: list[ArmResult]) -> list[str]:
    return [f"Against the full cache in the study's dtype: {_list(results, arms)}."]
