"""Contact sheets: many small pictures with their names on one large one."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_SIDE = 128
"""Smaller pictures are enlarged by a whole factor, pixel by pixel."""
MARGIN, CAPTION, FONT_SIZE = 8, 24, 16


def contact_sheet(pictures: np.ndarray, captions: Sequence[str], group: int = 1) -> Image.Image:
    """Return pictures in rows, each above its caption; the sheet is about square.

    Args:
      pictures: [B, height, width, 3] uint8.
      captions: B texts.
      group: this number of successive pictures always share a row.
    """
    count, height, width, _ = pictures.shape
    columns = min(count, group * math.ceil(math.sqrt(count) / group))
    factor = max(1, -(-SMALLEST_SIDE // min(height, width)))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(FONT_SIZE)
    step_x, step_y = width + MARGIN, height + CAPTION + MARGIN
    size = (columns * step_x + MARGIN, -(-count // columns) * step_y + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = MARGIN + index % columns * step_x
        y = MARGIN + index // columns * step_y
        tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        draw.text((x + width // 2, y + height + 4), caption, "black", font, anchor="mt")
    return sheet


def side_by_side(sheets: Mapping[str, Image.Image]) -> Image.Image:
    """Return sheets beside each other, each below its heading."""
    font = ImageFont.load_default(FONT_SIZE)
    top = CAPTION + MARGIN
    width = sum(sheet.width for sheet in sheets.values()) + 2 * MARGIN * (len(sheets) - 1)
    height = max(sheet.height for sheet in sheets.values()) + top
    whole = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(whole)
    x = 0
    for heading, sheet in sheets.items():
        draw.text((x + sheet.width // 2, MARGIN), heading, "black", font, anchor="mt")
        whole.paste(sheet, (x, top))
        x += sheet.width + 2 * MARGIN
    return whole
