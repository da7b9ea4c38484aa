"""The seven solvers, each a table of coefficients computed on the host in float64.

With (x0_i, eps_i) read off the network's output at step i, every one of them is

    x_{i+1} = a_i x0_i + b_i eps_i + sum_k c_ik m_{i-k} + d_i z_i,        k = 1, 2, ...

where z is fresh noise and m what the solver remembers: nothing (DDIM, Euler, LCM), eps (LMS) or x0 (DPM-Solver++). PLMS
remembers raw network outputs and averages them before it reads off the pair.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax.diffusion import grids
from esd_jax.diffusion.schedule import Schedule, to_x0_eps

Carry = tuple[Array, ...]


@dataclass(frozen=True, eq=False)
class Sampler:
    """One sampler on one grid. `i` counts network calls, 0 = pure noise; every table is indexed by it."""

    name: str
    timesteps: (
        np.ndarray
    )  # [n]: what the network is told at step i; fractional for Euler and LMS with linspace or Karras
    initial_scale: float  # unit Gaussian noise times this is the first x
    input_scale: np.ndarray  # float64 [n]: the network sees x * input_scale[i]
    stochastic: bool  # whether `step` uses its noise
    init: Callable[[Array], Carry]  # x -> carry, whose first element is x
    step: Callable[[Carry, Array, Array, Array | None], Carry]  # (carry, i, output, noise) -> carry


def ddim(schedule: Schedule, num_steps: int, spacing: str, eta: float) -> Sampler:
    """DDIM (Song et al. 2021): x' = sqrt(alpha_bar') x0 + sqrt(1 - alpha_bar' - s^2) eps + s z (Eq. 12).

    Every step goes down by num_train // num_steps, as in diffusers. Where the grid has another stride ("linspace", or
    "trailing" with a num_steps that does not divide num_train), x lands a little beside its next entry.
    """
    offset = schedule.option("steps_offset", 0)
    num_train = schedule.num_train_timesteps
    timesteps = grids.spaced_timesteps(spacing, num_steps, num_train, offset=offset).round().astype(int)
    grids.check_timesteps(timesteps, schedule, "ddim")
    now = schedule.alpha_bar[timesteps]
    if schedule.prediction_type == "epsilon":
        grids.check_signal(timesteps, now, "ddim")
    final = 1.0 if schedule.option("set_alpha_to_one", True) else schedule.alpha_bar[0]
    then = _alpha_bar_at(schedule, timesteps - num_train // num_steps, final)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)  # Eq. 16
    clip = schedule.option("clip_sample_range", 1.0) if schedule.option("clip_sample", True) else None
    return _linear(
        "ddim",
        schedule,
        timesteps,
        now,
        a=np.sqrt(then),
        b=np.sqrt(1 - then - variance),
        d=np.sqrt(variance) if eta > 0 else None,
        clip=clip,
    )


def euler(schedule: Schedule, num_steps: int, spacing: str, karras: bool) -> Sampler:
    """Euler's method on dx = eps dsigma (Karras et al. 2022, Algorithm 1 without its corrector).

    x' = x + (sigma' - sigma) eps = x0 + sigma' eps
    """
    timesteps, sigmas = grids.sigma_grid(schedule, "euler", num_steps, spacing, karras)
    return _linear_in_sigma("euler", schedule, timesteps, sigmas, spacing, b=sigmas[1:])


def euler_ancestral(schedule: Schedule, num_steps: int, spacing: str) -> Sampler:
    """Euler down to sigma_down, then noise back up to sigma' (DDPM's posterior at the variance-exploding scale)."""
    timesteps, sigmas = grids.sigma_grid(schedule, "euler_ancestral", num_steps, spacing, karras=False)
    now, then = sigmas[:-1], sigmas[1:]
    down, up = then**2 / now, then * np.sqrt(1 - (then / now) ** 2)  # down^2 + up^2 = then^2
    return _linear_in_sigma("euler_ancestral", schedule, timesteps, sigmas, spacing, b=down, d=up)


def lms(schedule: Schedule, num_steps: int, spacing: str, karras: bool) -> Sampler:
    """Linear multistep of order 4: x + sum_k c_k eps_{i-k}, each c_k the integral of a Lagrange polynomial in sigma."""
    timesteps, sigmas = grids.sigma_grid(schedule, "lms", num_steps, spacing, karras)
    c = _adams_bashforth(sigmas, order=4)
    return _linear_in_sigma("lms", schedule, timesteps, sigmas, spacing, b=sigmas[:-1] + c[:, 0], c=c[:, 1:])


def dpmpp_2m(schedule: Schedule, num_steps: int, spacing: str, karras: bool) -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2), with lambda = log(alpha / sigma) and h = lambda' - lambda:

    x' = (sigma' / sigma) x + alpha' (1 - e^-h) (m_i + h / (2 h_prev) (m_i - m_{i-1})),        m = x0.

    As x = alpha x0 + sigma eps, its first-order part is a DDIM step.
    """
    timesteps, sigmas = grids.dpm_grid(schedule, num_steps, spacing, karras)
    num_steps = len(timesteps)
    now, then = sigmas[:-1], sigmas[1:]  # the paper's sigma / alpha: lambda = -log(now)
    alpha = 1 / np.sqrt(1 + then**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(now / then)
        growth = h / np.concatenate([h[:1], h[:-1]])
        decay = then / now  # e^-h
        if schedule.option("solver_type", "midpoint") == "midpoint":
            second = alpha * (1 - decay) / 2 * growth
        else:  # heun
            second = alpha * (1 - (1 - decay) / h) * growth
    second[0] = 0  # nothing to remember yet
    few = schedule.option("lower_order_final", True) and num_steps < 15
    if few or schedule.option("euler_at_final", False) or then[-1] == 0:
        second[-1] = 0
    return _linear(
        "dpmpp_2m",
        schedule,
        timesteps,
        1 / (1 + now**2),
        a=alpha + second,
        b=alpha * then,
        c=-second[:, None],
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
    now, then = schedule.alpha_bar[start], _alpha_bar_at(schedule, end, final)
    grids.check_signal(start, now, "pndm")

    weights = np.tile(np.array([55, -59, 37, -9]) / 24, (len(timesteps), 1))
    beginning = [[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]]
    weights[:4] = beginning[: len(timesteps)]
    a, b = np.sqrt(then), np.sqrt(1 - then)

    def init(x: Array) -> Carry:
        return (x, x, *[jnp.zeros_like(x)] * 3)  # x, the x of the call before, three past outputs

    def step(carry: Carry, i: Array, output: Array, noise: Array | None) -> Carry:
        x, x_before, *past = carry
        at = _gather(i, x.dtype)
        output = output.astype(x.dtype)
        x = jnp.where(i == 1, x_before, x)
        mean = at(weights[:, 0]) * output + sum(at(weights[:, k + 1]) * past[k] for k in range(3))
        x0, eps = to_x0_eps(schedule.prediction_type, at(now), x, mean)
        newer = [output, *past[:-1]]
        past = [jnp.where(i == 1, old, new) for old, new in zip(past, newer, strict=True)]
        return (at(a) * x0 + at(b) * eps, x, *past)

    _check_finite("pndm", now, a, b)
    return Sampler("pndm", timesteps, 1.0, np.ones(len(timesteps)), False, init, step)


def lcm(schedule: Schedule, num_steps: int) -> Sampler:
    """Multistep consistency sampling (Luo et al. 2023, Algorithm 3): a finished image, noised anew for the next step.

    x' = sqrt(alpha_bar') f + sqrt(1 - alpha_bar') z,      f = c_out x0 + c_skip x,      after the last step x' = f,

    with the boundary conditions c of consistency models (Song et al. 2023, App. C) at 10 t. The grid is a part of the
    `original_inference_steps` (50) that the network was distilled on. Raises ValueError for more steps than those.
    """
    original, num_train = schedule.option("original_inference_steps", 50), schedule.num_train_timesteps
    if not num_steps <= original <= num_train:
        raise ValueError(f"sampler 'lcm' makes at most {original} steps (original_inference_steps), not {num_steps}")
    distilled = np.arange(1, original + 1)[::-1] * (num_train // original) - 1
    timesteps = distilled[np.linspace(0, original, num_steps, endpoint=False).astype(int)]
    now = schedule.alpha_bar[timesteps]
    if schedule.prediction_type == "epsilon":
        grids.check_signal(timesteps, now, "lcm")
    then = np.append(schedule.alpha_bar[timesteps[1:]], 1.0)
    scaled, data = timesteps * schedule.option("timestep_scaling", 10.0), 0.5
    skip, out = data**2 / (scaled**2 + data**2), scaled / np.sqrt(scaled**2 + data**2)
    return _linear(
        "lcm",
        schedule,
        timesteps,
        now,
        a=np.sqrt(then) * (out + skip * np.sqrt(now)),  # x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
        b=np.sqrt(then) * skip * np.sqrt(1 - now),
        d=np.sqrt(1 - then),
    )


def _linear(
    name: str,
    schedule: Schedule,
    timesteps: np.ndarray,
    alpha_bar: np.ndarray,
    *,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray | None = None,
    d: np.ndarray | None = None,
    remember: str = "eps",
    clip: float | None = None,
    initial_scale: float = 1.0,
    input_scale: np.ndarray | None = None,
) -> Sampler:
    """The common update (see the top of this file). a, b, d are [n], c is [n, what is remembered]; None means zero."""
    n = len(timesteps)
    c = np.zeros((n, 0)) if c is None else c
    input_scale = np.ones(n) if input_scale is None else input_scale
    _check_finite(name, alpha_bar, a, b, c, *([] if d is None else [d]))

    def init(x: Array) -> Carry:
        return (x, *[jnp.zeros_like(x)] * c.shape[1])

    def step(carry: Carry, i: Array, output: Array, noise: Array | None) -> Carry:
        x, *past = carry
        at = _gather(i, x.dtype)
        output = output.astype(x.dtype)
        x0, eps = to_x0_eps(schedule.prediction_type, at(alpha_bar), x * at(input_scale), output)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
        x = at(a) * x0 + at(b) * eps
        for k, m in enumerate(past):
            x += at(c[:, k]) * m
        if d is not None:
            x += at(d) * noise.astype(x.dtype)
        newest = x0 if remember == "x0" else eps
        return (x, *[newest, *past][: len(past)])

    return Sampler(name, timesteps, initial_scale, input_scale, d is not None, init, step)


def _linear_in_sigma(
    name: str, schedule: Schedule, timesteps: np.ndarray, sigmas: np.ndarray, spacing: str, **tables: np.ndarray
) -> Sampler:
    """The common update at the variance-exploding scale, x = x0 + sigma eps, where a = 1. `sigmas` is [n + 1]."""
    alpha_bar = 1 / (1 + sigmas[:-1] ** 2)
    highest = sigmas.max()
    return _linear(
        name,
        schedule,
        timesteps,
        alpha_bar,
        a=np.ones(len(timesteps)),
        # A grid that reaches the last training timestep starts from its noise alone; a "leading" one adds a unit image.
        initial_scale=float(np.sqrt(highest**2 + 1) if spacing == "leading" else highest),
        input_scale=np.sqrt(alpha_bar),
        **tables,
    )


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


def _alpha_bar_at(schedule: Schedule, timesteps: np.ndarray, final: float) -> np.ndarray:
    """alpha_bar, and `final` past the end of the schedule (timestep < 0)."""
    return np.where(timesteps < 0, final, schedule.alpha_bar[np.maximum(timesteps, 0)])


def _gather(i: Array, dtype: jnp.dtype) -> Callable[[np.ndarray], Array]:
    return lambda table: jnp.asarray(table, dtype)[i]


def _check_finite(name: str, *tables: np.ndarray) -> None:
    if not all(np.isfinite(table).all() for table in tables):
        raise ValueError(
            f"sampler {name!r} would divide by zero, because two of its {len(tables[0])} steps share a noise level: "
            "use fewer steps or another timestep spacing"
        )
