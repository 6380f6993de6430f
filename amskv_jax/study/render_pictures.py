"""The pictures of a study's report: quality against bytes, and a sheet of samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from amskv_jax.errors import AmskvError
from amskv_jax.study.summary import ArmResult, StudyResults

FITTED, SWEPT = "cd", "ef"
"""Sections which the plot shows: policies fitted to savings, and AMS-KV's options swept."""
SHOWN = "cd"
"""Sections whose pictures the sheet shows."""
MARKERS = "osD^vPX*"
TILE, GAP, LABEL_WIDTH, HEADER_HEIGHT, FONT_SIZE, SMALL_FONT_SIZE = 64, 4, 220, 18, 16, 12


def save_pareto_plot(results: StudyResults, path: Path) -> None:
    """Draw the Frechet distance over the cache's bytes, a colour per policy.

    Raises:
      AmskvError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
        from matplotlib.ticker import FormatStrFormatter  # noqa: PLC0415
    except ImportError as error:
        raise AmskvError("plots need matplotlib: pip install 'amskv-jax[plot]'") from error
    policies: dict[str, dict[int, ArmResult]] = {}
    for arm in results.all_arms(FITTED):
        policies.setdefault(arm.policy, {})[arm.cache_bytes] = arm
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes: Any = figure.subplots()
    full, kib = results.full.distance, 2**10
    axes.axhline(full.mean, color="black", linewidth=1, linestyle="--")
    axes.axhspan(full.mean - full.half, full.mean + full.half, color="black", alpha=0.1)
    axes.plot(results.full.cache_bytes / kib, full.mean, "k*", markersize=14, label="full cache")
    swept = results.all_arms(SWEPT)
    if swept:
        axes.plot(
            [arm.cache_bytes / kib for arm in swept],
            [arm.distance.mean for arm in swept],
            ".",
            color="gray",
            label="ams, options swept",
        )
    for marker, (policy, arms) in zip(MARKERS, sorted(policies.items()), strict=False):
        ordered = [arms[count] for count in sorted(arms)]
        spreads = [arm.distance for arm in ordered]
        axes.errorbar(
            [arm.cache_bytes / kib for arm in ordered],
            [spread.mean for spread in spreads],
            yerr=[spread.half for spread in spreads],
            marker=marker,
            linewidth=0.8,
            capsize=2,
            label=policy,
        )
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(FormatStrFormatter("%g"))
    axes.set_xlabel("cache of one picture with guidance, KiB")
    axes.set_ylabel("Frechet distance (lower is better)")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=130)


def save_sheet(results: StudyResults, samples: Mapping[str, np.ndarray], path: Path) -> int:
    """Draw a row of pictures for every policy, and return the number of rows.

    All rows are of the full cache's first seed; policies without it have no row.

    Args:
      results: of the study.
      samples: name of a cell, with "|" for "/", -> pictures uint8 [columns, H, W, 3]; "classes" ->
        names of the columns, if known.
      path: the picture; not written if there is no row.
    """
    rows: list[tuple[str, np.ndarray]] = []
    seed = results.full.records[0]["seed"]
    for arm in [results.full, *results.all_arms(SHOWN)]:
        record = next((record for record in arm.records if record["seed"] == seed), None)
        if record is None:
            continue
        name = record.get("same_as", record["name"])
        pixels = samples.get(str(name).replace("/", "|"))
        if pixels is not None:
            rows.append((f"{arm.label} ({arm.saving:.1%} saved)", pixels))
    if not rows:
        return 0
    columns = max(len(pixels) for _, pixels in rows)
    step = TILE + GAP
    size = (LABEL_WIDTH + columns * step, len(rows) * step + HEADER_HEIGHT + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    small = ImageFont.load_default(SMALL_FONT_SIZE)
    for column, name in enumerate(samples.get("classes", ())):
        centre = LABEL_WIDTH + column * step + TILE // 2
        draw.text((centre, HEADER_HEIGHT), str(name), "black", small, anchor="mb")
    for row, (label, pixels) in enumerate(rows):
        top = HEADER_HEIGHT + row * step + GAP
        draw.text((LABEL_WIDTH - 8, top + TILE // 2), label, "black", font, anchor="rm")
        for column, picture in enumerate(pixels):
            tile = Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL_WIDTH + column * step, top))
    sheet.save(path)
    return len(rows)
