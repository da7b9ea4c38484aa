"""DDIM inversion: the noise from which a deterministic sampler draws a given image."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax.diffusion import samplers
from esd_jax.diffusion.schedule import Schedule
from esd_jax.diffusion.solvers import Carry, Sampler

TIMESTEPS = ("level", "target")


def inverter(schedule: Schedule, num_steps: int, timestep: str = "level") -> Sampler:
    """DDIM's steps (eta 0) in reverse, for `samplers.run`: from clean latents to x at the noisiest timestep.

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
    sampler = samplers.make_sampler(schedule, "ddim", num_steps)
    target = sampler.timesteps[::-1]
    level = target - schedule.num_train_timesteps // num_steps
    clean = 1.0 if schedule.option("set_alpha_to_one", True) else schedule.alpha_bar[0]
    low = np.where(level < 0, clean, schedule.alpha_bar[np.maximum(level, 0)])
    high = schedule.alpha_bar[target]
    if schedule.prediction_type == "sample" and low[0] == 1:
        raise ValueError("a network that predicts x0 says nothing of the noise in a clean image: it cannot invert one")

    def step(carry: Carry, i: Array, output: Array, noise: Array | None) -> Carry:
        (x,) = carry
        alpha_bar, signal, spread = (jnp.asarray(a, x.dtype)[i] for a in (low, np.sqrt(high), np.sqrt(1 - high)))
        x0, eps = schedule.to_x0_eps(alpha_bar, x, output.astype(x.dtype))
        return (signal * x0 + spread * eps,)

    timesteps = np.maximum(level, 0) if timestep == "level" else target
    return Sampler("ddim inversion", timesteps, 1.0, np.ones(len(timesteps)), False, lambda x: (x,), step)
