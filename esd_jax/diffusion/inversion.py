"""DDIM inversion: the noise from which a deterministic sampler draws a given image; along a rectified flow by Euler's
method.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esd_jax.diffusion import samplers
from esd_jax.diffusion.path import VARIANCE_PRESERVING
from esd_jax.diffusion.schedule import Schedule
from esd_jax.diffusion.solvers import Carry, Sampler

TIMESTEPS = ("level", "target")


class Levels(NamedTuple):
    """The steps upwards.

    target: the noisier timestep of each. level: the cleaner one, with DDIM below 0 at the clean end.
    low, high: the noise levels of both, in the path's terms (alpha_bar or sigma).
    """

    target: np.ndarray
    level: np.ndarray
    low: np.ndarray
    high: np.ndarray


def levels(schedule: Schedule, num_steps: int) -> Levels:
    """The levels of sampler "ddim", or "flow_euler", with as many steps. Raises ValueError where `inverter` does."""
    if schedule.path is not VARIANCE_PRESERVING:
        high = schedule.visited(num_steps)[::-1]
        low = np.append(0.0, high[:-1])
        total = schedule.num_train_timesteps
        return Levels(total * high, total * low, low, high)
    sampler = samplers.make_sampler(schedule, "ddim", num_steps)
    target = sampler.timesteps[::-1]
    level = target - schedule.num_train_timesteps // num_steps
    clean = 1.0 if schedule.option("set_alpha_to_one", True) else schedule.alpha_bar[0]
    low = np.where(level < 0, clean, schedule.alpha_bar[np.maximum(level, 0)])
    high = schedule.alpha_bar[target]
    if schedule.prediction_type == "sample" and low[0] == 1:
        raise ValueError("a network that predicts x0 says nothing of the noise in a clean image: it cannot invert one")
    return Levels(target, level, low, high)


def inverter(schedule: Schedule, num_steps: int, timestep: str = "level") -> Sampler:
    """DDIM's steps (eta 0), or Euler's along a rectified flow, in reverse, for `samplers.run`: from clean latents to x
    at the noisiest timestep.

    A step from the noise level a up to b is a DDIM step (Song et al. 2021, Eq. 13) with the network evaluated at x_a.
    The levels are those of sampler "ddim" with as many steps: where the network's eps depends on neither
    x nor t, sampling gives back what was inverted; elsewhere it is off by how much eps changes within a step. The clean
    end is the level on which the sampler lands; the network gets t = 0 for it. A sampler's clipping of x0 has no
    inverse, and is left out.

    Args:
      schedule: the checkpoint's.
      num_steps: calls of the network.
      timestep: the network's input: "level", that of x_a; or "target", that of x_b, which is what
        the sampler uses at this step (diffusers' DDIMInverseScheduler).

    Raises:
      ValueError: an unknown `timestep`, a grid that sampler "ddim" refuses, or a network that predicts x0 on a schedule
        that ends without noise.
    """
    if timestep not in TIMESTEPS:
        raise ValueError(f"timestep={timestep!r} is unknown; choose one of {', '.join(TIMESTEPS)}")
    target, level, low, high = levels(schedule, num_steps)
    tables = (low, *schedule.path.coefficients(high))

    def step(carry: Carry, i: Array, output: Array, noise: Array | None) -> Carry:
        (x,) = carry
        now, signal, spread = (jnp.asarray(a, x.dtype)[i] for a in tables)
        x0, eps = schedule.to_x0_eps(now, x, output.astype(x.dtype))
        return (signal * x0 + spread * eps,)

    timesteps = np.maximum(level, 0) if timestep == "level" else target
    name = f"{samplers.plain(schedule)} inversion"
    return Sampler(name, timesteps, 1.0, np.ones(len(timesteps)), False, lambda x: (x,), step)


def exact_inverter(schedule: Schedule, num_steps: int, iterations: int) -> Callable[..., tuple[Array, Array]]:
    """DDIM inversion whose steps are solved for: (denoise, clean latents) -> (noise, how far its steps miss).

    A step up from x_a at level a finds the x_b of which DDIM's step down, with the network evaluated there, is x_a, by
    fixed-point iteration (Pan et al., ICCV 2023):

        x_b <- alpha_b x0 + sigma_b eps,    x0 = (x_a - sigma_a eps) / alpha_a,    eps of the network at the last x_b
        x_b <- x_a + (sigma_b - sigma_a) v    along a rectified flow: at pure noise eps is x_b, whatever v is

    It begins with `inverter(timestep="target")`, and keeps of each example the x_b whose step down comes closest.

    The second result is the root mean square of what each example's steps down miss x_a by, over all steps.

    Raises ValueError where `inverter` does.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    tables = levels(schedule, num_steps)

    def invert(
        denoise: Callable[[Array, Array], Array], x: Float[Array, "batch height width channel"]
    ) -> tuple[Float[Array, "batch height width channel"], Float[Array, " batch"]]:
        t = jnp.asarray(tables.target, jnp.float32)
        low, high = (jnp.asarray(a, x.dtype) for a in (tables.low, tables.high))
        error = lambda a, b: jnp.mean((a - b) ** 2, axis=(1, 2, 3))  # noqa: E731

        def up(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x_a, missed = carry

            def mixed(level: Array, x0: Array, eps: Array) -> Array:
                alpha, sigma = schedule.path.coefficients(level)
                return alpha * x0 + sigma * eps

            def higher(x0: Array, eps: Array) -> Array:
                if schedule.path is not VARIANCE_PRESERVING:
                    return x_a + (high[i] - low[i]) * (eps - x0)
                alpha, sigma = schedule.path.coefficients(low[i])
                return mixed(high[i], (x_a - sigma * eps) / alpha, eps)

            def iterate(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                x_b, best, least = state
                pair = schedule.to_x0_eps(high[i], x_b, denoise(x_b, t[i]).astype(x.dtype))
                miss = error(mixed(low[i], *pair), x_a)
                better = (miss < least)[:, None, None, None]
                return higher(*pair), jnp.where(better, x_b, best), jnp.minimum(miss, least)

            start = higher(*schedule.to_x0_eps(low[i], x_a, denoise(x_a, t[i]).astype(x.dtype)))
            never: Any = jnp.full(len(x), jnp.inf, x.dtype)
            _, best, least = jax.lax.fori_loop(0, iterations, iterate, (start, start, never))
            return best, missed + least

        noise, missed = jax.lax.fori_loop(0, num_steps, up, (x, jnp.zeros(len(x), x.dtype)))
        return noise, jnp.sqrt(missed / num_steps)

    return invert
