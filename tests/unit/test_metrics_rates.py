"""Intervals of rates hold the truth as often as they say, on simulated draws."""

import math

import numpy as np
import pytest
from interval_coverage import FIFTY, REPEATS, TEN, coverage, labels

from esd_jax.metrics import intervals


def drawn(p, correlation, repeats=REPEATS, prompts=FIFTY, seeds=TEN, seed=0):
    """Beta-binomial hits [repeats, prompts, seeds]: each prompt has a rate of its own."""
    rng = np.random.default_rng(seed)
    each = rng.beta(p * (1 / correlation - 1), (1 - p) * (1 / correlation - 1), (repeats, prompts, 1))
    return rng.random((repeats, prompts, seeds)) < each


@pytest.mark.parametrize("n", [200, 1000])
@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.95])
def test_independent_rates_are_covered(p, n):
    hits = np.random.default_rng(0).binomial(n, p, REPEATS)
    estimates = {count: intervals.rate([True] * count + [False] * (n - count)) for count in set(hits.tolist())}
    assert coverage([estimates[count] for count in hits.tolist()], p) >= 0.93


@pytest.mark.parametrize(("p", "least"), [(0.1, 0.92), (0.5, 0.92), (0.01, 0.92), (0.05, 0.92)])
def test_rates_of_prompts_with_several_seeds_are_covered(p, least):
    hits = drawn(p, 0.3).reshape(REPEATS, -1)
    assert coverage([intervals.clustered_rate(row, labels()) for row in hits], p) >= least
    # As independent images they are not.
    naive = [intervals.wilson(count, FIFTY * TEN) for count in hits.sum(axis=1).tolist()]
    assert np.mean([low <= p <= high for low, high in naive]) < 0.8


@pytest.mark.parametrize(("prompts", "seeds", "p"), [(20, 10, 0.1), (8, 25, 0.1), (8, 25, 0.5), (3, 50, 0.5)])
def test_rates_of_few_prompts_are_covered(prompts, seeds, p):
    hits = drawn(p, 0.3, 1000, prompts, seeds).reshape(1000, -1)
    assert coverage([intervals.clustered_rate(row, labels(prompts, seeds)) for row in hits], p) >= 0.92


def test_rates_of_prompts_with_unequal_seeds_are_covered():
    rng = np.random.default_rng(0)
    sizes = np.concatenate([[200], rng.integers(1, 20, 40)])
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    for p in (0.1, 0.5):
        hits = rng.random((1000, len(clusters))) < rng.beta(p * 7 / 3, (1 - p) * 7 / 3, (1000, len(sizes)))[:, clusters]
        assert coverage([intervals.clustered_rate(row, clusters) for row in hits], p) >= 0.92


def test_one_image_of_each_prompt_gives_the_plain_rate():
    hits = np.random.default_rng(0).random(60) < 0.2
    assert intervals.clustered_rate(hits, [f"prompt {i}" for i in range(60)]) == intervals.rate(hits.tolist())
    assert intervals.clustered_rate([True], ["one"]) == intervals.rate([True])


def test_the_design_effect_is_that_of_the_analysis_of_variance():
    groups = [[1, 1, 0, 1], [0, 0], [1, 1, 1], [0, 0, 0, 0, 1], [1]]
    hits = [hit for group in groups for hit in group]
    names = [name for name, group in zip("dbeac", groups, strict=True) for _ in group]
    n, k, share = len(hits), len(groups), sum(hits) / len(hits)
    between = sum(len(g) * (sum(g) / len(g) - share) ** 2 for g in groups) / (k - 1)
    within = sum((hit - sum(g) / len(g)) ** 2 for g in groups for hit in g) / (n - k)
    squares = sum(len(g) ** 2 for g in groups)
    typical = (n - squares / n) / (k - 1)
    icc = (between - within) / (between + (typical - 1) * within)
    assert 0 < icc < 1
    # Three of the prompts show a miss, the rarer value: two more than one. The supposed 0.3 weighs as much as two.
    icc = (2 * icc + 2 * 0.3) / 4
    effective = n / (1 + (squares / n - 1) * icc)
    t = intervals._student(n * n / squares - 1)
    middle, half = (
        share + t * t / (2 * effective),
        t * math.sqrt(share * (1 - share) / effective + (t / (2 * effective)) ** 2),
    )
    estimate = intervals.clustered_rate(hits, names)
    scale = 1 + t * t / effective
    assert (estimate.value, estimate.n) == (share, n)
    assert (estimate.low, estimate.high) == pytest.approx(((middle - half) / scale, (middle + half) / scale), rel=1e-12)


