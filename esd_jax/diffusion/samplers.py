"""Samplers: a network that denoises a little becomes images, in one compiled loop.

`make_sampler` turns a checkpoint's schedule into a `Sampler`, tables and two pure functions; `run` is the loop. They
reproduce the diffusers scheduler classes, from which a checkpoint's `scheduler_config.json` has its meaning.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from esd_jax.diffusion import multistep, solvers, unipc
from esd_jax.diffusion.path import VARIANCE_PRESERVING
from esd_jax.diffusion.schedule import SAMPLER_OF_CLASS, SPACINGS, Schedule
from esd_jax.diffusion.solvers import Carry, Sampler

FLOW_EULER = "flow_euler"  # along the rectified flow, the sampler of its scheduler class
SAMPLERS = (*SAMPLER_OF_CLASS.values(), FLOW_EULER)
__all__ = ["SAMPLERS", "Sampler", "default_sampler", "drop_first", "make_sampler", "run", "run_with_memory"]

# Options of the diffusers classes that exist here in one setting only.
_GRID = {"use_exponential_sigmas": False, "use_beta_sigmas": False}
_ONLY = {
    "ddim": {"thresholding": False},
    "ddpm": {"thresholding": False, "variance_type": "fixed_small"},
    # Its class default is to begin with Runge-Kutta steps, which no Stable Diffusion was published with.
    "pndm": {"skip_prk_steps": True},
    "lms": _GRID,
    "euler": {**_GRID, "interpolation_type": "linear", "timestep_type": "discrete"},
    "euler_ancestral": {},
    "heun": _GRID,
    "dpmpp_2m": {
        **_GRID,
        "solver_order": 2,
        "thresholding": False,
        "use_lu_lambdas": False,
        "use_dynamic_shifting": False,
    },
    "unipc": {**_GRID, "thresholding": False, "predict_x0": True, "use_dynamic_shifting": False},
    "lcm": {"thresholding": False},
}
# What `Class.from_config` makes of options that another class of multistep solvers has by the same name.
_RENAMED = {
    "dpmpp_2m": {
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
        "algorithm_type": {"deis": "dpmsolver++"},
    },
    "unipc": {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")},
}
_CHOICES = {
    "dpmpp_2m": {"solver_type": ("midpoint", "heun"), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
    "unipc": {"solver_type": ("bh2", "bh1")},
}
_WITHOUT_ZERO_SNR = ("pndm", "lms", "heun")  # their classes have no option rescale_betas_zero_snr
LEADING = ("ddim", "ddpm", "pndm")  # whose classes space timesteps so by default; the others take "linspace"
KARRAS = ("euler", "lms", "heun", "dpmpp_2m", "unipc")


def own_sampler(schedule: Schedule) -> str | None:
    """The sampler of the class that a config names; None where it is not implemented."""
    if schedule.path is not VARIANCE_PRESERVING:
        return FLOW_EULER
    # The parallel variants differ in how they are batched alone.
    return SAMPLER_OF_CLASS.get(schedule.config["_class_name"].replace("ParallelScheduler", "Scheduler"))


def default_sampler(schedule: Schedule) -> str:
    """The sampler the checkpoint was published with. Raises `ValueError` where that one is not implemented."""
    if name := own_sampler(schedule):
        return name
    raise ValueError(
        f"scheduler/scheduler_config.json names {schedule.config['_class_name']}, whose sampler is not implemented: "
        "choose another with sampler= (--sampler=), such as dpmpp_2m or ddim"
    )


def plain(schedule: Schedule) -> str:
    """The sampler of first order without noise along a schedule's path."""
    return "ddim" if schedule.path is VARIANCE_PRESERVING else FLOW_EULER


