"""How figures are written: shares as percentages, means with as many digits as their interval gives meaning."""

import math

from esd_jax.evaluation.evidence import Cell
from esd_jax.metrics.intervals import Estimate

MANY = 200  # images from which on a tenth of a percent means something
NOTHING = "–"  # not measured


def value(cell: Cell, percent: bool = False) -> str:
    """A cell without its interval: "5%", "0.13", "1,000", words as they are."""
    if cell is None:
        return NOTHING
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        return share(cell.value, cell.n) if percent else _fixed(cell.value, _decimals(cell))
    if percent:
        return share(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:,.0f}" if 1000 <= abs(cell) < 1e7 else f"{cell:.3g}"


def interval(estimate: Estimate, percent: bool = False) -> str:
    """The 95% interval: "1–24%", "0.07–0.19", "-0.10 to 0.20"."""
    if percent:
        low, high = (share(bound, estimate.n).removesuffix("%") for bound in (estimate.low, estimate.high))
        return f"{low}–{high}%" if estimate.low >= 0 else f"{low} to {high}%"
    low, high = (_fixed(bound, _decimals(estimate)) for bound in (estimate.low, estimate.high))
    return f"{low}–{high}" if estimate.low >= 0 else f"{low} to {high}"


def with_interval(cell: Cell, percent: bool = False) -> str:
    """A cell on one line: "5% (1–24%)"."""
    if isinstance(cell, Estimate):
        return f"{value(cell, percent)} ({interval(cell, percent)})"
    return value(cell, percent)


def share(fraction: float, n: int | None = None) -> str:
    """A percentage. 0% and 100% are said only of none and of all: "99.95%"."""
    if not math.isfinite(fraction):
        return NOTHING
    least = 1 if n is not None and n >= MANY else 0
    for decimals in (least, *range(least + 1, 4)):
        text = f"{100 * fraction:.{decimals}f}"
        if fraction in (0, 1):
            return f"{100 * fraction:.0f}%"
        if float(text) not in (0, 100):
            return f"{text}%"
    return "<0.001%" if fraction < 0.5 else ">99.999%"


def points(difference: float | None, *, signed: bool = False) -> str:
    """A difference of two shares in percentage points: "20 points", "1 point"; signed: "−20", "+1", "0"."""
    number = round(100 * (difference or 0.0))
    if signed:
        return f"{number:+d}".replace("-", "−") if number else "0"
    return f"{number} point{'' if abs(number) == 1 else 's'}"


def count(estimate: Estimate) -> str:
    """A share as hits among images: "17 of 20"."""
    return f"{round(estimate.value * estimate.n):,} of {estimate.n:,}"


def _fixed(number: float, decimals: int) -> str:
    return f"{number:,.{decimals}f}" if math.isfinite(number) else NOTHING


def _decimals(estimate: Estimate) -> int:
    """One digit of half the interval, and two decimals at least of what is small."""
    least, half = (2 if abs(estimate.value) < 10 else 1), (estimate.high - estimate.low) / 2
    return least if not 0 < half < math.inf else min(6, max(least, -math.floor(math.log10(half))))
