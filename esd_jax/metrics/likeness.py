"""How like one image is to another."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8


def ssim(
    a: UInt8[np.ndarray, "n height width 3"], b: UInt8[np.ndarray, "n height width 3"], window: int = 7
) -> Float[np.ndarray, " n"]:
    """Structural similarity of image pairs: 1 is equal (Wang et al. 2004, eq. 13).

    Uniform square windows that lie within the image, unbiased variances, K = 0.01 and 0.03; the mean over windows and
    the three channels, so that a change of colour at equal brightness counts.

    Raises ValueError for images that are smaller than a window.
    """
    if min(np.shape(a)[1:3]) < window:
        raise ValueError(f"images of {np.shape(a)[1]} x {np.shape(a)[2]} pixels are smaller than a window of {window}")
    return np.asarray(_ssim(a, b, window), np.float64)


@partial(jax.jit, static_argnums=2)
def _ssim(a: jax.Array, b: jax.Array, window: int) -> jax.Array:
    c1, c2 = 0.01**2, 0.03**2

    def average(x: jax.Array) -> jax.Array:
        # Rows, then columns: fewer sums, and shorter ones, which round less.
        for shape in ((window, 1, 1), (1, window, 1)):
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, (1, 1, 1), "VALID") / window
        return x

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        # About 0, where the variances of float32 are most exact.
        x, y = (image.astype(jnp.float32) / 255 - 0.5 for image in pair)
        mx, my = average(x), average(y)
        unbiased = window**2 / (window**2 - 1)
        vx, vy, cov = (unbiased * (average(p * q) - average(p) * average(q)) for p, q in ((x, x), (y, y), (x, y)))
        mx, my = mx + 0.5, my + 0.5
        return jnp.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))

    return jax.lax.map(one, (a, b), batch_size=32)
