"""How far apart two sets of features are: the Fréchet distance (FID, of Inception's features) and the kernel distance.

Both are of features [images, dimensions] from any network; only with the published network, weights and resizing do
they bear the published names.
"""

import numpy as np
from jaxtyping import Float, Shaped

from esd_jax.metrics.intervals import Estimate, Z


def frechet(a: Shaped[np.ndarray, "n d"], b: Shaped[np.ndarray, "m d"]) -> float:
    """Fréchet distance of the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6); unbiased covariances.

    |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2)). It has no interval: it falls as n grows, so
    that only distances of equally many images can be compared.

    Raises ValueError for features that are not [n, d] alike, fewer than 2 images, or values that are not finite.
    """
    a, b = _features("a", a), _features("b", b)
    _alike(a, b)
    (mean_a, root_a), (mean_b, root_b) = _gaussian(a), _gaussian(b)
    # With cov = rootᵀ root, the eigenvalues of cov_a cov_b are the squared singular values of root_a root_bᵀ. No root
    # of a rounded eigenvalue is taken, which matters where n < d leaves thousands of them at 0.
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * shared
    return max(float(distance), 0.0)


def kid(
    a: Shaped[np.ndarray, "n d"],
    b: Shaped[np.ndarray, "m d"],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Kernel distance (Bińkowski et al. 2018, section 4): unbiased MMD^2 with the kernel (x·y / d + 1)^3.

    Args:
      a, b: features.
      subsets: how many pairs of subsets are drawn, each without replacement.
      subset_size: images in each.
      seed: of the draws.

    Returns:
      The mean over subsets. The bounds are 1.96 standard deviations over subsets from it, of the kind that the usual
      libraries report (ddof 0): what measurements on `subset_size` images would vary by. As subset_size nears the
      number of images the subsets coincide and the bounds mean nothing: take at most half. n: of the smaller set.

    Raises ValueError as `frechet` does, and for subsets that are larger than a set, or of fewer than 2 images.
    """
    a, b = _features("a", a), _features("b", b)
    _alike(a, b)
    n = min(len(a), len(b))
    if not 2 <= subset_size <= n:
        raise ValueError(f"subset_size={subset_size} with {n} images: set subset_size between 2 and {n}")
    if subsets < 1:
        raise ValueError(f"subsets={subsets} must be at least 1")
    rng = np.random.default_rng(seed)
    values = [
        _mmd2(*(x[rng.choice(len(x), subset_size, replace=False, shuffle=False)] for x in (a, b)))
        for _ in range(subsets)
    ]
    value, half = float(np.mean(values)), Z * float(np.std(values))
    return Estimate(value, value - half, value + half, n)


def _mmd2(x: Float[np.ndarray, "size d"], y: Float[np.ndarray, "size d"]) -> float:
    """The unbiased estimator (Gretton et al. 2012, eq. 3): an image is not compared with itself."""
    size, d = x.shape

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / d + 1) ** 3

    def within(p: np.ndarray) -> float:
        k = kernel(p, p)
        return (k.sum() - np.trace(k)) / (size * (size - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def _gaussian(x: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "r d"]]:
    """The mean, and a root of the covariance: rootᵀ root = cov, of as many rows as n or d, whichever is less."""
    middle = x.mean(axis=0)
    return middle, np.linalg.qr(x - middle, mode="r") / np.sqrt(len(x) - 1)


def _features(name: str, x: Shaped[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2 or x.shape[1] == 0:
        raise ValueError(f"features {name} of shape {x.shape} must be [images, dimensions], of 2 images at least")
    if not np.isfinite(x).all():
        raise ValueError(f"features {name} are not all finite: leave out the images that the network fails on")
    return x


def _alike(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features a have {a.shape[1]} dimensions and b {b.shape[1]}: take both from one network")
