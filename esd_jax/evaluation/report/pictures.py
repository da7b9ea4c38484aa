"""Images as data within a page, and pairs of them: before and after, side by side."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from esd_jax.evaluation.evidence import Pair
from esd_jax.evaluation.report.numbers import NOTHING
from esd_jax.metrics.likeness import ssim

Pixels = UInt8[np.ndarray, "height width 3"]
SMALL = 128  # pixels of the longer side up to which an image is shown in full
BUDGET = 640_000  # characters that the images of a page may take up together
SAMPLE = 12  # images by which a size is judged at first
SAME = 0.95  # SSIM from which on two images count as unchanged
WINDOW = 7  # pixels of SSIM's window
IN_A_ROW = 4  # images that fit beside each other on a phone


class Size(NamedTuple):
    """How images are shown: side, in pixels, and WebP quality of large ones; quality of small ones, None: lossless."""

    side: int
    quality: int
    small: int | None = None


# From the best on.
SIZES = (Size(512, 84), Size(384, 82), Size(320, 78), Size(256, 76), Size(192, 72, 92), Size(128, 65, 80),
         Size(96, 50, 60))  # fmt: skip


class Encoder:
    """Writes the images of one page, all of them known beforehand, as large as they fit into a budget together."""

    def __init__(self, images: Iterable[Pixels], budget: int = BUDGET):
        self._known: dict[tuple[bytes, tuple[int, ...], Size], str] = {}
        images = list(images)
        self._large = any(max(pixels.shape[:2]) > SMALL for pixels in images)
        self._size = next((size for size in SIZES if self._fits(images, size, budget)), SIZES[-1])

    def tag(self, pixels: Pixels, alt: str) -> str:
        """An `<img>` that carries its own data."""
        data = self._data(pixels, self._size)
        height, width = pixels.shape[:2]
        scale = min(1.0, self._size.side / max(width, height)) if max(width, height) > SMALL else 1.0
        size = f'width="{max(1, round(scale * width))}" height="{max(1, round(scale * height))}"'
        return f'<img src="data:image/webp;base64,{data}" {size} alt="{escape(alt)}">'

    @property
    def note(self) -> str:
        """How the images are shown, in a sentence."""
        if not self._large and self._size.small is None:
            return "Images are shown without loss."
        shown = f"Images are shown as WebP of quality {self._size.quality if self._large else self._size.small}"
        reduced = f", reduced to {self._size.side} pixels" if self._large else ""
        return f"{shown}{reduced}; they were evaluated as they were generated."

    def _fits(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], size: Size, budget: int) -> bool:
        few = images[:: max(1, len(images) // SAMPLE)]  # most sizes are far from fitting, or fit well
        if sum(len(self._data(pixels, size)) for pixels in few) * len(images) > 1.1 * budget * max(1, len(few)):
            return False
        return sum(len(self._data(pixels, size)) for pixels in images) <= budget

    def _data(self, pixels: Pixels, size: Size) -> str:
        key = pixels.tobytes(), pixels.shape, size
        if key not in self._known:
            self._known[key] = _webp(pixels, size)
        return self._known[key]


def _webp(pixels: Pixels, size: Size) -> str:
    """Base64 of an image as WebP."""
    picture, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    if max(picture.size) > SMALL:
        picture.thumbnail((size.side, size.side), Image.Resampling.LANCZOS)
        picture.save(buffer, format="webp", quality=size.quality, method=4)
    elif size.small is None:
        picture.save(buffer, format="webp", lossless=True, quality=60, method=4)
    else:
        picture.save(buffer, format="webp", quality=size.small, method=4)
    return base64.b64encode(buffer.getvalue()).decode()


def group(title: str, pairs: Sequence[Pair], encoder: Encoder, sides: tuple[str, str] = ("before", "after")) -> str:
    """Pairs of images side by side under a title, each with its prompt."""
    shown = "".join(_pair(pair, encoder, sides) for pair in pairs)
    return f'<section class="group"><h3>{escape(title)}</h3><div class="pairs">{shown}</div></section>'


def sheet(rows: Mapping[str, Sequence[Pixels | None]], prompts: Sequence[str], encoder: Encoder) -> str:
    """Rows of images, each with its name, above the prompts that they share."""
    blocks = []
    for start in range(0, len(prompts), IN_A_ROW):
        columns = list(enumerate(prompts))[start : start + IN_A_ROW]
        body = "".join(
            f'<tr><th scope="row"><span>{escape(name)}</span></th>'
            + "".join(f"<td>{_cell(images[i], f'{name}: {prompt}', encoder)}</td>" for i, prompt in columns)
            + "</tr>"
            for name, images in rows.items()
        )
        foot = "".join(f'<th scope="col">{escape(prompt)}</th>' for _, prompt in columns)
        blocks.append(f"<table><tbody>{body}</tbody><tfoot><tr><td></td>{foot}</tr></tfoot></table>")
    return f'<div class="sheet">{"".join(blocks)}</div>'


def _cell(pixels: Pixels | None, alt: str, encoder: Encoder) -> str:
    return NOTHING if pixels is None else encoder.tag(pixels, alt)


def _pair(pair: Pair, encoder: Encoder, sides: tuple[str, str]) -> str:
    images = "".join(
        f"<span><small>{escape(name)}</small>{encoder.tag(pixels, f'{name}: {pair.prompt}')}</span>"
        for name, pixels in zip(sides, (pair.before, pair.after), strict=True)
    )
    similarity = _similarity(pair)
    same = " same" if similarity >= SAME else ""
    return (
        f'<figure class="pair{same}" data-ssim="{similarity:.2f}"><div class="two">{images}</div>'
        f"<figcaption>{escape(pair.prompt)}</figcaption></figure>"
    )


def _similarity(pair: Pair) -> float:
    """SSIM of a pair; of images too small for it, or of two sizes, 1 where they are equal, else 0."""
    if pair.before.shape != pair.after.shape or min(pair.before.shape[:2]) < WINDOW:
        return float(np.array_equal(pair.before, pair.after))
    return float(ssim(pair.before[None], pair.after[None], WINDOW)[0])
