"""Markdown tables of a study's results."""

from collections.abc import Iterable, Sequence

from amskv_jax.evaluation.measures import FIGURES
from amskv_jax.study.summary import ArmResult, StudyResults
from amskv_jax.words import byte_size


def figures_table(results: StudyResults, arms: Iterable[ArmResult]) -> str:
    """Return all figures, a row per arm."""
    titles = [title for title, _ in FIGURES.values()]
    rows = []
    for arm in arms:
        figures = [_spread(arm, name, form) for name, (_, form) in FIGURES.items()]
        rows.append(
            [
                arm.label,
                byte_size(arm.cache_bytes),
                f"{arm.saving:.1%}",
                _spread(arm, "frechet_distance", "{:.3f}"),
                "" if arm is results.full else results.change(arm),
                *figures,
                ", ".join(str(record["seed"]) for record in arm.records),
            ]
        )
    header = ["policy", "cache", "saved", "Frechet", "to full", *titles, "seeds"]
    return markdown_table(header, "---", rows)


def grid_table(results: StudyResults, arms: Iterable[ArmResult]) -> str:
    """Return the change of the Frechet distance as a table of C_min and C_max."""
    cells = {
        (arm.facts["c_min"], arm.facts["c_max"]): f"{results.change(arm)} ({arm.saving:.0%} saved)"
        for arm in arms
    }
    rows, columns = (sorted(set(numbers)) for numbers in zip(*cells, strict=True))
    body = [[str(low), *(cells.get((low, high), "") for high in columns)] for low in rows]
    return markdown_table(["C_min \\ C_max", *map(str, columns)], "---:", body)


def markdown_table(header: Sequence[str], first: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns are set to the right, but the first as given."""
    rule = f"|{first}|" + "---:|" * (len(header) - 1)
    head, *body = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([head, rule, *body])


def _spread(arm: ArmResult, name: str, form: str) -> str:
    spread = arm.figure(name)
    if spread is None:
        return ""
    mean = form.format(spread.mean)
    return mean if spread.count == 1 else f"{mean} ± {form.format(spread.half)}"
