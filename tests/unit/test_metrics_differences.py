"""Intervals of differences hold the truth as often as they say, on simulated draws."""

import math

import numpy as np
import pytest
from interval_coverage import FIFTY, REPEATS, TEN, coverage, labels

from esd_jax.metrics import intervals


def pairs(before, after, correlation, repeats, prompts=FIFTY, seeds=TEN):
    """Hits of two models whose prompts, and whose images from one noise, are alike."""
    rng = np.random.default_rng(0)
    same = rng.random((repeats, prompts, seeds))
    noise = np.where(rng.random(same.shape) < 0.6, same, rng.random(same.shape))
    hits = []
    for p, threshold in ((before, same), (after, noise)):
        a, b = p * (1 / correlation - 1), (1 - p) * (1 / correlation - 1)
        hits.append((threshold < rng.beta(a, b, (repeats, prompts, 1))).reshape(repeats, -1))
    return hits


@pytest.mark.parametrize(("before", "after"), [(0.1, 0.1), (0.5, 0.3), (0.95, 0.05), (0.05, 0.01)])
def test_differences_of_hits_are_covered(before, after):
    results = [
        intervals.paired_difference(a, b, labels(), resamples=400)
        for a, b in zip(*pairs(after, before, 0.3, REPEATS), strict=True)
    ]
    assert coverage(results, after - before) >= 0.93
    assert np.mean([estimate.value for estimate in results]) == pytest.approx(after - before, abs=0.005)


@pytest.mark.parametrize(("prompts", "seeds"), [(8, 10), (200, 1)])
def test_differences_of_few_prompts_and_of_single_seeds_are_covered(prompts, seeds):
    results = [
        intervals.paired_difference(a, b, labels(prompts, seeds), resamples=400)
        for a, b in zip(*pairs(0.3, 0.5, 0.3, 1000, prompts, seeds), strict=True)
    ]
    assert coverage(results, -0.2) >= 0.93


@pytest.mark.parametrize("prompts", [8, 50])
def test_differences_of_other_values_are_covered(prompts):
    rng = np.random.default_rng(0)
    each = 0.5 * rng.standard_normal((REPEATS, prompts, 1))
    a = (0.1 + each + rng.standard_normal((REPEATS, prompts, 5))).reshape(REPEATS, -1)
    b = rng.standard_normal(a.shape[1])
    results = [intervals.paired_difference(row + b, b, labels(prompts, 5), resamples=1000) for row in a]
    assert coverage(results, 0.1) >= 0.93


def test_many_single_differences_have_the_interval_of_bonett_and_price():
    lost, won, n = 60, 12, 400
    a, b = np.zeros((2, n))
    b[:lost], a[lost : lost + won] = 1, 1
    estimate = intervals.paired_difference(a, b, range(n), resamples=20_000)
    p, q = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    half = 1.96 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    assert estimate.value == pytest.approx((won - lost) / n)
    assert (estimate.low, estimate.high) == pytest.approx((q - p - half, q - p + half), abs=0.03 * half)


def test_the_difference_of_other_values_has_students_interval():
    a = np.random.default_rng(0).normal(size=12)
    estimate = intervals.paired_difference(a, np.zeros(12), list("abcdefghijkl"), resamples=50_000)
    half = 2.201 * a.std(ddof=1) / math.sqrt(12)
    assert (estimate.low, estimate.high) == pytest.approx((a.mean() - half, a.mean() + half), abs=0.08 * half)


def test_models_that_never_differ_still_have_an_interval():
    same = np.zeros(500)
    estimate = intervals.paired_difference(same, same, labels())
    assert (
        estimate.value == 0 and -0.04 < estimate.low < -0.01 and estimate.high == pytest.approx(-estimate.low, rel=0.15)
    )
    values = np.full(500, 0.7)  # no hits: nothing is known of how much they could differ
    estimate = intervals.paired_difference(values, values, labels())
    assert (estimate.low, estimate.value, estimate.high) == (0, 0, 0)


def test_a_difference_repeats_by_its_seed_and_changes_sign():
    a, b = (hits[0] for hits in pairs(0.3, 0.5, 0.3, 1))
    first = intervals.paired_difference(a, b, labels())
    assert first == intervals.paired_difference(a, b, labels()) == intervals.paired_difference(a, b, labels() * 7 + 2)
    other = intervals.paired_difference(a, b, labels(), seed=1)
    assert other.value == first.value and other != first
    back = intervals.paired_difference(b, a, labels())
    assert (back.value, back.low, back.high) == pytest.approx((-first.value, -first.high, -first.low), abs=0.01)


def test_resamples_in_parts_are_the_same_resamples(monkeypatch):
    a, b = (hits[0] for hits in pairs(0.3, 0.5, 0.3, 1))
    whole = intervals.paired_difference(a, b, labels(), resamples=100)
    monkeypatch.setattr(intervals, "CHUNK", 7 * 52)
    assert intervals.paired_difference(a, b, labels(), resamples=100) == whole


def test_a_difference_of_a_single_prompt_has_no_bounds():
    estimate = intervals.paired_difference([1, 1, 0], [0, 0, 0], ["a"] * 3)
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(2 / 3), -1, 1)
    estimate = intervals.paired_difference([0.4, 1.6], [0, 0], ["a"] * 2)
    assert (estimate.value, estimate.low, estimate.high) == (1, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1, 0], [1], {}, "for the same images"),
        ([], [], {}, "one at least"),
        ([1, math.nan], [1, 0], {}, "a of shape .* finite"),
        ([1, 0], [1, 0], {"resamples": 0}, "resamples=0"),
    ],
)
def test_wrong_pairs_are_refused(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        intervals.paired_difference(a, b, list(range(len(a))), **options)
