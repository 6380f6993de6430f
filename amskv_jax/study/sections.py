"""What every section of the study asks, which arms answer it, and what their results say."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import REGISTRY
from amskv_jax.policies.ams import AMSKV
from amskv_jax.policies.base import Budgeted, Policy
from amskv_jax.policies.budgets import with_saving
from amskv_jax.policies.full import Full
from amskv_jax.policies.heads import Heads
from amskv_jax.study.arms import FULL, Arm, Choose, DropScales, capacities
from amskv_jax.study.section import Arms, Section
from amskv_jax.study.summary import ALLOWED_LOSS, StudyResults
from amskv_jax.study.tables import grid_table

LATER = {"heatkv"}
"""Policies that came after the study whose results are kept: the next one takes them."""
BUDGETED: dict[str, Policy] = {
    name: policy()
    for name, policy in REGISTRY.items()
    if issubclass(policy, Budgeted) and name not in LATER
} | {"heads": Heads(patterns=4)}
"""Policies that are compared at equal savings; `heads` with the sets it had in these results."""


class Dropped(Section):
    """Facts: "kind" and "count" of the scales that are dropped, or their "tokens"."""

    letter = "a"
    title = "Dropped scales (the AMS-KV paper's table 1)"
    text = (
        "These scales are never cached, all others to the end. What is dropped cannot come back, "
        'so "local" means the latest scales before the last step. First equal numbers of scales, '
        "then about equal numbers of tokens."
    )

    def _arms(self, shape: CacheShape, dtype: str) -> Iterator[Arm]:
        schedule, last = shape.schedule, shape.schedule.num_scales - 1
        third = last // 3
        for count in sorted({1, third} - {0}):
            drops = {
                "condensed": range(count),
                "intermediate": range(last - third - count, last - third),
                "local": range(last - count, last),
            }
            for kind, scales in drops.items():
                policy = DropScales(tuple(scales))
                label = f"drop {count} {kind}"
                yield self.arm(dtype, label, "explicit", policy, kind=kind, count=count)
        # Sets of about as many tokens as the coarse two thirds of the scales.
        coarse, mixed = tuple(range(last - third)), tuple(range(2, last - 2, 2))
        tokens = sum(schedule.tokens[scale] for scale in coarse)
        nearest = min(range(last), key=lambda scale: abs(schedule.tokens[scale] - tokens))
        for dropped in filter(None, (coarse, mixed, (nearest,))):
            tokens = sum(schedule.tokens[scale] for scale in dropped)
            label = f"drop {tokens} tokens of scales {' '.join(map(str, dropped))}"
            yield self.arm(dtype, label, "explicit", DropScales(dropped), tokens=tokens)

    def _finding(self, results: StudyResults, arms: Arms) -> list[str]:
        sentences = []
        for count in sorted({arm.facts["count"] for arm in arms if "count" in arm.facts}):
            group = results.by_harm(arm for arm in arms if arm.facts.get("count") == count)
            sentences.append(f"Dropping {count}, least harmful first: {results.listed(group)}.")
            if len(group) == 3:
                sentences.append(self._on_intermediate(results, group))
        by_tokens = results.by_harm(arm for arm in arms if "tokens" in arm.facts)
        if by_tokens:
            sentences.append(f"At about equal tokens: {results.listed(by_tokens)}.")
        return sentences

    def _on_intermediate(self, results: StudyResults, group: Arms) -> str:
        """Compare dropping intermediate scales with the less harmful one of the other kinds."""
        own = next(arm for arm in group if arm.facts["kind"] == "intermediate")
        other = next(arm for arm in group if arm is not own)
        lead, kind = results.excess(other) - results.excess(own), other.facts["kind"]
        if abs(lead) <= (results.noise or 0.0):
            outcome = f"here they are missed no more and no less than the {kind} ones"
        elif lead > 0:
            outcome = "here too they are the least missed"
        else:
            outcome = f"here they are missed more than the {kind} ones"
        return f"The paper does without the intermediate scales; {outcome}."


class Allocation(Section):
    """Facts: "kind" of allocation, "c_min" and "c_max"."""

    letter = "b"
    title = "Uniform against similarity-aware capacities (table 2)"
    text = (
        "S1 spreads the sum of the layers' capacities evenly, S2 gives C_max to the layers whose "
        "keys are least similar from scale to scale. Upside down is the control: C_max goes to as "
        "many of the most similar layers. As only whole scales are kept, equal capacities are not "
        "quite equal bytes."
    )

    def _arms(self, shape: CacheShape, dtype: str) -> Iterator[Arm]:
        ladder = capacities(shape.schedule)
        for low, high in ((2, 4), (1, 3), (1, 5)):
            c_min, c_max = ladder[min(low, len(ladder) - 1)], ladder[min(high, len(ladder) - 1)]
            similar = AMSKV(c_min=c_min, c_max=c_max)
            ways: dict[str, Policy | Choose] = {
                "S1 uniform": replace(similar, allocation="uniform"),
                "S2 by similarity": similar,
                "S2 upside down": partial(_upside_down, similar),
            }
            for kind, choose in ways.items():
                label = f"{kind} {c_min} {c_max}"
                yield self.arm(dtype, label, "ams", choose, kind=kind, c_min=c_min, c_max=c_max)

    def _finding(self, results: StudyResults, arms: Arms) -> list[str]:
        sentences = []
        for c_min, c_max in dict.fromkeys((a.facts["c_min"], a.facts["c_max"]) for a in arms):
            group = results.by_harm(
                a for a in arms if (a.facts["c_min"], a.facts["c_max"]) == (c_min, c_max)
            )
            if len(group) == 3:
                listed = ", ".join(
                    f"{arm.facts['kind']} ({results.change(arm)}, {arm.saving:.1%} saved)"
                    for arm in group
                )
                sentences.append(f"C_min {c_min}, C_max {c_max}, best first: {listed}.")
        return sentences


def _upside_down(policy: AMSKV, shape: CacheShape, stats: LayerStats) -> Policy:
    """Return the policy with as many demanding layers, but those whose keys are most similar."""
    classes = policy.classify(stats)
    ordered = np.argsort(-classes.lowest, kind="stable")[: len(classes.demanding)]
    return replace(policy, demanding_layers=tuple(sorted(ordered.tolist())))


class Savings(Section):
    """AMS-KV at the paper's savings; facts: the "target" of saving."""

    letter = "c"
    title = "AMS-KV at four savings (table 3)"
    text = "Capacities and theta are solved for each saving from the calibration."

    def _arms(self, shape: CacheShape, dtype: str) -> Iterator[Arm]:
        for saving in (0.70, 0.787, 0.848, 0.90):
            policy = AMSKV(saving=saving)
            yield self.arm(dtype, f"ams {saving:.1%}", "ams", policy, target=saving)

    def _finding(self, results: StudyResults, arms: Arms) -> list[str]:
        return [
            f"{arm.label} (in fact {arm.saving:.1%}) changes the Frechet distance by "
            f"{results.change(arm)}."
            for arm in arms
        ]


