"""Figures of what calibration measured; they need matplotlib, the extra "plot"."""

from collections.abc import Callable, Iterable, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from amskv_jax.reports.analysis import Analysis
from amskv_jax.reports.plots import new_figure, scale_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, PANEL_INCHES, ROW_INCHES = 3, 3.8, 0.24
COLORS = "Blues"
MAX_ROW_NAMES = 40
MARK = "\N{BLACK RIGHT-POINTING TRIANGLE}"
DEMANDING, EFFICIENT = (0.80, 0.25, 0.10), (0.30, 0.30, 0.30)


def density_figure(analysis: Analysis, layers: Sequence[int]) -> "Figure":
    """Draw how much attention every scale gives to which, in the mean and in some layers."""
    stats = analysis.stats
    names = scale_names(stats.schedule)
    panels = {f"mean of all {stats.num_layers} layers": stats.density.mean(0)}
    panels |= {f"layer {layer}": stats.density[layer] for layer in layers}
    figure, axes = _panels(len(panels), PANEL_INCHES)
    future = np.triu(np.ones((len(names), len(names)), bool), 1)
    for axis, (title, density) in zip(axes, panels.items(), strict=True):
        image = _heatmap(axis, np.where(future, np.nan, density), names, names, vmax=1)
        texts = (f"{100 * value:.0f}" if value >= 0.005 else "" for value in density.flat)
        _write(axis, density, texts)
        axis.set_title(title, fontsize=10)
    figure.supxlabel("scale attended to (side of its map)")
    figure.supylabel("scale being drawn")
    figure.suptitle("Where the attention goes: percent of each query's attention")
    figure.colorbar(image, ax=axes, label="attention", format=_percent, shrink=0.8, aspect=40)
    return figure


def similarity_figure(analysis: Analysis, layers: Sequence[int]) -> "Figure":
    """Draw how alike successive scales are in every layer, and which layers are demanding."""
    stats, classes = analysis.stats, analysis.classes
    names, count = scale_names(stats.schedule)[1:], stats.num_layers
    similarity = stats.similarity[:, 1:]
    figure = new_figure(10, max(4.0, 1.8 + ROW_INCHES * count))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    image = _heatmap(left, similarity, names, _numbers(count), COLORS + "_r")
    figure.colorbar(image, ax=left, label="similarity (0: equal keys)", aspect=40)
    _mark_layers(left, analysis)
    left.set_xlabel("scale (side of its map); boxed: finds no room in C_min")
    left.set_title("Similarity of keys to those of the scale before", fontsize=10)
    for scale in classes.overflows:
        left.add_patch(_box(scale - 1.5, -0.5, 1, count))

    if not classes.overflows:
        right.set_axis_off()
        text = "All scales find room in C_min,\nso no layer is cache-demanding."
        right.text(0.5, 0.5, text, ha="center", va="center", transform=right.transAxes)
        return figure
    right.set_title(fill(classes.how, 42), fontsize=10)
    right.set_ylim(count - 0.5, -0.5)
    right.set_xlabel("lowest similarity at the boxed scales")
    right.grid(axis="x", color="0.9")
    right.locator_params(axis="x", nbins=5)
    is_demanding = np.isin(np.arange(count), classes.demanding)
    for name, color, chosen in (
        ("cache-demanding", DEMANDING, is_demanding),
        ("cache-efficient", EFFICIENT, ~is_demanding),
    ):
        own = np.flatnonzero(chosen)
        right.plot(classes.lowest[own], own, "o", color=color, markersize=5, label=name)
    _mark_layers(right, analysis)
    if np.isfinite(classes.theta):
        right.axvline(classes.theta, color="black", linestyle="--", linewidth=1, label="theta")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def kept_tokens_figure(analysis: Analysis, layers: Sequence[int]) -> "Figure":
    """Draw how many earlier tokens every layer reads at every step."""
    plan, schedule = analysis.plan, analysis.stats.schedule
    kept = np.array([row.kept_tokens for row in plan.rows], float)
    share = kept / np.maximum(1, schedule.offsets[:-1])
    steps = [
        f"{name}\n{earlier}"
        for name, earlier in zip(scale_names(schedule), schedule.offsets, strict=False)
    ]
    rows = _numbers(plan.num_layers)
    figure = new_figure(max(7.0, 2.5 + 0.6 * len(steps)), max(4.0, 2.0 + ROW_INCHES * len(rows)))
    axis = figure.subplots()
    image = _heatmap(axis, share, steps, rows, vmax=1)
    _write(axis, share, (f"{tokens:g}" for tokens in kept.flat))
    _mark_layers(axis, analysis)
    axis.set_xlabel("scale being drawn (side of its map), and tokens of all earlier scales")
    figure.suptitle(f"Earlier tokens that are read\n{fill(plan.note, 70)}", fontsize=10)
    figure.colorbar(image, ax=axis, label="share of earlier tokens", format=_percent, aspect=40)
    return figure


