"""Distances of features against their formulas."""

import math

import numpy as np
import pytest

from esd_jax.metrics import distance


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
    actual = distance.kid(a, b, subsets=3, subset_size=12)
    assert actual.value == pytest.approx(kernel_distance(a, b), rel=1e-12) and actual.n == 12
    # Any two images of three: three subsets, which each come a third of the times.
    few = a[:3]
    parts = [kernel_distance(few[[i, j]], b[[0, 1]]) for i, j in ((0, 1), (0, 2), (1, 2))]
    actual = distance.kid(few, b[:2], subsets=1500, subset_size=2)
    assert actual.value == pytest.approx(np.mean(parts), abs=4 * np.std(parts) / math.sqrt(1500))
    half = 1.96 * np.std(parts)
    assert (actual.high - actual.value, actual.value - actual.low) == pytest.approx((half, half), rel=0.05)


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
    for metric, value in (
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
        assert value == pytest.approx(float(expected), rel=1e-6)


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
