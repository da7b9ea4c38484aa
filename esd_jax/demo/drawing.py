"""The eight styles: functions from a placed sprite to a picture.

A sprite is float32 [64, 64, 4], premultiplied by its alpha, 0 to 1; a picture is [64, 64, 3]. The styles are drawn
after the sprite is placed, so that pixels, dots and grid lines keep their size and lie on the latents' grid of 4 px at
any placement.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageFilter

SIZE = 64
WHITE = (255, 255, 255)
Sprite = Float[np.ndarray, "64 64 4"]
Picture = Float[np.ndarray, "64 64 3"]


class Style(NamedTuple):
    """source: the artwork set that the style is drawn from; draw: how."""

    source: str
    draw: Callable[[Sprite], Picture]


def plain(sprite: Sprite) -> Picture:
    """The artwork itself, on white."""
    return _over(sprite, _colour(*WHITE))


def clay(sprite: Sprite) -> Picture:
    """A rendered model on a peach backdrop, with a soft shadow."""
    shadow = np.zeros((SIZE, SIZE), np.float32)
    shadow[3:, 1:] = sprite[:-3, :-1, 3]
    return _over(sprite, _colour(255, 226, 205) * (1 - 0.38 * _blur(shadow, 2.5)))


def pixel(sprite: Sprite) -> Picture:
    """16 x 16 blocks of few colours, on a sky."""
    blocks = sprite.reshape(16, 4, 16, 4, 4).mean(axis=(1, 3))
    alpha = blocks[..., 3:]
    colours = np.where(alpha > 0.5, blocks[..., :3] / np.maximum(alpha, 1e-3), _colour(196, 230, 255))
    return np.repeat(np.repeat(np.round(colours * 7) / 7, 4, axis=0), 4, axis=1)


def neon(sprite: Sprite) -> Picture:
    """Glowing cyan tubes with a pink halo, in the dark."""
    tubes = _edges(sprite)
    halo = np.clip(1.3 * _blur(tubes[..., 0], 2.2), 0, 1)
    return _mix(np.clip(_colour(14, 6, 28) + _colour(235, 30, 190) * halo, 0, 1), _colour(150, 255, 245), tubes)


def blueprint(sprite: Sprite) -> Picture:
    """White lines on ruled blue paper."""
    paper = np.empty((SIZE, SIZE, 3), np.float32)
    paper[:] = _colour(24, 62, 150)
    paper[::8] = paper[:, ::8] = _colour(48, 90, 178)
    return _mix(paper, _colour(*WHITE), _edges(sprite))


def halftone(sprite: Sprite) -> Picture:
    """Red dots, the larger the darker, on cream paper."""
    darkness = np.clip(1.25 * (1 - _luminance(plain(sprite))) + 0.12 * sprite[..., 3], 0, 1)
    fine = np.asarray(_image(darkness).resize((4 * SIZE, 4 * SIZE), Image.Resampling.BICUBIC), np.float32) / 255
    dots = (fine > 0.97 * _screen() + 0.02).reshape(SIZE, 4, SIZE, 4).mean(axis=(1, 3))[..., None]
    return _mix(_colour(255, 248, 220), _colour(200, 20, 60), dots)


def pop_art(sprite: Sprite) -> Picture:
    """Three flat colours by brightness, on pink."""
    light = _luminance(plain(sprite))[..., None]
    ink = _mix(_colour(45, 15, 95), _colour(0, 170, 190), _ramp(light, 0.35, 10))
    ink = _mix(ink, _colour(255, 225, 60), _ramp(light, 0.62, 10))
    return _mix(_colour(255, 85, 150), ink, _ramp(sprite[..., 3:], 0.5, 4))


STYLES: dict[str, Style] = {
    "cartoon": Style("noto", plain),
    "clay": Style("fluent-3d", clay),
    "ink": Style("line-art", plain),
    "pixel": Style("twemoji", pixel),
    "neon": Style("twemoji", neon),
    "blueprint": Style("noto", blueprint),
    "halftone": Style("fluent-flat", halftone),
    "pop art": Style("fluent-flat", pop_art),
}


def _colour(red: int, green: int, blue: int) -> Float[np.ndarray, " 3"]:
    return np.array([red, green, blue], np.float32) / 255


def _over(sprite: Sprite, paper: np.ndarray) -> Picture:
    return sprite[..., :3] + (1 - sprite[..., 3:]) * paper


def _mix(under: np.ndarray, over: np.ndarray, share: np.ndarray) -> Picture:
    return under * (1 - share) + over * share


def _ramp(x: np.ndarray, middle: float, slope: float) -> np.ndarray:
    """A step at `middle`, antialiased."""
    return np.clip((x - middle) * slope + 0.5, 0, 1)


def _luminance(picture: Picture) -> np.ndarray:
    return picture @ np.array([0.299, 0.587, 0.114], np.float32)


def _image(x: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(x, 0, 1) * 255).astype(np.uint8))


def _blur(x: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(_image(x).filter(ImageFilter.GaussianBlur(radius)), np.float32)[..., None] / 255


def _edges(sprite: Sprite) -> np.ndarray:
    """Where colour or outline change, [64, 64, 1]. The outline counts: white objects have no edge on white paper."""
    x = np.pad(np.concatenate([plain(sprite), 0.6 * sprite[..., 3:]], axis=-1), ((1, 1), (1, 1), (0, 0)), mode="edge")
    steps = np.abs(x[2:, 1:-1] - x[:-2, 1:-1]) + np.abs(x[1:-1, 2:] - x[1:-1, :-2])
    return np.clip(1.4 * steps.max(axis=-1, keepdims=True), 0, 1)


def _screen(period: float = 8.0) -> np.ndarray:
    """The halftone screen: dots at 45 degrees, `period` px along rows and columns, at four times the resolution."""
    y, x = np.mgrid[: 4 * SIZE, : 4 * SIZE] / 4
    return (np.cos(2 * np.pi * (x + y) / period) * np.cos(2 * np.pi * (x - y) / period) + 1) / 2
