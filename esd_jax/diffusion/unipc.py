"""UniPC (Zhao et al. 2023, B(h) versions, predicting x0): a multistep solver that corrects each step by the next call.

With lambda = log(alpha / sigma), h = lambda' - lambda and m the x0 that a call of the network implies, a step is

    x' = (sigma' / sigma) x - alpha' (e^-h - 1) m_i - alpha' B sum_k rho_k (m_{i-k} - m_i) / r_k,

where r_k h is how far back lambda_{i-k} lies and B is -h (bh1) or e^-h - 1 (bh2). It is taken twice: by the predictor,
which knows k = 1, 2, ... alone, and, once the network was called at x', by the corrector, for which that call is one
more k with r = 1. The network never sees a corrected x.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax.diffusion import grids
from esd_jax.diffusion.schedule import Schedule
from esd_jax.diffusion.solvers import Carry, Sampler, check_tables, gather

MOST_ORDER = 3  # what the paper and diffusers go up to


def unipc(schedule: Schedule, num_steps: int, spacing: str, karras: bool, solver_type: str) -> Sampler:
    """UniPC of the config's `solver_order`, its first steps and, with `lower_order_final`, its last of lower order."""
    order, disabled = schedule.option("solver_order", 2), schedule.option("disable_corrector", [])
    if not 1 <= order <= MOST_ORDER:
        raise ValueError(f"solver_order={order} is not implemented for sampler 'unipc' (only 1 to {MOST_ORDER})")
    if schedule.option("solver_p", None) is not None:
        raise ValueError("solver_p is not implemented for sampler 'unipc': use another sampler")
    if not isinstance(disabled, list | tuple) or not all(isinstance(i, int) and i >= 0 for i in disabled):
        raise ValueError(f"disable_corrector={disabled!r} must be a list of steps, such as [0, 1]; [] for none")
    final = schedule.option("lower_order_final", True)
    timesteps, sigmas = grids.dpm_grid(schedule, "unipc", num_steps, spacing, karras)
    n = len(timesteps)
    if sigmas[-1] == 0 and min(order, n) > 1 and not final:
        raise ValueError(
            f"sampler 'unipc' cannot end at noise 0 by a step of order {min(order, n)}: set lower_order_final to true "
            "in the scheduler config, or use another sampler (--sampler=)"
        )
    # x is a combination of x (0), the last corrected x (1), and m_i, m_{i-1}, ... (2, 3, ...)
    correct, predict = np.zeros((n, 2 + order + 1)), np.zeros((n, 2 + order))
    correct[:, 0] = 1
    used = 0
    for i in range(n):
        if i and i - 1 not in disabled:
            x, now, past = _update(sigmas, i - 1, used, solver_type, corrects=True)
            correct[i] = 0
            correct[i, 1], correct[i, 2], correct[i, 3 : 3 + used] = x, now, past
        used = min(order, i + 1)
        if final:
            used = min(used, n - i)
        x, _, past = _update(sigmas, i, used, solver_type, corrects=False)
        predict[i, 0], predict[i, 2 : 2 + used] = x, past
    now = 1 / (1 + sigmas[:-1] ** 2)
    check_tables("unipc", now, correct, predict)

    def init(x: Array) -> Carry:
        return (x, x, *[jnp.zeros_like(x)] * order)

    def step(carry: Carry, i: Array, output: Array, noise: Array | None) -> Carry:
        x, last, *past = carry
        at = gather(i, x.dtype)
        x0, _ = schedule.to_x0_eps(at(now), x, output.astype(x.dtype))
        known = [x0, *past]
        corrected = at(correct[:, 0]) * x + at(correct[:, 1]) * last
        corrected += sum(at(correct[:, 2 + k]) * m for k, m in enumerate(known))
        x = at(predict[:, 0]) * corrected + sum(at(predict[:, 2 + k]) * m for k, m in enumerate(known[:order]))
        return (x, corrected, *known[:order])

    return Sampler("unipc", timesteps, 1.0, np.ones(n), False, init, step)


def _update(
    sigmas: np.ndarray, i: int, order: int, solver_type: str, *, corrects: bool
) -> tuple[float, float, np.ndarray]:
    """The coefficients of a step from noise level i: of x, of the call at its end, and of m_i, m_{i-1}, ... [order]."""
    now, then = sigmas[i], sigmas[i + 1]
    alpha = 1 / math.sqrt(1 + then**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(now / then)
        phi = np.expm1(-h)
        r = np.append([np.log(now / sigmas[i - k]) / h for k in range(1, order)], 1.0)
        step = phi if solver_type == "bh2" else -h
        target, rhs = phi / -h - 1, []
        for k in range(1, order + 1):
            rhs.append(target * math.factorial(k) / step)
            target = target / -h - 1 / math.factorial(k + 1)
    rhos = np.zeros(order)
    if corrects:
        rhos = np.array([0.5]) if order == 1 else _solve(r, rhs)
    elif order == 2:
        rhos[0] = 0.5  # the paper's simplification, as for the corrector of order 1
    elif order > 2:
        rhos[:-1] = _solve(r[:-1], rhs[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(rhos == 0, 0.0, -alpha * step * rhos / r)
    past = np.append(-alpha * phi - weights.sum(), weights[:-1])
    return alpha * math.sqrt(1 + now**2) * then / now, weights[-1], past


def _solve(r: np.ndarray, rhs: list[float]) -> np.ndarray:
    """rho of sum_k rho_k r_k^(j - 1) = rhs_j (their Eq. 5)."""
    try:
        return np.linalg.solve(np.vander(r, increasing=True).T, rhs)
    except np.linalg.LinAlgError:  # two calls at one noise level, which `check_tables` reports
        return np.full(len(r), np.nan)
