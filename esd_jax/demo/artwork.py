"""The embedded artwork: 44 emoji in five native sets, placed at random and drawn in eight styles."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from esd_jax.demo import vocabulary
from esd_jax.demo.drawing import SIZE, STYLES, Sprite

FILE = Path(__file__).parent / "artwork.png"  # a sheet of sprites: a row per object, a column per set
SETS = ("noto", "twemoji", "fluent-flat", "fluent-3d", "line-art")


class Placement(NamedTuple):
    """Where a sprite lies: its side as a share of the picture's, and its centre's distance from the middle in px."""

    scale: float = 0.8
    x: float = 0.0
    y: float = 0.0


CENTRED = Placement()


def random_placement(rng: np.random.Generator) -> Placement:
    """Scale 0.78 to 0.92, anywhere in the picture."""
    scale = rng.uniform(0.78, 0.92)
    room = (1 - scale) * SIZE / 2
    return Placement(scale, *rng.uniform(-room, room, size=2))


def draw(name: str, style: str, placement: Placement = CENTRED) -> UInt8[np.ndarray, "64 64 3"]:
    """A picture of an object in a style. Raises KeyError for one that is not known."""
    source, paint = STYLES[style]
    sprite = _place(_sprites()[name, source], placement)
    return (np.clip(paint(sprite), 0, 1) * 255 + 0.5).astype(np.uint8)


@lru_cache
def _sprites() -> dict[tuple[str, str], Image.Image]:
    """(object, set) -> RGBA with premultiplied alpha, so that resizing mixes no colour in from where nothing is."""
    sheet = Image.open(FILE).convert("RGBA")
    return {
        (name, source): sheet.crop((SIZE * j, SIZE * i, SIZE * (j + 1), SIZE * (i + 1))).convert("RGBa")
        for i, name in enumerate(vocabulary.objects())
        for j, source in enumerate(SETS)
    }


def _place(sprite: Image.Image, placement: Placement) -> Float[np.ndarray, "64 64 4"]:
    side = round(SIZE * placement.scale)
    corner = (round((SIZE - side) / 2 + placement.x), round((SIZE - side) / 2 + placement.y))
    canvas = Image.new("RGBa", (SIZE, SIZE))
    canvas.paste(sprite.resize((side, side), Image.Resampling.LANCZOS), corner)
    placed: Sprite = np.asarray(canvas, np.float32) / 255
    return placed
