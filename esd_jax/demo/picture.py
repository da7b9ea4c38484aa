"""The pictures: before and after an erasure in captioned groups of prompts, and objects by styles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from esd_jax.picture_grid import cut, wrapped

CELL, GAP, GROUP_GAP, MARGIN, HEADER, CAPTION = 128, 6, 26, 72, 34, 40
INK, FAINT = (30, 30, 35), (120, 120, 128)


@dataclass(frozen=True, eq=False)
class Column:
    """One prompt, and its image [height, width, 3] from each model at the same seed."""

    caption: str
    before: UInt8[np.ndarray, "height width 3"]
    after: UInt8[np.ndarray, "height width 3"]


def before_after(groups: Sequence[tuple[str, Sequence[Column]]]) -> Image.Image:
    """Draws groups of columns side by side, each under its title, which is cut where the next group begins."""
    count = sum(len(columns) for _, columns in groups)
    width = MARGIN + count * (CELL + GAP) + (len(groups) - 1) * GROUP_GAP + GAP
    canvas = Image.new("RGB", (width, HEADER + 2 * (CELL + GAP) + CAPTION), "white")
    draw = ImageDraw.Draw(canvas)
    title, text = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    for row, name in enumerate(("before", "after")):
        draw.text((10, HEADER + row * (CELL + GAP) + CELL // 2), name, INK, text, anchor="lm")
    x = MARGIN
    for name, columns in groups:
        words = cut(name, title, len(columns) * (CELL + GAP) + GROUP_GAP - 2 * GAP)
        draw.text((x, HEADER // 2), words, INK, title, anchor="lm")
        for column in columns:
            for row, image in enumerate((column.before, column.after)):
                cell = Image.fromarray(image).resize((CELL, CELL), Image.Resampling.LANCZOS)
                canvas.paste(cell, (x, HEADER + row * (CELL + GAP)))
                draw.rectangle(
                    (x, HEADER + row * (CELL + GAP), x + CELL - 1, HEADER + row * (CELL + GAP) + CELL - 1),
                    outline=(225, 225, 230),
                )
            for line, words in enumerate(wrapped(column.caption, text, CELL)):
                y = HEADER + 2 * (CELL + GAP) + 8 + 15 * line
                draw.text((x + CELL // 2, y), words, FAINT, text, anchor="mm")
            x += CELL + GAP
        x += GROUP_GAP
    return canvas


def grid(
    images: UInt8[np.ndarray, "rows columns height width 3"], rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """Draws images in rows and columns, each with its title.

    Raises ValueError if there are not as many titles as rows and columns.
    """
    if images.shape[:2] != (len(rows), len(columns)):
        raise ValueError(f"{len(rows)} x {len(columns)} titles for {images.shape[0]} x {images.shape[1]} images")
    text = ImageFont.load_default(size=13)
    margin = GAP + 8 + math.ceil(max(text.getlength(row) for row in rows))
    pitch = CELL // 2 + GAP
    canvas = Image.new("RGB", (margin + len(columns) * pitch, HEADER + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(canvas)
    for j, title in enumerate(columns):
        draw.text((margin + j * pitch + CELL // 4, HEADER // 2), title, INK, text, anchor="mm")
    for i, title in enumerate(rows):
        y = HEADER + i * pitch
        draw.text((margin - 8, y + CELL // 4), title, INK, text, anchor="rm")
        for j in range(len(columns)):
            cell = Image.fromarray(images[i, j]).resize((CELL // 2, CELL // 2), Image.Resampling.LANCZOS)
            canvas.paste(cell, (margin + j * pitch, y))
    return canvas
