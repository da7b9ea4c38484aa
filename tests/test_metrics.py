"""Intervals hold the truth as often as they say, on simulated draws; distances of features against their formulas."""

import math

import numpy as np
import pytest

from esd_jax.metrics import distance, intervals

REPEATS = 2000
FIFTY, TEN = 50, 10  # prompts, and seeds of each


def drawn(p, correlation, repeats=REPEATS, prompts=FIFTY, seeds=TEN, seed=0):
    """Beta-binomial hits [repeats, prompts, seeds]: each prompt has a rate of its own."""
    rng = np.random.default_rng(seed)
    each = rng.beta(p * (1 / correlation - 1), (1 - p) * (1 / correlation - 1), (repeats, prompts, 1))
    return rng.random((repeats, prompts, seeds)) < each


def labels(prompts=FIFTY, seeds=TEN):
    return np.repeat(np.arange(prompts), seeds)


def coverage(found, truth):
    return np.mean([estimate.low <= truth <= estimate.high for estimate in found])


# --- rates


@pytest.mark.parametrize("n", [200, 1000])
@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.95])
def test_independent_rates_are_covered(p, n):
    hits = np.random.default_rng(0).binomial(n, p, REPEATS)
    found = {count: intervals.rate([True] * count + [False] * (n - count)) for count in set(hits.tolist())}
    assert coverage([found[count] for count in hits.tolist()], p) >= 0.93


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
    found = intervals.clustered_rate(hits, names)
    scale = 1 + t * t / effective
    assert (found.value, found.n) == (share, n)
    assert (found.low, found.high) == pytest.approx(((middle - half) / scale, (middle + half) / scale), rel=1e-12)


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
    found = intervals.clustered_rate(hits, labels())
    assert found.high - found.low > np.diff(intervals.wilson(250, 500))[0]


def test_a_single_prompt_says_nothing_of_others():
    found = intervals.clustered_rate([True, False, False], ["a"] * 3)
    assert (found.value, found.low, found.high, found.n) == (pytest.approx(1 / 3), 0, 1, 3)
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
    found = intervals.any_of(hits)
    assert found == intervals.any_of(hits.tolist()) == intervals.rate([True] * 15 + [False] * 25)
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


# --- differences


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
    found = [
        intervals.paired_difference(a, b, labels(), resamples=400)
        for a, b in zip(*pairs(after, before, 0.3, REPEATS), strict=True)
    ]
    assert coverage(found, after - before) >= 0.93
    assert np.mean([estimate.value for estimate in found]) == pytest.approx(after - before, abs=0.005)


@pytest.mark.parametrize(("prompts", "seeds"), [(8, 10), (200, 1)])
def test_differences_of_few_prompts_and_of_single_seeds_are_covered(prompts, seeds):
    found = [
        intervals.paired_difference(a, b, labels(prompts, seeds), resamples=400)
        for a, b in zip(*pairs(0.3, 0.5, 0.3, 1000, prompts, seeds), strict=True)
    ]
    assert coverage(found, -0.2) >= 0.93


@pytest.mark.parametrize("prompts", [8, 50])
def test_differences_of_other_values_are_covered(prompts):
    rng = np.random.default_rng(0)
    each = 0.5 * rng.standard_normal((REPEATS, prompts, 1))
    a = (0.1 + each + rng.standard_normal((REPEATS, prompts, 5))).reshape(REPEATS, -1)
    b = rng.standard_normal(a.shape[1])
    found = [intervals.paired_difference(row + b, b, labels(prompts, 5), resamples=1000) for row in a]
    assert coverage(found, 0.1) >= 0.93


def test_many_single_differences_have_the_interval_of_bonett_and_price():
    lost, won, n = 60, 12, 400
    a, b = np.zeros((2, n))
    b[:lost], a[lost : lost + won] = 1, 1
    found = intervals.paired_difference(a, b, range(n), resamples=20_000)
    p, q = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    half = 1.96 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    assert found.value == pytest.approx((won - lost) / n)
    assert (found.low, found.high) == pytest.approx((q - p - half, q - p + half), abs=0.03 * half)


def test_the_difference_of_other_values_has_students_interval():
    a = np.random.default_rng(0).normal(size=12)
    found = intervals.paired_difference(a, np.zeros(12), list("abcdefghijkl"), resamples=50_000)
    half = 2.201 * a.std(ddof=1) / math.sqrt(12)
    assert (found.low, found.high) == pytest.approx((a.mean() - half, a.mean() + half), abs=0.08 * half)


def test_models_that_never_differ_still_have_an_interval():
    same = np.zeros(500)
    found = intervals.paired_difference(same, same, labels())
    assert found.value == 0 and -0.04 < found.low < -0.01 and found.high == pytest.approx(-found.low, rel=0.15)
    values = np.full(500, 0.7)  # no hits: nothing is known of how much they could differ
    found = intervals.paired_difference(values, values, labels())
    assert (found.low, found.value, found.high) == (0, 0, 0)


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
    found = intervals.paired_difference([1, 1, 0], [0, 0, 0], ["a"] * 3)
    assert (found.value, found.low, found.high) == (pytest.approx(2 / 3), -1, 1)
    found = intervals.paired_difference([0.4, 1.6], [0, 0], ["a"] * 2)
    assert (found.value, found.low, found.high) == (1, -math.inf, math.inf)


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