def make_sampler(
    schedule: Schedule,
    name: str | None = None,
    num_steps: int = 50,
    *,
    eta: float = 0.0,
    karras: bool | None = None,
    spacing: str | None = None,
) -> Sampler:
    """A sampler of `SAMPLERS` ("plms" is "pndm"; None is the checkpoint's own) on a grid of `num_steps`. Along the
    rectified flow "flow_euler", or "euler" in short, is the only one.

    Options come from the schedule's config; a missing one takes the default of the diffusers class that belongs to
    `name`, as `Class.from_config(config)` does there, but for defaults that were made for pixels: x0 is never clipped,
    whatever the config says, and PNDM begins without Runge-Kutta steps. `spacing` ("leading", "linspace", "trailing")
    and `karras` (for those of `KARRAS`) override the config. `eta` is DDIM's: 0 is deterministic, 1 as noisy as DDPM.
    PNDM makes `num_steps + 1` network calls, Heun `2 num_steps - 1`; LCM has a spacing of its own. Raises `ValueError`
    for what is not implemented, and for a grid that leaves the schedule or makes the sampler divide by zero.
    """
    name = "pndm" if name == "plms" else name or default_sampler(schedule)
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: known are {', '.join(SAMPLERS)}")
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        raise ValueError(f"num_steps must be in 1..{schedule.num_train_timesteps}, not {num_steps}")
    if not 0 <= eta <= (1 if name == "ddim" else 0):
        raise ValueError(f"eta must be in 0..1 for sampler 'ddim' and 0 for all others, not {eta} for {name!r}")
    if karras and name not in KARRAS:
        raise ValueError(f"sampler {name!r} has no Karras noise levels: use one of {', '.join(KARRAS)}")
    if schedule.path is not VARIANCE_PRESERVING:
        if name not in (FLOW_EULER, "euler") or karras or spacing:
            options = "".join(
                [" with Karras noise levels"] * bool(karras) + [f" with spacing={spacing!r}"] * bool(spacing)
            )
            raise ValueError(
                f"sampler {name!r}{options} is not implemented along the {schedule.path.name} path: use {FLOW_EULER}"
            )
        return solvers.straight(schedule, num_steps)
    if name == FLOW_EULER:
        raise ValueError(
            f"sampler {name!r} needs a rectified flow, and this schedule is variance-preserving: use euler"
        )
    _check_options(schedule, name)
    spacing = spacing or schedule.option("timestep_spacing", "leading" if name in LEADING else "linspace")
    if spacing not in SPACINGS:
        raise ValueError(f"unknown timestep spacing {spacing!r}: known are {', '.join(SPACINGS)}")
    if karras is None and name in KARRAS:
        karras = schedule.option("use_karras_sigmas", False)

    if name == "ddim":
        return solvers.ddim(schedule, num_steps, spacing, eta)
    if name == "lcm":
        return solvers.lcm(schedule, num_steps)
    if name == "dpmpp_2m":
        return multistep.dpmpp_2m(schedule, num_steps, spacing, bool(karras), **_chosen(schedule, name))
    if name == "unipc":
        return unipc.unipc(schedule, num_steps, spacing, bool(karras), **_chosen(schedule, name))
    if name in ("lms", "euler", "heun"):
        build = {"lms": multistep.lms, "euler": solvers.euler, "heun": solvers.heun}[name]
        return build(schedule, num_steps, spacing, bool(karras))
    build = {"pndm": multistep.pndm, "ddpm": solvers.ddpm, "euler_ancestral": solvers.euler_ancestral}[name]
    return build(schedule, num_steps, spacing)


def drop_first(sampler: Sampler, n: int = 1) -> Sampler:
    """A DDIM sampler without its `n` noisiest steps: pure noise is taken for the noise level of timesteps[n].

    The 2023 ESD code samples so: of 981, 961, ..., 1 it drops 981 and makes 49 updates. Raises `ValueError` for the
    other samplers, whose first x or history depends on the first step.
    """
    if sampler.name != "ddim":
        raise ValueError(f"only sampler 'ddim' can drop its first steps, not {sampler.name!r}")
    if not 0 <= n < len(sampler.timesteps):
        raise ValueError(f"cannot drop {n} of {len(sampler.timesteps)} steps")

    def step(carry: Carry, i: Array, output: Array, noise: Array | None) -> Carry:
        return sampler.step(carry, i + n, output, noise)

    return replace(sampler, timesteps=sampler.timesteps[n:], input_scale=sampler.input_scale[n:], step=step)


def run(
    sampler: Sampler,
    denoise: Callable[..., Any],
    x: Float[Array, "..."],
    *,
    start: ArrayLike = 0,
    stop: ArrayLike | None = None,
    step_noise: Callable[[Array], Array] | None = None,
    memory: Any = None,
) -> Float[Array, "..."]:
    """`run_with_memory` without what it remembers in the end."""
    return run_with_memory(sampler, denoise, x, start=start, stop=stop, step_noise=step_noise, memory=memory)[0]