class Policies(Section):
    """Facts: the "target" of saving."""

    letter = "d"
    title = "All policies at equal savings (table 5)"
    text = "Every policy gets the largest budget whose allocated bytes meet the saving."

    def _arms(self, shape: CacheShape, dtype: str) -> Iterator[Arm]:
        for saving in (0.50, 0.75, 0.85):
            ways: dict[str, Policy | Choose] = {"ams": AMSKV(saving=saving)}
            ways |= {
                name: partial(with_saving, policy, saving) for name, policy in BUDGETED.items()
            }
            for name, choose in ways.items():
                yield self.arm(dtype, f"{name} {saving:.0%}", name, choose, target=saving)

    def _finding(self, results: StudyResults, arms: Arms) -> list[str]:
        sentences = []
        for target in sorted({arm.facts["target"] for arm in arms}):
            group = results.by_harm(arm for arm in arms if arm.facts["target"] == target)
            listed = ", ".join(f"{arm.policy} ({results.change(arm)})" for arm in group)
            sentences.append(f"At {target:.0%}, best first: {listed}.")
        return sentences


class Capacities(Section):
    """Facts: "c_min" and "c_max"."""

    letter = "e"
    title = "C_min against C_max (figure 7)"
    text = "Automatic theta throughout."

    def _arms(self, shape: CacheShape, dtype: str) -> Iterator[Arm]:
        ladder = capacities(shape.schedule)
        for c_min in ladder[:4]:
            for c_max in filter(lambda c_max: c_max >= c_min, ladder[2:6]):
                label, policy = f"C_min {c_min} C_max {c_max}", AMSKV(c_min=c_min, c_max=c_max)
                yield self.arm(dtype, label, "ams", policy, c_min=c_min, c_max=c_max)

    def _tables(self, results: StudyResults, arms: Arms) -> Iterator[str]:
        yield from super()._tables(results, arms)
        yield grid_table(results, arms)

    def _finding(self, results: StudyResults, arms: Arms) -> list[str]:
        free = [arm for arm in arms if results.excess(arm) <= ALLOWED_LOSS]
        if not free:
            best = results.by_harm(arms)[0]
            return [
                f"No pair stays within {ALLOWED_LOSS:.0%} of the full cache; the nearest is "
                f"{best.label} ({best.saving:.1%} saved, {results.change(best)})."
            ]
        best = max(free, key=lambda arm: arm.saving)
        return [
            f"{len(free)} of {len(arms)} pairs stay within {ALLOWED_LOSS:.0%} of the full cache; "
            f"of these {best.label} saves most ({best.saving:.1%}, {results.change(best)})."
        ]


