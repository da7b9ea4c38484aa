"""Shares and means with their 95% intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Z = 1.959964  # the normal distribution holds 95% within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A mean over n images and its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def rate(hits: Sequence[bool]) -> Estimate | None:
    """The share of hits, with Wilson's interval; None of nothing."""
    return Estimate(sum(hits) / len(hits), *wilson(sum(hits), len(hits)), len(hits)) if hits else None


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): unlike hits/n +- 1.96 sd, it also holds at shares of 0 and 1."""
    share, z2 = hits / n, Z * Z
    middle = share + z2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Rounding leaves about 1e-17 where the bound is 0 or 1.
    low = 0.0 if hits == 0 else (middle - half) / (1 + z2 / n)
    return low, 1.0 if hits == n else (middle + half) / (1 + z2 / n)


def mean(values: Float[np.ndarray, " n"]) -> Estimate:
    """A mean with its normal 95% interval; of a single value the interval is all that SSIM can be, -1 to 1."""
    value, n = float(np.mean(values)), len(values)
    half = Z * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(value, max(value - half, -1.0), min(value + half, 1.0), n)