def run_with_memory(
    sampler: Sampler,
    denoise: Callable[..., Any],
    x: Float[Array, "..."],
    *,
    start: ArrayLike = 0,
    stop: ArrayLike | None = None,
    step_noise: Callable[[Array], Array] | None = None,
    memory: Any = None,
) -> tuple[Float[Array, "..."], Any]:
    """Steps `start` to `stop` (default: to the end) in one loop; a traced `stop` compiles once for all its values.

    `x` is what stands before step `start`: at 0, unit Gaussian noise times `sampler.initial_scale`. It is kept in
    float32 or wider. `denoise(x_scaled, t)` is called with the float32 scalar `t = timesteps[i]`. Given a `memory` (a
    pytree of arrays, or ()), it is called as `denoise(x_scaled, t, i, memory)` and returns (output, memory): guidance
    that depends on the step, or carries something from step to step. `step_noise(i)` is unit Gaussian noise shaped like
    `x`, and needed if `sampler.stochastic`.

    Returns x at the noise level of `timesteps[stop]`, to be multiplied by `input_scale[stop]` for the network; after
    the last step, the image; and the last memory. Raises `ValueError` for a missing `step_noise`, for bounds that are
    known and outside the grid, and for a sampler with a history that does not start at 0.
    """
    n = len(sampler.timesteps)
    stop = n if stop is None else stop
    bounds: list[Any] = [bound for bound in (0, start, stop, n) if not isinstance(bound, Tracer)]
    if sorted(bounds) != bounds:
        raise ValueError(f"cannot run steps {start} to {stop} of {n}")
    if sampler.stochastic and step_noise is None:
        raise ValueError(f"sampler {sampler.name!r} is stochastic here: it needs step_noise")
    x = jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    carry = sampler.init(x)
    if len(carry) > 1 and (isinstance(start, Tracer) or start != 0):
        raise ValueError(f"sampler {sampler.name!r} needs the outputs of the steps before: it can only start at 0")
    timesteps = jnp.asarray(sampler.timesteps, jnp.float32)
    input_scale = jnp.asarray(sampler.input_scale, x.dtype)

    def body(i: Array, carried: tuple[Carry, Any]) -> tuple[Carry, Any]:
        carry, memory = carried
        scaled = carry[0] * input_scale[i], timesteps[i]
        output, memory = (denoise(*scaled), None) if memory is None else denoise(*scaled, i, memory)
        return sampler.step(carry, i, output, step_noise(i) if sampler.stochastic and step_noise else None), memory

    carry, memory = jax.lax.fori_loop(start, stop, body, (carry, memory))
    return carry[0], memory


def _chosen(schedule: Schedule, name: str) -> dict[str, str]:
    """The options of which a sampler has several settings. Raises `ValueError` for one that is not implemented."""
    chosen = {}
    for option, known in _CHOICES[name].items():
        value = schedule.option(option, known[0])
        chosen[option] = _RENAMED[name].get(option, {}).get(value, value)
        if chosen[option] not in known:
            raise ValueError(
                f"{option}={value} is not implemented for {name!r} ({', '.join(known)} are): use another sampler"
            )
    return chosen


def _check_options(schedule: Schedule, name: str) -> None:
    """Refuse by name what the config asks of this sampler and is not implemented."""
    needed = _ONLY[name]
    options = {option: schedule.option(option, value) for option, value in needed.items()}
    if name == "pndm" and own_sampler(schedule) == "pndm":
        options["skip_prk_steps"] = schedule.option("skip_prk_steps", False)
    if name == "ddpm" and own_sampler(schedule) != "ddpm":
        options["variance_type"] = "fixed_small"  # DPM-Solver's field of the same name is about the network
    for option, value in options.items():
        if value != needed[option]:
            raise ValueError(
                f"{option}={value} is not implemented for sampler {name!r} (only {needed[option]}): "
                "use another sampler (--sampler=)"
            )
    if name == "dpmpp_2m" and schedule.option("variance_type", "fixed_small").startswith("learned"):
        raise ValueError("variance_type=learned is not implemented: the network must predict one tensor")
    if name in _WITHOUT_ZERO_SNR and schedule.option("rescale_betas_zero_snr", False):
        raise ValueError(
            f"sampler {name!r} has no option rescale_betas_zero_snr, to which the network was trained: use ddim, euler "
            "or dpmpp_2m"
        )
    if name in ("pndm", "euler_ancestral") and schedule.prediction_type == "sample":
        raise ValueError(f"sampler {name!r} is not defined for prediction_type 'sample': choose another sampler")
