"""Shares, means and differences with their 95% intervals.

A prompt sampled from several seeds gives similar images: 10 seeds of 50 prompts say less of other prompts than 500
prompts do. `rate` and `mean` take images as independent. `clustered_rate`, `paired_difference` and `any_of` speak of
all prompts of which these are a sample; `rate` of these very prompts, if each has as many seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Shaped

Z = 1.959964  # the normal distribution holds 95% within so many standard deviations
# The intra-class correlation (0 to 1: how alike the verdicts on images of one prompt are) that is supposed until the
# data say otherwise, with the weight of so many prompts. Rates of the embedded model and its erasures mostly have 0 to
# 0.3, those of kept objects up to 0.46. With less weight, intervals of rates of a few percent are too narrow.
USUAL_CORRELATION, USUAL_WEIGHT = 0.3, 2
CHUNK = 2_000_000  # draws of the bootstrap that are held at once


@dataclass(frozen=True)
class Estimate:
    """A mean over n images and its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def rate(hits: Sequence[int | np.bool_]) -> Estimate | None:
    """The share of hits, with Wilson's interval; None of nothing."""
    total = int(sum(hits))
    return Estimate(total / len(hits), *wilson(total, len(hits)), len(hits)) if hits else None


def known(estimate: Estimate | None) -> Estimate:
    """An estimate where there is one. Raises ValueError for one of nothing."""
    if estimate is None:
        raise ValueError("there are no images to take a share of")
    return estimate


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): unlike hits/n +- 1.96 sd, it also holds at shares of 0 and 1."""
    return _wilson(hits / n, n, Z)


def mean(values: Sequence[float] | Float[np.ndarray, " n"]) -> Estimate:
    """A mean with its normal 95% interval; of a single value the interval is all that SSIM can be, -1 to 1.

    Where a value is above 1, as LPIPS may be, the interval has no upper bound.
    """
    value, n = float(np.mean(values)), len(values)
    half = Z * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    most = 1.0 if np.max(values) <= 1 else math.inf
    return Estimate(value, max(value - half, -1.0), min(value + half, most), n)


def clustered_rate(
    hits: Sequence[int | np.bool_] | Bool[np.ndarray, " n"], clusters: Sequence | np.ndarray
) -> Estimate | None:
    """The share of hits where several images are of one prompt; None of nothing.

    Wilson's interval with n divided by the design effect, 1 + (size - 1) icc (Kish 1965), and with Student's quantile,
    since the design effect is itself estimated, from as many prompts as there are (Korn and Graubard 1998). The
    intra-class correlation icc is that of the analysis of variance (Donner 1986), drawn towards `USUAL_CORRELATION`:
    rare hits say little of it, and no hits nothing. One image of each prompt gives `rate`; a single prompt says nothing
    of others: 0 to 1. Simulated intervals of 20 prompts or more hold the rate at 92% or more up to an icc of 0.3; where
    images of a prompt are still more alike and hits are rare (a few percent) it may be 89%.

    Args:
      hits: of each image, whether it is one.
      clusters: of each image, its prompt: any labels.

    Raises ValueError if there are not as many labels as hits, or if a hit is neither 0 nor 1.
    """
    values = _finite("hits", hits)
    if not _are_shares(values):
        raise ValueError("hits must each be true or false; for other values take `mean`")
    index, sizes = _grouped(clusters, len(values))
    n, k = len(values), len(sizes)
    if k == n:
        return rate(values.astype(bool).tolist())
    share = float(values.mean())
    if k == 1:
        return Estimate(share, 0.0, 1.0, n)
    return Estimate(share, *_wilson(share, n / _design_effect(values, index, sizes), _student(_freedom(sizes))), n)


def any_of(hits: Sequence[Sequence[int | np.bool_]] | Bool[np.ndarray, "prompts k"]) -> Estimate | None:
    """The share of prompts of which any of k images is a hit, as attacks are scored; None of nothing.

    A prompt counts once, whatever k, so that Wilson's interval over prompts is right however alike its images are.

    Raises ValueError if hits are not a table with a row for each prompt, or k is 0.
    """
    table = np.asarray(hits)
    if len(table) == 0:
        return None
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(f"hits of shape {table.shape} must be [prompts, k] with k of 1 or more")
    return rate([bool(row.any()) for row in table.astype(bool)])


def paired_difference(
    a: Sequence[float] | Shaped[np.ndarray, " n"],
    b: Sequence[float] | Shaped[np.ndarray, " n"],
    clusters: Sequence | np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """The mean of a - b over images from the same prompts and noise.

    Percentile bootstrap that draws whole prompts (Davison and Hinkley 1997, section 3.8), with two corrections. The
    bounds' distances are stretched by sqrt(k / (k - 1)) and from the normal to Student's quantile: a bootstrap of few
    prompts k is too narrow (Hesterberg 2015, section 4.2). And where a and b are hits (0 or 1), two prompts are added
    to those drawn from, in which all changes for the better and for the worse, each as large as the design effect
    (Bonett and Price 2012: with one image of each prompt they are one image more of each kind). Without them the
    interval of models that never differ has no width.

    Args:
      a, b: hits or other values of each image, in the same order.
      clusters: of each image, its prompt: any labels.
      resamples: of the bootstrap.
      seed: of the bootstrap's draws; the same gives the same interval.

    Returns:
      The estimate, a - b. A single prompt says nothing of others: -1 to 1 for hits, else without bounds.

    Raises ValueError for no images, unequal lengths, values that are not finite, or no resamples.
    """
    a, b = _finite("a", a), _finite("b", b)
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"a has {len(a)} values and b has {len(b)}: give both for the same images, one at least")
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1")
    index, sizes = _grouped(clusters, len(a))
    change, are_hits, freedom = a - b, _are_shares(a) and _are_shares(b), _freedom(sizes)
    value, bound = float(change.mean()), 1.0 if are_hits else math.inf
    if len(sizes) == 1:
        return Estimate(value, -bound, bound, len(a))
    sums = np.bincount(index, change)
    if are_hits:
        extra = _design_effect(change, index, sizes)
        sums, sizes = np.append(sums, [extra, -extra]), np.append(sizes, [extra, extra])
    middle = sums.sum() / sizes.sum()
    low, high = np.quantile(_bootstrapped(sums, sizes, resamples, seed), [0.025, 0.975]) - middle
    stretch = _student(freedom) / Z * math.sqrt((freedom + 1) / freedom)
    # The value itself is always within: the added prompts draw the middle towards 0.
    low, high = min(middle + stretch * low, value), max(middle + stretch * high, value)
    return Estimate(value, float(max(low, -bound)), float(min(high, bound)), len(a))


def _wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    z2 = quantile * quantile
    middle = share + z2 / (2 * n)
    half = quantile * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Rounding leaves about 1e-17 where the bound is 0 or 1.
    low = 0.0 if share == 0 else (middle - half) / (1 + z2 / n)
    return low, 1.0 if share == 1 else (middle + half) / (1 + z2 / n)


@cache
def _student(freedom: float) -> float:
    """Student's distribution holds 95% within -t to t."""
    if freedom > 10_000:
        return Z
    # With t = sqrt(freedom) tan(x), x is distributed as cos(x)^(freedom - 1).
    x = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(x) ** (freedom - 1)
    held = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(freedom) * math.tan(np.interp(0.95, held / held[-1], x))


