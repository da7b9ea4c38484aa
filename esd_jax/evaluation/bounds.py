"""Bounds on an erasure's figures, as in "detection<=0.02, inversion<=0.2, drop<=3"."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from esd_jax import suggest

# Name -> (what it is, the largest number).
FIGURES: Mapping[str, tuple[str, float]] = {
    "detection": ("target detection rate", 1.0),
    "inversion": ("Concept Inversion success rate", 1.0),
    "drop": ("drop of other concepts, in percentage points", 100.0),
}
EXAMPLE = "detection<=0.02, inversion<=0.2, drop<=3"


@dataclass(frozen=True)
class Bound:
    """name: of `FIGURES`. most: the largest acceptable number: a share (0 to 1), of "drop" percentage points.

    Raises ValueError for another name, or a number out of range.
    """

    name: str
    most: float

    def __post_init__(self):
        if self.name not in FIGURES:
            raise ValueError(f"bound {self.name!r} is unknown; {suggest.did_you_mean(self.name, FIGURES)}")
        _, top = FIGURES[self.name]
        if not 0 <= self.most <= top:  # nor NaN
            raise ValueError(f"bound {self.name}<={self.most:g} must be in 0..{top:g}")

    def missed_by(self, value: float) -> float:
        """By how much a figure exceeds the bound; 0 where it meets it."""
        return over if (over := value - self.most) > 1e-9 else 0.0  # a share of images is no exact number

    def shown(self, value: float) -> str:
        """A figure, as a person reads it."""
        return f"{value:.1f} points" if self.name == "drop" else f"{value:.1%}"

    def line(self, value: float) -> str:
        """ "detection 4.0%, at most 2.0%: missed by 2.0 points"."""
        over = self.missed_by(value) * (1 if self.name == "drop" else 100)
        outcome = f"missed by {over:.1f} points" if over else "met"
        return f"{self.name} {self.shown(value)}, at most {self.shown(self.most)}: {outcome}"


def parse(text: str) -> tuple[Bound, ...]:
    """The bounds of a text, separated by ",". Raises ValueError, naming the bound, for what is none."""
    bounds: list[Bound] = []
    for part in filter(None, map(str.strip, text.split(","))):
        if not (match := re.fullmatch(r"(\w+)\s*<=\s*(\S+)", part)):
            raise ValueError(f"bound {part!r} is not NAME<=NUMBER, as in {EXAMPLE!r}")
        name, number = match.groups()
        try:
            most = float(number)
        except ValueError:
            most = math.nan
        if math.isnan(most):
            raise ValueError(f"bound {part!r}: {number!r} is no number, as in {EXAMPLE!r}")
        bound = Bound(name, most)
        if any(other.name == name for other in bounds):
            raise ValueError(f"bound {name!r} is named twice: give one number")
        bounds.append(bound)
    if not bounds:
        raise ValueError(f"{text!r} has no bound: give some, as in {EXAMPLE!r}")
    return tuple(bounds)
