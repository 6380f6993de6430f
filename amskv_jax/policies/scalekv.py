"""ScaleKV: large budgets for drafters, small ones for refiners, tokens chosen by a window."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.runtime_rows import SelectingRow
from amskv_jax.plan.selectors import Mode, WindowScores
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies.base import Policy, default_budget
from amskv_jax.schedule import ScaleSchedule

LARGEST_WINDOW = 16
"""Observing tokens of the paper and its code."""


@dataclass(frozen=True)
class ScaleKV(Policy):
    """Keeps, per head, the tokens that a window of the current map attends to most.

    Scale-aware KV cache compression, arXiv 2505.19602. At every scale whose full cache would exceed
    the budget, a layer is a drafter or a refiner. Refiners get a share of the budget that shrinks
    linearly from scale to scale (equation 4), drafters what the refiners leave, so that the mean
    over the layers is the budget at every scale. As buffers are static, a layer allocates the most
    that it keeps at any scale: the mean of these, named in the plan's note, exceeds the budget.

    Drafters are the layer-scale pairs with the lowest Attention Selectivity Index (equation 2, see
    ``LayerStats.selectivity``), standardised within each scale (equation 3). The paper leaves their
    number and ``top`` open; the published budgets have 6 % (Infinity 2B) and 8 % (8B) drafters.

    Attributes:
      budget: mean tokens per layer; default: the mean of the default AMS-KV plan.
      window: observing tokens, a square number, which always stay; default: 16, or less where a map
        or what may be kept is smaller.
      kernel: width of the max-pooling of the scores.
      mode: "paper" or "reference", see ``selectors.WindowScores``. In both, generation scores with
        the queries which the model attends with. The published code projects its input once more
        for queries without bias, norm and rotation; that product is not repeated here.
      drafters: share of the layer-scale pairs that are drafters; at least one is. Without a
        calibration the first layers are.
      refiners_first: share of the budget that a refiner gets at the first compressed scale.
      refiners_last: the same at the last scale. The defaults are the paper's 600 and 320 of 650.
      top: earlier tokens in the second factor of the Attention Selectivity Index (its K').
      budget_file: published budgets in the format of the paper's code, instead of ``budget`` and
        the calibration; see ``published_counts``.

    Raises:
      UsageError: if an option is out of range.
    """

    budget: int | None = None
    window: int | None = None
    kernel: int = 5
    mode: Mode = "paper"
    drafters: float = 0.0625
    refiners_first: float = 0.92
    refiners_last: float = 0.49
    top: int = 16
    budget_file: str | None = None

    def __post_init__(self) -> None:
        window = LARGEST_WINDOW if self.window is None else self.window
        WindowScores(window, self.kernel, self.mode)
        if self.budget is not None and self.budget < 0:
            raise UsageError(f"the budget must be 0 or more tokens, not {self.budget}")
        if self.budget is not None and self.budget_file is not None:
            raise UsageError("give either a budget or a budget file, not both")
        if not 0 < self.drafters <= 1:
            raise UsageError(
                f"the share of drafters must be above 0 and at most 1, not {self.drafters}"
            )
        if not 0 <= self.refiners_last <= self.refiners_first <= 1:
            raise UsageError(
                "the refiners' shares must shrink between 1 and 0, "
                f"not go from {self.refiners_first} to {self.refiners_last}"
            )

    @property
    def uses_stats(self) -> bool:
        """See ``Policy.uses_stats``."""
        return self.budget_file is None

    def with_budget(self, tokens: int, shape: CacheShape) -> Policy:
        """Return this policy with a budget; see ``Budgeted.with_budget``."""
        return replace(self, budget=tokens)

    def plan(self, shape: CacheShape, stats: LayerStats | None = None) -> RetentionPlan:
        """Return the plan; see ``Policy.plan``."""
        schedule = shape.schedule
        if self.budget_file is not None:
            counts = published_counts(self.budget_file, schedule, shape.num_layers)
            how = f"budgets of {Path(self.budget_file).name}"
        else:
            budget = default_budget(shape) if self.budget is None else self.budget
            drafters, how = self._drafters(shape, budget, stats)
            shares = self.refiners_first, self.refiners_last
            counts = allocate(schedule, budget, drafters, shares)
            how = f"mean budget {budget} tokens; {how}"
        window = fitting_window(schedule, counts) if self.window is None else self.window
        selector = WindowScores(window, self.kernel, self.mode)
        rows = tuple(SelectingRow(tuple(map(int, layer)), selector) for layer in counts)
        note = (
            f"ScaleKV ({self.mode}): {how}; window {window}; "
            f"{counts.max(1).mean():.0f} tokens a layer allocated"
        )
        return RetentionPlan(schedule, rows, note)

    def _drafters(
        self, shape: CacheShape, budget: int, stats: LayerStats | None
    ) -> tuple[np.ndarray, str]:
        """Return which layers are drafters at which scales, [layers, S], and how it is known."""
        drafters = np.zeros((shape.num_layers, shape.schedule.num_scales), bool)
        if stats is None:
            number = max(1, round(self.drafters * shape.num_layers))
            drafters[:number] = True
            return drafters, f"drafters: the first {number}, by default and not by measurement"
        stats.check(shape)
        scales = _compressed(shape.schedule, budget)
        index = stats.selectivity(self.top)[:, scales]
        standardised = (index - index.mean(0)) / (index.std(0) + 1e-12)
        number = max(1, round(self.drafters * index.size)) if index.size else 0
        lowest = np.argsort(standardised, axis=None, kind="stable")[:number]
        layers, columns = np.unravel_index(lowest, index.shape)
        drafters[layers, np.array(scales, int)[columns]] = True
        return drafters, f"drafters: {number} of {index.size} layer-scale pairs, by selectivity"


def allocate(
    schedule: ScaleSchedule, budget: int, drafters: np.ndarray, shares: tuple[float, float]
) -> np.ndarray:
    """Divide the budget among drafters and refiners at every scale.

    Nobody gets more than is at hand; what drafters cannot take goes back to the refiners.

    Args:
      schedule: the scales.
      budget: mean tokens per layer.
      drafters: which layers are drafters at which scales, [layers, S] bool.
      shares: of the budget for a refiner at the first and at the last compressed scale.

    Returns:
      Tokens that each layer reads from the cache at every step, [layers, S]. Each column's mean is
      the budget, or less than one token below, once the full cache exceeds it.
    """
    counts = np.zeros(drafters.shape, int)
    scales = _compressed(schedule, budget)
    total = budget * len(counts)
    for step in range(1, schedule.num_scales):
        room = counts[:, step - 1] + schedule.tokens[step - 1]
        if step not in scales:
            counts[:, step] = room
            continue
        done = scales.index(step) / max(1, len(scales) - 1)
        refined = round(budget * (shares[0] + (shares[1] - shares[0]) * done))
        drafter = drafters[:, step]
        left = total - np.minimum(room, refined)[~drafter].sum()
        drafted = np.minimum(room, _level(left, room[drafter]))
        left = total - drafted[drafter].sum()
        refined = np.minimum(room, _level(left, room[~drafter]))
        counts[:, step] = np.where(drafter, drafted, refined)
    return counts


def published_counts(path: str, schedule: ScaleSchedule, num_layers: int) -> np.ndarray:
    """Read a budget file of the paper's code: what each layer finds at every step, [layers, S].

    "Scale n" (counted from 1) holds a flag "Block l" for every layer l and the tokens "Max" for the
    layers flagged 1, "Min" for the others. Scales that are not named keep all that is at hand.

    Raises:
      AmskvError: if the file is no such file, or is for another model.
    """
    budgets = _read_budgets(path)
    counts = np.zeros((num_layers, schedule.num_scales), int)
    for number, tokens in budgets.items():
        if len(tokens) != num_layers:
            raise AmskvError(
                f"{path}: scale {number} has budgets for {len(tokens)} layers, "
                f"the model has {num_layers}"
            )
        if not 1 <= number <= schedule.num_scales:
            raise AmskvError(
                f"{path} has budgets for scale {number}, "
                f"but the schedule has the scales 1-{schedule.num_scales}"
            )
    for step in range(1, schedule.num_scales):
        at_hand = counts[:, step - 1] + schedule.tokens[step - 1]
        counts[:, step] = np.minimum(at_hand, budgets.get(step + 1, at_hand))
    return counts


def _read_budgets(path: str) -> dict[int, list[int]]:
    """Return tokens per layer by the number of the scale, counted from 1."""
    try:
        data = json.loads(Path(path).read_text())
        return {
            int(name.removeprefix("Scale ")): [
                int(entry["Max" if entry[f"Block {layer}"] else "Min"])
                for layer in range(sum(key.startswith("Block ") for key in entry))
            ]
            for name, entry in data.items()
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise AmskvError(
            f'cannot read the budget file {path}: expected {{"Scale 9": {{"Block 0": 1, ..., '
            f'"Max": 920, "Min": 632}}, ...}}, found {error!r}'
        ) from error


def fitting_window(schedule: ScaleSchedule, counts: np.ndarray) -> int:
    """Return the largest square window, up to 16, that fits wherever tokens are dropped."""
    sides = [math.isqrt(LARGEST_WINDOW)]
    for step in range(1, schedule.num_scales):
        at_hand = counts[:, step - 1] + schedule.tokens[step - 1]
        chosen = counts[(counts[:, step] > 0) & (counts[:, step] < at_hand), step]
        if chosen.size:
            sides += [*schedule.grids[step - 1], math.isqrt(chosen.min())]
    return min(sides) ** 2


def _compressed(schedule: ScaleSchedule, budget: int) -> list[int]:
    """Return the steps whose full cache exceeds the budget."""
    return [step for step in range(schedule.num_scales) if schedule.offsets[step] > budget]


def _level(total: int, room: Sequence[int] | np.ndarray) -> int:
    """Return the most that all can get alike, each at most its room, with ``total`` to give."""
    for served, most in enumerate(sorted(room)):
        share = total // (len(room) - served)
        if most > share:
            return int(share)
        total -= most
    return int(max(room, default=0))
