"""The solvers, each a table of coefficients computed on the host in float64.

With (x0_i, eps_i) read off the network's output at step i, every one of them is

    x_{i+1} = a_i x0_i + b_i eps_i + sum_k c_ik m_{i-k} + d_i z_i,        k = 1, 2, ...

where z is fresh noise and m what the solver remembers: nothing (DDIM, DDPM, Euler, LCM), eps (LMS, Heun) or x0
(DPM-Solver++). PLMS remembers raw network outputs and averages them before it reads off the pair. The multistep ones
are in `multistep`, UniPC in `unipc`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax.diffusion import grids
from esd_jax.diffusion.schedule import Schedule

Carry = tuple[Array, ...]


@dataclass(frozen=True, eq=False)
class Sampler:
    """One sampler on one grid. `i` counts network calls, 0 = pure noise; every table is indexed by it."""

    name: str
    timesteps: np.ndarray  # [n]: the network's input at step i; fractional for Euler and LMS with linspace or Karras
    initial_scale: float  # unit Gaussian noise times this is the first x
    input_scale: np.ndarray  # float64 [n]: the network gets x * input_scale[i]
    stochastic: bool  # whether `step` uses its noise
    init: Callable[[Array], Carry]  # x -> carry, whose first element is x
    step: Callable[[Carry, Array, Array, Array | None], Carry]  # (carry, i, output, noise) -> carry
    # [n]: how much the noise that an output implies changes with the output; None: as the raw output is taken.
    eps_per_output: np.ndarray | None = None


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
    then = alpha_bar_at(schedule, timesteps - num_train // num_steps, final)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)  # Eq. 16
    return linear(
        "ddim",
        schedule,
        timesteps,
        now,
        a=np.sqrt(then),
        b=np.sqrt(1 - then - variance),
        d=np.sqrt(variance) if eta > 0 else None,
    )


def ddpm(schedule: Schedule, num_steps: int, spacing: str) -> Sampler:
    """Ancestral sampling (Ho et al. 2020, Eq. 6 and 7) from each entry of a grid to the next, at last to alpha_bar = 1.

    x' ~ N(c_0 x0 + c_1 x, s^2) with s^2 = (1 - alpha_bar') / (1 - alpha_bar) beta, beta = 1 - alpha_bar / alpha_bar'
    """
    offset = schedule.option("steps_offset", 0)
    timesteps = grids.spaced_timesteps(spacing, num_steps, schedule.num_train_timesteps, offset=offset)
    timesteps = timesteps.round().astype(int)
    grids.check_timesteps(timesteps, schedule, "ddpm")
    now = schedule.alpha_bar[timesteps]
    if schedule.prediction_type == "epsilon":
        grids.check_signal(timesteps, now, "ddpm")
    then = np.append(schedule.alpha_bar[timesteps[1:]], 1.0)
    beta = 1 - now / then
    c_0, c_1 = np.sqrt(then) * beta / (1 - now), np.sqrt(now / then) * (1 - then) / (1 - now)
    # x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
    a, b = c_0 + c_1 * np.sqrt(now), c_1 * np.sqrt(1 - now)
    return linear("ddpm", schedule, timesteps, now, a=a, b=b, d=np.sqrt((1 - then) / (1 - now) * beta))


def straight(schedule: Schedule, num_steps: int) -> Sampler:
    """Euler's method along the path itself, from level to level: x' = alpha' x0 + sigma' eps, at last to x0.

    On the rectified flow's path this is Euler's method on dx = v dsigma. The network gets 1,000 sigma, as SD3 and
    FLUX do, or whatever the number of training timesteps is.
    """
    now = schedule.visited(num_steps)
    alpha, sigma = schedule.path.coefficients(np.append(now[1:], 0.0))
    sampler = linear("flow_euler", schedule, now * schedule.num_train_timesteps, now, a=alpha, b=sigma)
    return replace(sampler, eps_per_output=1 - now)  # eps = x + (1 - sigma) v


def euler(schedule: Schedule, num_steps: int, spacing: str, karras: bool) -> Sampler:
    """Euler's method on dx = eps dsigma (Karras et al. 2022, Algorithm 1 without its corrector).

    x' = x + (sigma' - sigma) eps = x0 + sigma' eps
    """
    timesteps, sigmas = grids.sigma_grid(schedule, "euler", num_steps, spacing, karras)
    return linear_in_sigma("euler", schedule, timesteps, sigmas, spacing, b=sigmas[1:])


def euler_ancestral(schedule: Schedule, num_steps: int, spacing: str) -> Sampler:
    """Euler down to sigma_down, then noise back up to sigma' (DDPM's posterior at the variance-exploding scale)."""
    timesteps, sigmas = grids.sigma_grid(schedule, "euler_ancestral", num_steps, spacing, karras=False)
    now, then = sigmas[:-1], sigmas[1:]
    down, up = then**2 / now, then * np.sqrt(1 - (then / now) ** 2)  # down^2 + up^2 = then^2
    return linear_in_sigma("euler_ancestral", schedule, timesteps, sigmas, spacing, b=down, d=up)


def heun(schedule: Schedule, num_steps: int, spacing: str, karras: bool) -> Sampler:
    """Heun's method (Karras et al. 2022, Algorithm 1): Euler's step, then a call at its end that corrects it.

    The second call sees x + (sigma' - sigma) eps_{i-1}; x' is that plus (sigma' - sigma) (eps_i - eps_{i-1}) / 2. The
    last step, to sigma' = 0, is Euler's alone: 2 num_steps - 1 calls.
    """
    timesteps, sigmas = grids.sigma_grid(schedule, "heun", num_steps, spacing, karras)
    half = np.diff(sigmas)[:-1] / 2
    calls = 2 * num_steps - 1
    b, c = np.empty(calls), np.zeros((calls, 1))
    b[::2], b[1::2], c[1::2, 0] = sigmas[1:], sigmas[1:-1] + half, -half
    timesteps = np.concatenate([timesteps[:1], timesteps[1:].repeat(2)])
    sigmas = np.concatenate([sigmas[:1], sigmas[1:-1].repeat(2), sigmas[-1:]])
    return linear_in_sigma("heun", schedule, timesteps, sigmas, spacing, b=b, c=c)


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
    return linear(
        "lcm",
        schedule,
        timesteps,
        now,
        a=np.sqrt(then) * (out + skip * np.sqrt(now)),  # x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
        b=np.sqrt(then) * skip * np.sqrt(1 - now),
        d=np.sqrt(1 - then),
    )


def linear(
    name: str,
    schedule: Schedule,
    timesteps: np.ndarray,
    levels: np.ndarray,
    *,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray | None = None,
    d: np.ndarray | None = None,
    remember: str = "eps",
    initial_scale: float = 1.0,
    input_scale: np.ndarray | None = None,
) -> Sampler:
    """The common update (see the top of this file). levels, a, b, d: [n]; c: [n, what is remembered]."""
    n = len(timesteps)
    c = np.zeros((n, 0)) if c is None else c
    input_scale = np.ones(n) if input_scale is None else input_scale
    check_tables(name, levels, a, b, c, *([] if d is None else [d]))

    def init(x: Array) -> Carry:
        return (x, *[jnp.zeros_like(x)] * c.shape[1])

    def step(carry: Carry, i: Array, output: Array, noise: Array | None) -> Carry:
        x, *past = carry
        at = gather(i, x.dtype)
        output = output.astype(x.dtype)
        x0, eps = schedule.to_x0_eps(at(levels), x * at(input_scale), output)
        x = at(a) * x0 + at(b) * eps
        for k, m in enumerate(past):
            x += at(c[:, k]) * m
        if d is not None:
            assert noise is not None  # a sampler with `d` is stochastic
            x += at(d) * noise.astype(x.dtype)
        newest = x0 if remember == "x0" else eps
        return (x, *[newest, *past][: len(past)])

    return Sampler(name, timesteps, initial_scale, input_scale, d is not None, init, step)


def linear_in_sigma(
    name: str, schedule: Schedule, timesteps: np.ndarray, sigmas: np.ndarray, spacing: str, **tables: Any
) -> Sampler:
    """The common update at the variance-exploding scale, x = x0 + sigma eps, where a = 1. `sigmas` is [n + 1]."""
    alpha_bar = 1 / (1 + sigmas[:-1] ** 2)
    highest = sigmas.max()
    return linear(
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


def alpha_bar_at(schedule: Schedule, timesteps: np.ndarray, final: float) -> np.ndarray:
    """alpha_bar, and `final` past the end of the schedule (timestep < 0)."""
    return np.where(timesteps < 0, final, schedule.alpha_bar[np.maximum(timesteps, 0)])


def gather(i: Array, dtype: jnp.dtype) -> Callable[[np.ndarray], Array]:
    """A table -> its entry of step i."""
    return lambda table: jnp.asarray(table, dtype)[i]


def check_tables(name: str, *tables: np.ndarray) -> None:
    """Raises `ValueError` for coefficients that are none."""
    if not all(np.isfinite(table).all() for table in tables):
        raise ValueError(
            f"sampler {name!r} would divide by zero, because two of its {len(tables[0])} steps share a noise level: "
            "use fewer steps or another timestep spacing"
        )
