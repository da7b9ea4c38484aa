"""The embedded model: a small Stable Diffusion of emoji, the words it knows, and a classifier that tells them apart.

The model is in diffusers layout (`MODEL`); `esd_jax.load("emoji")` loads it. 43 objects x 8 styles, 64 x 64 px.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

MODEL = Path(__file__).parent / "model"


@lru_cache
def objects() -> tuple[str, ...]:
    """The objects that the model knows, in the order of the probe's classes."""
    return tuple(entry["name"] for entry in _vocabulary()["objects"])


@lru_cache
def styles() -> tuple[str, ...]:
    """The styles that the model knows, in the order of the probe's classes."""
    return tuple(_vocabulary()["styles"])


def prompt(name: str, style: str | None = None) -> str:
    """ "a cat in neon style", "an octopus": as the captions of its training were written."""
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name} in {style} style" if style else f"{article} {name}"


def pairs(without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Every (object, style), objects first to vary, without some styles."""
    return [(name, style) for style in styles() if style not in without for name in objects()]


def _vocabulary() -> dict:
    return json.loads((Path(__file__).parent / "vocabulary.json").read_text())