# --- distances


def features(n, d, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 80, 8), (40, 30, 24)])
def test_frechet_is_its_formula(n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = features(n, d), features(m, d, seed=1, scale=0.5)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    assert distance.frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_fewer_images_than_dimensions():
    # Both sets vary along axes alone, each of which has its variance: the roots are known.
    a, b = np.zeros((2, 5, 512))
    a[:2, 0], a[2:4, 1], b[:2, 0], b[2:4, 7] = (3, -3), (1, -1), (5, -5), (2, -2)
    b[:, 9] = 2.5
    assert distance.frechet(a, b) == pytest.approx(2.5**2 + ((5 - 3) ** 2 + 1 + 2**2) / 2, rel=1e-13)


@pytest.mark.parametrize(("n", "d"), [(50, 8), (20, 300)])
def test_frechet_is_symmetric_and_zero_of_equal_sets(n, d):
    a, b = features(n, d), features(n + 7, d, seed=1)
    assert distance.frechet(a, b) == pytest.approx(distance.frechet(b, a), rel=1e-12)
    assert 0 <= distance.frechet(a, a[::-1]) < 1e-12 * np.sum(a**2)
    assert distance.frechet(a, a + 0.5) == pytest.approx(0.25 * d, rel=1e-9)
    assert distance.frechet(a.astype(np.float32), b) == pytest.approx(distance.frechet(a, b), rel=1e-5)


def kernel_distance(x, y):
    """The double sums as they are written."""
    d = x.shape[1]

    def k(p, q):
        return (sum(u * v for u, v in zip(p, q, strict=True)) / d + 1) ** 3

    def within(s):
        return sum(k(p, q) for i, p in enumerate(s) for j, q in enumerate(s) if i != j) / (len(s) * (len(s) - 1))

    return within(x) + within(y) - 2 * sum(k(p, q) for p in x for q in y) / (len(x) * len(y))


def test_kid_is_its_formula():
    a, b = features(12, 5), features(12, 5, seed=1)
    found = distance.kid(a, b, subsets=3, subset_size=12)
    assert found.value == pytest.approx(kernel_distance(a, b), rel=1e-12) and found.n == 12
    # Any two images of three: three subsets, which each come a third of the times.
    few = a[:3]
    parts = [kernel_distance(few[[i, j]], b[[0, 1]]) for i, j in ((0, 1), (0, 2), (1, 2))]
    found = distance.kid(few, b[:2], subsets=4000, subset_size=2)
    assert found.value == pytest.approx(np.mean(parts), abs=4 * np.std(parts) / math.sqrt(4000))
    half = 1.96 * np.std(parts)
    assert (found.high - found.value, found.value - found.low) == pytest.approx((half, half), rel=0.05)


def test_kid_is_unbiased_and_repeats_by_its_seed():
    rng = np.random.default_rng(0)
    d = 6
    a, b = rng.standard_normal((2, 2000, d))
    few = {"subsets": 30, "subset_size": 200}
    same = distance.kid(a, b, **few)
    assert same.low < 0 < same.high and same == distance.kid(a, b, **few)
    assert same != distance.kid(a, b, **few, seed=1)
    # Of N(0, 1) and N(1, 1) the kernel's means follow from the moments of x·y / d up to the third.
    far = distance.kid(a, b + 1, **few)
    assert far.value == pytest.approx((8 + 18 / d + 6 / d**2) + (1 + 3 / d) - 2 * (1 + 6 / d), rel=0.05)


def test_distances_equal_torchmetrics():
    """Where it is installed: its metrics, of features that are the flattened images."""
    torch = pytest.importorskip("torch")
    fid, kid = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))

    class Flatten(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1).double()

    a, b = (np.random.default_rng(seed).random((40, 3, 2, 2)) for seed in (0, 1))
    b = 0.7 * b
    flat = [x.reshape(40, -1) for x in (a, b)]
    for metric, found in (
        (fid.FrechetInceptionDistance(feature=Flatten(), normalize=True), distance.frechet(*flat)),
        (
            kid.KernelInceptionDistance(feature=Flatten(), normalize=True, subsets=1, subset_size=40),
            distance.kid(*flat, subsets=1, subset_size=40).value,
        ),
    ):
        metric = metric.set_dtype(torch.float64)
        metric.update(torch.from_numpy(a), real=True)
        metric.update(torch.from_numpy(b), real=False)
        expected = metric.compute()
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert found == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), "from one network"),
        (np.zeros((1, 4)), np.zeros((3, 4)), "features a .* 2 images"),
        (np.zeros((3, 4)), np.zeros(4), "features b"),
        (np.zeros((3, 4)), np.full((3, 4), math.nan), "features b are not all finite"),
    ],
)
def test_wrong_features_are_refused(a, b, message):
    for metric in (distance.frechet, lambda x, y: distance.kid(x, y, subset_size=2)):
        with pytest.raises(ValueError, match=message):
            metric(a, b)


def test_subsets_beyond_the_images_are_refused():
    a = np.zeros((30, 4))
    for options, message in (
        ({}, "set subset_size between 2 and 30"),
        ({"subset_size": 1}, "between 2 and 30"),
        ({"subset_size": 5, "subsets": 0}, "subsets=0"),
    ):
        with pytest.raises(ValueError, match=message):
            distance.kid(a, a, **options)
