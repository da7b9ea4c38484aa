"""The paths between data and noise: x_t = alpha(l) x0 + sigma(l) eps at a noise level l, and what a network predicts.

A network output becomes the pair `(x0, eps)`. Samplers see only the pair and the path's coefficients, so they need not
know what the network predicts, nor along which path it was trained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float


@dataclass(frozen=True)
class Path:
    """How much of the image and of the noise x_t holds.

    level: what a noise level is, in the papers' terms.
    coefficients: noise levels (NumPy's or JAX's) -> (alpha, sigma).
    predictions: what networks trained along the path may predict.
    """

    name: str
    level: str
    coefficients: Callable[[Any], tuple[Any, Any]]
    predictions: tuple[str, ...]


def _vp(alpha_bar: Any) -> tuple[Any, Any]:
    xp = np if isinstance(alpha_bar, np.ndarray | float) else jnp
    return xp.sqrt(alpha_bar), xp.sqrt(1 - alpha_bar)


# Ho et al. 2020, Eq. 4. A level is alpha_bar: 1 for data, 0 for noise.
VARIANCE_PRESERVING = Path("variance-preserving", "alpha_bar", _vp, ("epsilon", "v_prediction", "sample"))
# Liu et al. 2023 (rectified flow), Lipman et al. 2023. A level is sigma: 0 for data, 1 for noise.
RECTIFIED_FLOW = Path("rectified flow", "sigma", lambda sigma: (1 - sigma, sigma), ("flow_prediction",))


def to_x0_eps(
    prediction: str,
    level: ArrayLike,
    x: Float[Array, "..."],
    output: Float[Array, "..."],
    path: Path = VARIANCE_PRESERVING,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Network output at `x` -> the clean image and the noise it implies, both shaped like `x`, float32 or wider.

    `x` is at the path's scale (what the network is shown); `level` is a scalar or broadcasts against it. Only "epsilon"
    divides by alpha and only "sample" by sigma. "v_prediction", v = alpha eps - sigma x0 (Salimans & Ho 2022, Sec. 4),
    is a rotation of the pair and stands any noise level, zero SNR included; so does "flow_prediction", the velocity
    v = eps - x0 of a straight path. Raises `ValueError` for what is not predicted along the path.
    """
    if prediction not in path.predictions:
        known = ", ".join(path.predictions)
        raise ValueError(f"unknown prediction_type {prediction!r}: known are {known} on the {path.name} path")
    dtype = float32_or_wider(x, output)
    x, output, level = (jnp.asarray(array, dtype) for array in (x, output, level))
    alpha, sigma = path.coefficients(level)
    if prediction == "epsilon":
        return (x - sigma * output) / alpha, output
    if prediction == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    if prediction == "sample":
        return output, (x - alpha * output) / sigma
    return x - sigma * output, x + alpha * output


def float32_or_wider(*arrays: ArrayLike) -> jnp.dtype:
    """The dtype in which noise levels are computed with."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
