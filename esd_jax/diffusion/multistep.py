"""The multistep solvers: LMS, DPM-Solver++(2M) and PLMS, as tables for the update of `solvers`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax.diffusion import grids
from esd_jax.diffusion.schedule import Schedule
from esd_jax.diffusion.solvers import Carry, Sampler, alpha_bar_at, check_tables, gather, linear, linear_in_sigma


def lms(schedule: Schedule, num_steps: int, spacing: str, karras: bool) -> Sampler:
    """Linear multistep of order 4: x + sum_k c_k eps_{i-k}, each c_k the integral of a Lagrange polynomial in sigma."""
    timesteps, sigmas = grids.sigma_grid(schedule, "lms", num_steps, spacing, karras)
    c = _adams_bashforth(sigmas, order=4)
    return linear_in_sigma("lms", schedule, timesteps, sigmas, spacing, b=sigmas[:-1] + c[:, 0], c=c[:, 1:])


def dpmpp_2m(
    schedule: Schedule, num_steps: int, spacing: str, karras: bool, solver_type: str, algorithm_type: str
) -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2), with lambda = log(alpha / sigma) and h = lambda' - lambda:

    x' = (sigma' / sigma) x + alpha' (1 - e^-h) (m_i + h / (2 h_prev) (m_i - m_{i-1})),        m = x0.

    As x = alpha x0 + sigma eps, its first-order part is a DDIM step. SDE-DPM-Solver++(2M) (their App. A) has e^-2h in
    place of e^-h, and e^-h before what is left of x; noise of variance sigma'^2 (1 - e^-2h) makes up for it.
    """
    noisy = algorithm_type == "sde-dpmsolver++"
    timesteps, sigmas = grids.dpm_grid(schedule, "dpmpp_2m", num_steps, spacing, karras)
    num_steps = len(timesteps)
    now, then = sigmas[:-1], sigmas[1:]  # the paper's sigma / alpha: lambda = -log(now)
    alpha = 1 / np.sqrt(1 + then**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(now / then)
        growth = h / np.concatenate([h[:1], h[:-1]])
        decay = then / now  # e^-h
        scale = 2 if noisy else 1
        gone = 1 - decay**scale
        if solver_type == "midpoint":
            second = alpha * gone / 2 * growth
        else:  # heun
            second = alpha * (1 - gone / (scale * h)) * growth
    second[0] = 0  # nothing to remember yet
    few = schedule.option("lower_order_final", True) and num_steps < 15
    if few or schedule.option("euler_at_final", False) or then[-1] == 0:
        second[-1] = 0
    return linear(
        "dpmpp_2m",
        schedule,
        timesteps,
        1 / (1 + now**2),
        a=alpha + second,
        b=alpha * then * (decay if noisy else 1),
        c=-second[:, None],
        d=alpha * then * np.sqrt(gone) if noisy else None,
        remember="x0",
    )


def pndm(schedule: Schedule, num_steps: int, spacing: str) -> Sampler:
    """PLMS: Liu et al. 2022 without its Runge-Kutta start, which a second call at the second timestep replaces (Heun).

    A DDIM step (their Eq. 9) with the network's output averaged over the last four calls (Eq. 12). Call 1 repeats the
    first step with the mean of both outputs: it restarts from the x of call 0, and its output is not remembered.
    """
    num_train = schedule.num_train_timesteps
    stride = num_train // num_steps
    offset = schedule.option("steps_offset", 0)
    grid = grids.spaced_timesteps(spacing, num_steps, num_train, offset=offset).round().astype(int)
    timesteps = np.insert(grid, 1, grid[1:2])
    start, end = timesteps.copy(), timesteps - stride
    start[1:2], end[1:2] = timesteps[1:2] + stride, timesteps[1:2]
    grids.check_timesteps(np.concatenate([timesteps, start]), schedule, "pndm")
    final = 1.0 if schedule.option("set_alpha_to_one", False) else schedule.alpha_bar[0]
    now, then = schedule.alpha_bar[start], alpha_bar_at(schedule, end, final)
    grids.check_signal(start, now, "pndm")

    weights = np.tile(np.array([55, -59, 37, -9]) / 24, (len(timesteps), 1))
    beginning = [[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]]
    weights[:4] = beginning[: len(timesteps)]
    a, b = np.sqrt(then), np.sqrt(1 - then)

    def init(x: Array) -> Carry:
        return (x, x, *[jnp.zeros_like(x)] * 3)  # x, the x of the call before, three past outputs

    def step(carry: Carry, i: Array, output: Array, noise: Array | None) -> Carry:
        x, x_before, *past = carry
        at = gather(i, x.dtype)
        output = output.astype(x.dtype)
        x = jnp.where(i == 1, x_before, x)
        mean = at(weights[:, 0]) * output + sum(at(weights[:, k + 1]) * past[k] for k in range(3))
        x0, eps = schedule.to_x0_eps(at(now), x, mean)
        newer = [output, *past[:-1]]
        past = [jnp.where(i == 1, old, new) for old, new in zip(past, newer, strict=True)]
        return (at(a) * x0 + at(b) * eps, x, *past)

    check_tables("pndm", now, a, b)
    return Sampler("pndm", timesteps, 1.0, np.ones(len(timesteps)), False, init, step)


def _adams_bashforth(sigmas: np.ndarray, order: int) -> np.ndarray:
    """[n, order]: c_k = integral from sigma_i to sigma_{i+1} of the Lagrange polynomial that is 1 at sigma_{i-k}."""
    points, weights = np.polynomial.legendre.leggauss(order // 2 + 1)  # exact for polynomials of this order
    table = np.zeros((len(sigmas) - 1, order))
    for i in range(len(table)):
        past = sigmas[max(0, i - order + 1) : i + 1][::-1]  # newest first
        half = (sigmas[i + 1] - sigmas[i]) / 2
        tau = sigmas[i] + half * (1 + points)[:, None]
        for k, sigma in enumerate(past):
            others = np.delete(past, k)
            with np.errstate(divide="ignore", invalid="ignore"):
                lagrange = np.prod((tau - others) / (sigma - others), axis=1)
            table[i, k] = half * weights @ lagrange
    return table