def _freedom(sizes: Float[np.ndarray, " k"]) -> float:
    """Degrees of freedom, 1 at least: k - 1 of k clusters of one size, and fewer where some hold most images."""
    return max(1.0, float(sizes.sum() ** 2 / np.sum(sizes**2)) - 1)


def _design_effect(
    values: Float[np.ndarray, " n"], index: Shaped[np.ndarray, " n"], sizes: Float[np.ndarray, " k"]
) -> float:
    """By how much the variance of a mean exceeds that over independent images; 1 at least. For k of 2 or more."""
    n, k = len(values), len(sizes)
    means = np.bincount(index, values) / sizes
    between = np.sum(sizes * (means - values.mean()) ** 2) / (k - 1)
    within = np.sum((values - means[index]) ** 2) / max(n - k, 1)
    size = np.sum(sizes**2) / n  # of the cluster that an image is in, on average
    total = between + ((n - size) / (k - 1) - 1) * within
    correlation = float(np.clip((between - within) / total, 0, 1)) if total > 0 else 0.0
    # Only clusters with anything but the commonest value show whether it comes in clusters, and one is none.
    distinct, counts = np.unique(values, return_counts=True)
    telling = max(len(np.unique(index[values != distinct[np.argmax(counts)]])) - 1, 0)
    correlation = (telling * correlation + USUAL_WEIGHT * USUAL_CORRELATION) / (telling + USUAL_WEIGHT)
    return float(1 + (size - 1) * correlation)


def _bootstrapped(
    sums: Float[np.ndarray, " k"], sizes: Float[np.ndarray, " k"], resamples: int, seed: int
) -> Float[np.ndarray, " resamples"]:
    """The means of resampled clusters."""
    rng, k, means = np.random.default_rng(seed), len(sums), []
    rows = max(1, CHUNK // k)
    for start in range(0, resamples, rows):
        drawn = rng.integers(k, size=(min(rows, resamples - start), k))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def _grouped(clusters: Sequence | np.ndarray, n: int) -> tuple[Shaped[np.ndarray, " n"], Float[np.ndarray, " k"]]:
    """Of each image, the number of its cluster; of each cluster, how many images it has."""
    labels = np.asarray(clusters)
    if labels.shape != (n,):
        raise ValueError(f"clusters of shape {labels.shape} for {n} images: give each image one label, as its prompt")
    _, index = np.unique(labels, return_inverse=True)
    return index, np.bincount(index).astype(np.float64)


def _finite(name: str, values: Sequence[float | np.bool_] | np.ndarray) -> Float[np.ndarray, " n"]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"{name} of shape {array.shape} must be one finite value for each image; leave out the others")
    return array


def _are_shares(values: Float[np.ndarray, " n"]) -> bool:
    return bool(np.isin(values, (0, 1)).all())
