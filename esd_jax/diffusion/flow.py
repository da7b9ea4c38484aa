"""The noise schedule of a rectified flow, as diffusers' `FlowMatchEulerDiscreteScheduler` describes it.

A noise level is sigma, 0 for data and 1 for noise, and the network's input is 1,000 sigma. A shift s moves the steps
towards noise (Esser et al. 2024, *Scaling Rectified Flow Transformers*, Eq. 23):

    sigma' = s sigma / (1 + (s - 1) sigma)

s is a constant of the checkpoint, or, "dynamic", e^mu with mu linear in the number of image tokens (FLUX.1; FLUX.2:
`families/klein.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from esd_jax.diffusion.path import RECTIFIED_FLOW
from esd_jax.diffusion.schedule import MOST_TIMESTEPS, Schedule

CLASS = "FlowMatchEulerDiscreteScheduler"
SHIFTS = ("exponential", "linear")  # what e^mu is replaced with: itself, or mu
# Options of other models than those that are implemented here (Mochi, LTX-Video, ...).
REFUSED = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)


@dataclass(frozen=True, eq=False)
class FlowSchedule(Schedule):
    """The schedule of a rectified flow. Equal configs make equal schedules.

    levels: float64 [num_train_timesteps], the sigma of each training timestep, under the static shift.
    even: whether a grid of n steps starts as 1, ..., 2/n, 1/n (`FluxPipeline` asks for these) rather than as the
      class's own, evenly from the highest to the lowest of `levels`. Both are then shifted: SD3's grid twice.
    dynamic: the shift of this image size; None where it does not depend on the size, or the size is not known yet.
    """

    even: bool = False
    dynamic: float | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], even: bool = False) -> "FlowSchedule":
        """Reads a scheduler config; fields that it leaves out mean what the diffusers class means by them.

        Raises ValueError for another class, for an option that is not implemented, and for numbers that are none.
        """
        if (class_name := config.get("_class_name")) != CLASS:
            raise ValueError(f"scheduler class {class_name!r} is not implemented for a rectified flow: {CLASS} is")
        bare = cls(config, np.zeros(0), RECTIFIED_FLOW.predictions[0], RECTIFIED_FLOW, even)
        for name in REFUSED:
            if config.get(name):
                raise ValueError(f"{CLASS} with {name}={config[name]!r} is not implemented: leave the field out")
        num = bare.option("num_train_timesteps", 1000)
        if not 0 < num <= MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps={num} is no number of timesteps")
        if (shift := bare.option("shift", 1.0)) <= 0:
            raise ValueError(f"shift={shift} must be above 0")
        levels = np.arange(1, num + 1) / num
        if bare.option("use_dynamic_shifting", False):
            bare.shift_at(1)  # refuses options that are none
        else:
            levels = shifted(levels, shift)
        levels.setflags(write=False)
        return replace(bare, levels=levels)

    @cached_property
    def identity(self) -> tuple[Any, ...]:
        """What distinguishes schedules."""
        return *super().identity, self.even, self.dynamic

    @property
    def trained(self) -> np.ndarray:
        """`levels` under the shift of this image size, too, as far as there is one and it is known."""
        return self.levels if self.dynamic is None else shifted(self.levels, self.dynamic)

    def at(self, tokens: int) -> "FlowSchedule":
        """The schedule for images of so many tokens: itself, unless its shift depends on them."""
        if not self.option("use_dynamic_shifting", False):
            return self
        return replace(self, dynamic=self.shift_at(tokens))

    @property
    def time_shift(self) -> str:
        """Of which kind the dynamic shift is, one of `SHIFTS`. Raises ValueError for another."""
        kind = self.option("time_shift_type", SHIFTS[0])
        if kind not in SHIFTS:
            raise ValueError(f"unknown time_shift_type {kind!r}: known are {', '.join(SHIFTS)}")
        return kind

    def shift_at(self, tokens: int) -> float:
        """The dynamic shift for so many image tokens: through (base_image_seq_len, base_shift) and (max_..., max_...).

        Raises ValueError for options that give none.
        """
        kind = self.time_shift
        low, high = (self.option(f"{end}_shift", default) for end, default in (("base", 0.5), ("max", 1.15)))
        few, many = (self.option(f"{end}_image_seq_len", default) for end, default in (("base", 256), ("max", 4096)))
        if few == many:
            raise ValueError(f"base_image_seq_len and max_image_seq_len are both {few}: the shift has no slope")
        mu = low + (high - low) / (many - few) * (tokens - few)
        if kind == "linear" and mu <= 0:
            raise ValueError(f"the shift of {tokens} image tokens is {mu:g}: it must be above 0")
        if abs(mu) > 100:  # e^mu, and the steps with it, would be lost
            raise ValueError(f"the shift of {tokens} image tokens is e^{mu:g}: correct base_shift and max_shift")
        return math.exp(mu) if kind == "exponential" else mu

    def visited(self, num_steps: int) -> np.ndarray:
        """float64 [num_steps], descending: the noise levels that a sampler visits; it lands on 0.

        Raises ValueError where the shift depends on an image size that is not known.
        """
        start, end = (1.0, 1 / num_steps) if self.even else (self.levels[-1], self.levels[0])
        shift = self.option("shift", 1.0)
        if self.option("use_dynamic_shifting", False):
            if self.dynamic is None:
                raise ValueError("the noise levels depend on the image size (use_dynamic_shifting), which is not known")
            shift = self.dynamic
        return shifted(np.linspace(start, end, num_steps), shift)


def shifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    """The noise levels under a shift."""
    return shift * sigma / (1 + (shift - 1) * sigma)