def test_images_that_are_all_alike_count_once_for_each_prompt():
    each = np.random.default_rng(0).random(400) < 0.3
    clustered = intervals.clustered_rate(np.repeat(each, 5), labels(400, 5))
    low, high = intervals.wilson(int(each.sum()), 400)
    assert (clustered.low, clustered.high) == pytest.approx((low, high), abs=0.001)


def test_no_hits_say_nothing_of_how_alike_a_prompts_images_are():
    none = intervals.clustered_rate([False] * 500, labels())
    t2 = intervals._student(49) ** 2
    assert (none.value, none.low, none.n) == (0, 0, 500)
    assert none.high == pytest.approx(t2 / (500 / (1 + 9 * 0.3) + t2))
    assert none.high > 3 * intervals.wilson(0, 500)[1]
    one = intervals.clustered_rate([True] + [False] * 499, labels())
    assert none.high < one.high  # a hit more is never better news
    every = intervals.clustered_rate([True] * 500, labels())
    assert (every.low, every.high) == pytest.approx((1 - none.high, 1)) and every.high == 1


def test_the_interval_is_never_narrower_than_students_of_independent_images():
    # Each prompt has exactly half its images hit: less different than by chance.
    hits = [True, False] * 250
    estimate = intervals.clustered_rate(hits, labels())
    assert estimate.high - estimate.low > np.diff(intervals.wilson(250, 500))[0]


def test_a_single_prompt_says_nothing_of_others():
    estimate = intervals.clustered_rate([True, False, False], ["a"] * 3)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (pytest.approx(1 / 3), 0, 1, 3)
    two = intervals.clustered_rate([True, False, False, False], list("aabb"))
    assert 0 < two.low < two.high < 1 and two.high - two.low > 0.9


def test_nothing_has_no_rate():
    assert intervals.clustered_rate([], []) is None
    assert intervals.any_of(np.zeros((0, 4), bool)) is None


@pytest.mark.parametrize(
    ("hits", "clusters", "message"),
    [
        ([True, False], ["a"], "one label"),
        ([True, False], [["a", "b"], ["a", "c"]], "one label"),
        ([0.5, 1.0], ["a", "b"], "true or false"),
        ([math.nan, 1.0], ["a", "b"], "finite"),
    ],
)
def test_wrong_hits_are_refused(hits, clusters, message):
    with pytest.raises(ValueError, match=message):
        intervals.clustered_rate(hits, clusters)


def test_any_of_k_counts_prompts():
    hits = np.zeros((40, 5), bool)
    hits[:10, 2] = hits[5:15, 4] = True
    estimate = intervals.any_of(hits)
    assert estimate == intervals.any_of(hits.tolist()) == intervals.rate([True] * 15 + [False] * 25)
    with pytest.raises(ValueError, match=r"\[prompts, k\]"):
        intervals.any_of([True, False])
    with pytest.raises(ValueError, match=r"k of 1"):
        intervals.any_of(np.zeros((3, 0), bool))


def test_any_of_k_is_covered_however_alike_the_images_are():
    p, icc = 0.1, 0.3
    a, b = p * (1 / icc - 1), (1 - p) * (1 / icc - 1)
    none = math.prod((b + i) / (a + b + i) for i in range(TEN))
    assert coverage(map(intervals.any_of, drawn(p, icc)), 1 - none) >= 0.92


def test_students_quantile():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 1.5, 2, 3, 7.25, 49, 999, 10_000, 1e6):
        assert intervals._student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-6)