def heads_figure(analysis: Analysis, layers: Sequence[int]) -> "Figure":
    """Draw how much attention every head gives to every earlier scale."""
    mass = analysis.head_mass
    count, heads, _ = mass.shape
    names = scale_names(analysis.stats.schedule)[:-1]
    tallest = max(count, heads)
    figure, axes = _panels(1 + len(layers), max(PANEL_INCHES, 1 + 0.16 * tallest))
    limit = float(mass.max())
    _heatmap(axes[0], mass.mean(1), names, _numbers(count), vmax=limit)
    axes[0].set_ylabel("layer")
    axes[0].set_title("every layer, mean of its heads", fontsize=10)
    for axis, layer in zip(axes[1:], layers, strict=True):
        image = _heatmap(axis, mass[layer], names, _numbers(heads), vmax=limit)
        axis.set_ylabel("head")
        axis.set_title(f"layer {layer}", fontsize=10)
    figure.supxlabel("scale attended to (side of its map)")
    figure.suptitle("Attention of every head to earlier scales, averaged over the later scales")
    figure.colorbar(image, ax=axes, label="attention", format=_percent, shrink=0.8, aspect=40)
    return figure


FIGURES: dict[str, Callable[[Analysis, Sequence[int]], "Figure"]] = {
    "density": density_figure,
    "similarity": similarity_figure,
    "kept_tokens": kept_tokens_figure,
    "heads": heads_figure,
}
"""Name -> function of an analysis and the layers that get a panel of their own."""


def _panels(count: int, height: float) -> tuple["Figure", list[Any]]:
    """Return a figure with this number of axes in rows, each of ``height`` inches."""
    columns = 2 if count == 4 else min(count, COLUMNS)
    rows = -(-count // columns)
    figure = new_figure(columns * PANEL_INCHES + 1.2, rows * height + 0.9)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _heatmap(
    axis: Any,
    values: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    colors: str = COLORS,
    *,
    vmax: float | None = None,
) -> Any:
    """Draw a table as colours, rows downwards, from 0 to ``vmax`` if that is given."""
    image = axis.imshow(
        values, cmap=colors, vmin=None if vmax is None else 0, vmax=vmax, aspect="auto"
    )
    # Names such as 10x20 are wider than a cell, unless the figure is made for two lines of them.
    rotation = 90 if any("x" in name and "\n" not in name for name in columns) else 0
    axis.set_xticks(np.arange(len(columns)), columns, fontsize=8, rotation=rotation)
    every = -(-len(rows) // MAX_ROW_NAMES)
    axis.set_yticks(np.arange(0, len(rows), every), rows[::every], fontsize=8)
    axis.tick_params(length=0)
    return image


def _write(axis: Any, shares: np.ndarray, texts: Iterable[str]) -> None:
    """Write a text into every cell, in white where its colour is dark (share above one half)."""
    for ((row, column), share), text in zip(np.ndenumerate(shares), texts, strict=True):
        color = "white" if share > 0.5 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _mark_layers(axis: Any, analysis: Analysis) -> None:
    """Name the layers on the vertical axis, the demanding ones bold, coloured and with a mark."""
    count = analysis.stats.num_layers
    demanding = analysis.classes.demanding
    names = [f"{MARK} {x}" if x in demanding else str(x) for x in range(count)]
    axis.set_yticks(np.arange(count), names, fontsize=8)
    for layer, label in enumerate(axis.get_yticklabels()):
        if layer in demanding:
            label.set(color=DEMANDING, fontweight="bold")
    axis.set_ylabel(f"layer ({MARK}: cache-demanding)")


def _box(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    return Rectangle((x, y), width, height, fill=False, edgecolor="black", linewidth=1.2)


def _percent(value: float, position: int) -> str:
    return f"{100 * value:.0f} %"