class Theta(Section):
    """Facts: the "count" of demanding layers, where theta is set to make so many."""

    letter = "f"
    title = "Automatic theta against a sweep"
    text = "Equal capacities; theta decides how many layers get the larger one."

    def _arms(self, shape: CacheShape, dtype: str) -> Iterator[Arm]:
        ladder = capacities(shape.schedule)
        base = AMSKV(c_min=ladder[min(2, len(ladder) - 1)], c_max=ladder[-2:][0])
        yield self.arm(dtype, "automatic theta", "ams", base)
        for count in sorted({round(share * shape.num_layers / 6) for share in range(7)}):
            choose = partial(_demanding, base, count)
            yield self.arm(dtype, f"{count} demanding layers", "ams", choose, count=count)

    def _finding(self, results: StudyResults, arms: Arms) -> list[str]:
        automatic = next((arm for arm in arms if "count" not in arm.facts), None)
        swept = [arm for arm in arms if arm is not automatic]
        if automatic is None or not swept:
            return []
        better = [
            arm
            for arm in swept
            if arm.cache_bytes <= automatic.cache_bytes
            and results.excess(arm) < results.excess(automatic)
        ]
        own = f"{automatic.saving:.1%} saved, {results.change(automatic)}"
        if better:
            return [f"The automatic theta ({own}) is beaten by {results.listed(better)}."]
        return [
            f"No theta of the sweep beats the automatic one ({own}) with as few or fewer bytes."
        ]


def _demanding(policy: AMSKV, count: int, shape: CacheShape, stats: LayerStats) -> Policy:
    """Return the policy with a theta that makes so many layers demanding."""
    lowest = np.sort(policy.classify(stats).lowest)
    thetas = [lowest[0] - 1, *(lowest[:-1] + lowest[1:]) / 2, lowest[-1] + 1]
    return replace(policy, theta=float(thetas[count]))


class Numbers(Section):
    """The full cache and AMS-KV in the other dtype."""

    letter = "g"
    title = "Type of numbers"
    text = "Weights, products and cache in the other type; bytes against the study's type."

    def _arms(self, shape: CacheShape, dtype: str) -> Iterator[Arm]:
        other = "float32" if dtype == "bfloat16" else "bfloat16"
        yield self.arm(other, f"full {other}", FULL, Full())
        yield self.arm(other, f"ams 78.7% {other}", "ams", AMSKV(saving=0.787))

    def _finding(self, results: StudyResults, arms: Arms) -> list[str]:
        return [f"Against the full cache in the study's dtype: {results.listed(arms)}."]


_ALL = Dropped(), Allocation(), Savings(), Policies(), Capacities(), Theta(), Numbers()
SECTIONS: dict[str, Section] = {section.letter: section for section in _ALL}
"""Letter -> section, in the order of the report."""
