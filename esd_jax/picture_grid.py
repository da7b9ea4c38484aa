"""Images side by side as one picture, with captions: what a notebook shows, or a script saves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, GAP = (30, 30, 35), 4  # of text; pixels between images
SMALLEST = 128  # pixels of a cell's longer side, below which it is enlarged
FONT = (12, 26)  # pixels of text, at least and at most
IN_A_ROW = 6  # images, up to which they stand in one row


class Row(NamedTuple):
    """A row of the picture."""

    label: str
    images: list[Image.Image]


def grid(
    images: Any,
    rows: int | None = None,
    captions: Sequence[str] | None = None,
    *,
    scale: int | None = None,
) -> Image.Image:
    """Lays images out as one picture. A notebook shows it; `grid(...).save("images.png")` keeps it.

        grid(sample(model, prompts), captions=prompts)
        grid({"base": before, "erased": after}, captions=prompts)

    Args:
      images: an array [n, height, width, 3] as `sample` returns it, or a list of images; or several rows of them: a
        list of such arrays or lists, which may differ in length, or a mapping whose names label the rows. An image is
        uint8 or a float of 0 to 1, [height, width] or [height, width, 1, 3 or 4], or a PIL image. Sizes may differ.
      rows: how many rows; by default one for up to 6 images, and about a square for more. The last may be shorter.
      captions: one for each image, row by row, or, where `images` are rows, one for each column; they stand above.
      scale: each pixel becomes so many in height and width; by default 1, and for images below 128 pixels as many as
        make the largest at least that large.

    Returns:
      An RGB image on white. Images are not resampled, but repeated by `scale`.

    Raises:
      ValueError: no image, a value or shape that is none, or another number of captions.
    """
    table = _table(images, rows)
    count, columns = sum(len(row.images) for row in table), max(len(row.images) for row in table)
    if not count:
        raise ValueError("there is no image to lay out")
    size = tuple(max(image.size[axis] for row in table for image in row.images) for axis in (0, 1))
    if scale is None:
        scale = math.ceil(SMALLEST / max(size))
    if scale < 1:
        raise ValueError(f"scale={scale} must be at least 1")
    width, height = size[0] * scale, size[1] * scale
    font = ImageFont.load_default(size=min(max(width // 10, FONT[0]), FONT[1]))
    texts = _texts(table, columns, captions)
    heads = [[wrapped(text, font, width) for text in line] for line in texts]
    heights = [max([0, *map(len, line)]) * _line_height(font) for line in heads]
    margin = max(_widest(row.label, font) for row in table)
    margin += 2 * GAP if margin else 0
    whole = (margin + columns * (width + GAP) - GAP, sum(heights) + len(table) * (height + GAP) - GAP)
    canvas = Image.new("RGB", whole, "white")
    draw, y = ImageDraw.Draw(canvas), 0
    for row, head, above in zip(table, heads, heights, strict=True):
        draw.multiline_text((GAP, y + above + height // 2), row.label, INK, font, anchor="lm")
        for i, lines in enumerate(head):
            x = margin + i * (width + GAP) + width // 2
            draw.multiline_text((x, y + GAP // 2), "\n".join(lines), INK, font, anchor="ma", align="center")
        for i, image in enumerate(row.images):
            large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
            canvas.paste(large, (margin + i * (width + GAP), y + above))
        y += above + height + GAP
    return canvas


def _table(images: Any, rows: int | None) -> list[Row]:
    """The images, row by row."""
    if isinstance(images, Mapping):
        table = [Row(str(name), _images(some)) for name, some in images.items()]
    elif isinstance(images, Sequence) and any(map(_is_several, images)):
        table = [Row("", _images(some)) for some in images]
    else:
        flat = _images(images)
        lines = rows if rows is not None else 1 if len(flat) <= IN_A_ROW else round(math.sqrt(len(flat)))
        if lines < 1:
            raise ValueError(f"rows={rows} must be at least 1")
        columns = max(1, math.ceil(len(flat) / lines))
        return [Row("", flat[i : i + columns]) for i in range(0, max(1, len(flat)), columns)]
    if rows not in (None, len(table)):
        raise ValueError(f"rows={rows}, but the images are given in {len(table)} rows: leave rows out")
    return table or [Row("", [])]


def _is_several(value: Any) -> bool:
    """Whether a value is several images: a list, or an array with an axis of them."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4


def _images(value: Any) -> list[Image.Image]:
    if isinstance(value, Image.Image) or getattr(value, "ndim", None) in (2, 3):
        return [_image(value)]
    return [_image(one) for one in value]


def _image(value: Any) -> Image.Image:
    """One image in RGB. Raises ValueError for what is none."""
    if isinstance(value, Image.Image):
        picture = value
    else:
        pixels = np.asarray(value)
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))) or not pixels.size:
            raise ValueError(f"an image must be [height, width, 3], not {list(pixels.shape)}")
        if pixels.dtype != np.uint8:
            pixels = _levels(pixels)
        picture = Image.fromarray(np.ascontiguousarray(pixels))
    if "A" in picture.getbands():
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Floats of 0 to 1 as uint8."""
    if pixels.dtype.kind in "biu":
        raise ValueError(f"an image must be uint8, or a float of 0 to 1, not {pixels.dtype}")
    values = pixels.astype(np.float32)
    if not (values.min() >= 0 and values.max() <= 1):  # NaN, too
        least, most = values.min(), values.max()
        raise ValueError(f"an image of floats must be 0 to 1, not {least:g} to {most:g}: of -1 to 1, give x / 2 + 0.5")
    return np.round(values * 255).astype(np.uint8)


def _texts(table: list[Row], columns: int, captions: Sequence[str] | None) -> list[list[str]]:
    """The captions above each row's images: of each, or of the columns above the first row alone."""
    if captions is None:
        return [[] for _ in table]
    captions = [captions] if isinstance(captions, str) else [str(text) for text in captions]
    count = sum(len(row.images) for row in table)
    if len(captions) == count:
        rest = iter(captions)
        return [[next(rest) for _ in row.images] for row in table]
    if len(captions) == columns:
        return [captions, *([] for _ in table[1:])]
    of_columns = f" in {columns} columns" if len(table) > 1 else ""
    raise ValueError(f"{len(captions)} captions for {count} images{of_columns}: give one for each")


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """A text in lines that fit a width; a word that does not is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append(cut(word, font, width))
    return lines


def cut(text: str, font: Any, width: int) -> str:
    """As much of a text as fits a width; "…" stands for the rest."""
    while len(text) > 1 and font.getlength(text) > width:
        text = f"{text.removesuffix('…')[:-1]}…"
    return text


def _widest(text: str, font: Any) -> int:
    return math.ceil(max(font.getlength(line) for line in text.split("\n")))


def _line_height(font: Any) -> int:
    return sum(font.getmetrics()) + GAP
