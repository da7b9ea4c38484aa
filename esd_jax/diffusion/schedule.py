"""The noise schedule of a checkpoint: `scheduler_config.json` as noise levels along a path."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from esd_jax.diffusion.path import VARIANCE_PRESERVING, Path, float32_or_wider, to_x0_eps

# The scheduler class a checkpoint was published with, and our name for its sampler.
SAMPLER_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "LCMScheduler": "lcm",
    "UniPCMultistepScheduler": "unipc",
    "HeunDiscreteScheduler": "heun",
    "DDPMScheduler": "ddpm",
}
# Classes of the same discrete betas whose own sampler is not implemented: their checkpoints are sampled by another.
OTHER_CLASSES = (
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "TCDScheduler",
    "IPNDMScheduler",
    "SASolverScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
)
# beta_start, beta_end and beta_schedule where a config leaves them out: DDPM's, but for the classes made for latents.
BETAS = {
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), (0.00085, 0.012, "scaled_linear")),
    **dict.fromkeys(
        (
            "HeunDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "DPMSolverSDEScheduler",
        ),
        (0.00085, 0.012, "linear"),
    ),
}
DDPM_BETAS = (0.0001, 0.02, "linear")
MOST_TIMESTEPS = 100_000  # a config that asks for more is damaged
MOST_NUMBER = 1e300  # so is one of such numbers, infinity among them
NULLABLE = ("trained_betas", "sigma_min", "sigma_max", "solver_p", "variance_type")  # null unless they are set
SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise schedule of a checkpoint, as `scheduler_config.json` describes it. Equal configs make equal schedules.

    config: the raw JSON, which export writes back.
    levels: float64 [num_train_timesteps], the noise level of each timestep in the path's terms: alpha_bar, which
      is exactly 0 at the end under `rescale_betas_zero_snr`; or sigma.
    prediction_type: one of `path.predictions`.
    """

    config: Mapping[str, Any]
    levels: np.ndarray
    prediction_type: str
    path: Path = VARIANCE_PRESERVING

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Read a scheduler config; fields that it leaves out mean what its diffusers class means by them.

        It is taken as it is written: what a pipeline corrects in it is done by `io.corrections`. Raises `ValueError`
        for a class, beta schedule, prediction type or timestep spacing that is not known, and for numbers that are
        none. Options that only some samplers read (`thresholding`, `solver_order`, ...) are checked by `make_sampler`,
        so that a checkpoint whose own sampler is not implemented can still be sampled by another one.
        """
        class_name = config.get("_class_name")
        if class_name not in (*SAMPLER_OF_CLASS, *OTHER_CLASSES):
            raise ValueError(
                f"scheduler class {_short(class_name)} is not implemented: those of discrete betas are, such as "
                "DDIMScheduler, and not EDM's"
            )
        prediction_type = _option(config, "prediction_type", "epsilon")
        if prediction_type == "flow_prediction" or _option(config, "use_flow_sigmas", False):
            raise ValueError(f"{class_name} with flow_prediction or use_flow_sigmas, flow matching, is not implemented")
        _require("prediction_type", prediction_type, VARIANCE_PRESERVING.predictions)
        _require("timestep_spacing", _option(config, "timestep_spacing", "leading"), SPACINGS)

        alpha_bar = np.cumprod(1.0 - _betas(config))
        alpha_bar[alpha_bar < np.finfo(np.float32).tiny] = 0  # what networks compute in has nothing between
        if _option(config, "rescale_betas_zero_snr", False):
            alpha_bar = _rescale_zero_snr(alpha_bar)
        alpha_bar.setflags(write=False)
        return cls(config, alpha_bar, prediction_type)

    @cached_property
    def identity(self) -> tuple[Any, ...]:
        """What distinguishes schedules."""
        config = json.dumps(dict(self.config), sort_keys=True, default=str)
        return config, self.prediction_type, self.path, self.levels.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.levels)

    @property
    def alpha_bar(self) -> np.ndarray:
        """The levels of a variance-preserving path. Raises `ValueError` for another one."""
        if self.path is not VARIANCE_PRESERVING:
            raise ValueError(f"a {self.path.name} schedule has no alpha_bar, which this needs")
        return self.levels

    @property
    def trained(self) -> np.ndarray:
        """float64 [num_train_timesteps]: `levels`, as images of the schedule's size were trained at them."""
        return self.levels

    def timestep(self, index: Any) -> Any:
        """What the network gets at training timesteps, whole numbers in 0 .. num_train_timesteps - 1, possibly traced:
        the same numbers; along the rectified flow 1,000 sigma of them, float32.

        Methods that noise images draw such numbers, uniformly, along either path.
        """
        if self.path is VARIANCE_PRESERVING:
            return index
        return jnp.asarray(self.num_train_timesteps * self.trained, jnp.float32)[index]

    def visited(self, num_steps: int) -> np.ndarray:
        """float64 [num_steps], descending: the levels that a sampler along the rectified flow visits; it lands on 0."""
        return self.levels[np.linspace(self.num_train_timesteps - 1, 0, num_steps).round().astype(int)]

    def to_x0_eps(
        self, level: ArrayLike, x: Float[Array, "..."], output: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """The network's output at `x` -> `(x0, eps)`: `path.to_x0_eps`."""
        return to_x0_eps(self.prediction_type, level, x, output, self.path)

    def option(self, name: str, default: Any) -> Any:
        """The config's value, or `default` where the key is missing. A null switch is off, as in diffusers; a null
        number is missing where a class has it as its default, and elsewhere an error, as it is there.

        Raises `ValueError`, naming the field, for a value of another type than `default`'s and for NaN or infinity.
        """
        return _option(self.config, name, default)


def add_noise(
    schedule: Schedule, x0: Float[Array, "batch ..."], noise: Float[Array, "batch ..."], t: ArrayLike
) -> Float[Array, "batch ..."]:
    """The forward process: `x0` at the noise level of `t`, a scalar or [batch], possibly traced.

    `t` is an integer; along the rectified flow it is 1,000 sigma (`num_train_timesteps` sigma), of any dtype.

    Raises `ValueError` for another `t`, or one whose value is known and outside the schedule. (The gather clamps a
    traced `t`: check its range where it is made.)
    """
    discrete = schedule.path is VARIANCE_PRESERVING
    if discrete and not jnp.issubdtype(jnp.result_type(t), jnp.integer):
        raise ValueError(f"t must be an integer timestep, not {jnp.result_type(t)}")
    last = schedule.num_train_timesteps - discrete
    if not isinstance(t, Tracer) and not (np.min(t) >= 0 and np.max(t) <= last):
        raise ValueError(f"timestep {np.asarray(t)} is outside 0..{last}")
    dtype = float32_or_wider(x0, noise)
    per_example = (-1, *[1] * (jnp.ndim(x0) - 1))
    if discrete:
        alpha, sigma = (jnp.asarray(table, dtype)[t] for table in schedule.path.coefficients(schedule.levels))
    else:  # the network's input is the level itself
        alpha, sigma = schedule.path.coefficients(jnp.asarray(t, dtype) / schedule.num_train_timesteps)
    return alpha.reshape(per_example) * x0 + sigma.reshape(per_example) * noise


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    """float64 [num_train_timesteps]: the variance added at each training timestep."""
    num = _option(config, "num_train_timesteps", 1000)
    if not 0 < num <= MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps={num} is no number of timesteps")
    class_name = config.get("_class_name")
    names = ("beta_start", "beta_end", "beta_schedule")
    if class_name == "IPNDMScheduler" and not any(config.get(name) is not None for name in (*names, "trained_betas")):
        raise ValueError("IPNDMScheduler says nothing of the betas: add beta_start, beta_end and beta_schedule to it")
    defaults = BETAS.get(str(class_name), DDPM_BETAS)
    start, end, kind = (_option(config, name, default) for name, default in zip(names, defaults, strict=True))
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list | tuple) or not all(map(_is_number, trained)):
            raise ValueError("trained_betas must be a list of numbers")
        betas = np.asarray(trained, np.float64)
        if betas.shape != (num,):
            raise ValueError(f"trained_betas has shape {betas.shape}, but num_train_timesteps is {num}")
    elif kind != "squaredcos_cap_v2" and not (0 < start <= 1 and 0 < end <= 1):
        raise ValueError(f"betas must be above 0 and at most 1, but beta_start={start} and beta_end={end}")
    elif kind == "linear":
        betas = np.linspace(start, end, num)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, num) ** 2
    elif kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, Eq. 17
        cosine = np.cos((np.arange(num + 1) / num + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)
    else:
        raise ValueError(f"beta_schedule {_short(kind)} is not known: linear, scaled_linear and squaredcos_cap_v2 are")
    if not (np.all(betas > 0) and np.all(betas <= 1)):
        raise ValueError(f"betas must be above 0 and at most 1, but reach from {betas.min()} to {betas.max()}")
    return betas


def _rescale_zero_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """Shift and stretch sqrt(alpha_bar) to keep its first value and end at 0 (Lin et al. 2024, Algorithm 1)."""
    root = np.sqrt(alpha_bar)
    if root[0] == root[-1]:
        raise ValueError("rescale_betas_zero_snr needs more than one noise level")
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _option(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    if value is None and (name not in config or name in NULLABLE):
        return default
    if value is None and isinstance(default, bool):
        return False
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, int | float):  # files have an integer as 1.0, too, and a fraction as 1
        fits = _is_number(value) and (isinstance(default, float) or value == int(value))
        # Only a field that is infinite unless it is set (lambda_min_clipped) may be written so.
        fits = fits or (isinstance(value, float) and math.isinf(default) and value == default)
        value = int(value) if _is_number(value) and fits and isinstance(default, int) else value
    else:
        fits = default is None or isinstance(value, type(default))
    if not fits:
        a = {bool: "true or false", str: "a text", int: "a whole number", float: "a finite number"}
        kind = a.get(type(default), f"a {type(default).__name__}")
        example = "" if isinstance(default, bool) else f" such as {default!r}"
        fix = "write that, or leave the field out for its default"
        raise ValueError(f"scheduler config field {name}={_short(value)} must be {kind}{example}: {fix}")
    return value


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON file is a finite number; an integer may be beyond what a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST_NUMBER


def _require(what: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {_short(value)}: known are {', '.join(known)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
