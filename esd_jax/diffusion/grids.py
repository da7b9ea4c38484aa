"""Where a sampler stands: the timesteps it visits and the noise level at each. Host arrays in float64.

`sigma = sqrt((1 - alpha_bar) / alpha_bar)` is the noise level at the variance-exploding scale (Karras et al. 2022), in
which the Euler, LMS and DPM-Solver++ samplers think.
"""

import numpy as np

from esd_jax.diffusion.schedule import Schedule

# With `rescale_betas_zero_snr` the sigma samplers start here instead of at alpha_bar = 0, where sigma is infinite.
SMALLEST_ALPHA_BAR = 2.0**-24


def spaced_timesteps(
    spacing: str, num_steps: int, num_train: int, *, offset: int = 0, usable: int | None = None, drop_end: bool = False
) -> np.ndarray:
    """float64 [num_steps], descending: Lin et al. 2024, Table 2. "linspace" is fractional: round it where you must.

    `usable` are the timesteps 0..usable-1 a sampler may visit (default: all). `drop_end` places one point more, where
    the last step ends, and leaves it out. `offset` counts for "leading" alone.
    """
    usable = num_train if usable is None else usable
    points = num_steps + drop_end
    if spacing == "linspace":
        return np.linspace(0, usable - 1, points)[::-1][:num_steps]
    if spacing == "leading":
        return np.arange(points)[::-1][:num_steps] * float(usable // points) + offset
    if spacing == "trailing":  # rounding can make arange one entry too long
        return np.arange(usable, 0, -num_train / num_steps)[:num_steps].round() - 1
    raise ValueError(f"unknown timestep spacing {spacing!r}: known are leading, linspace, trailing")


def check_timesteps(timesteps: np.ndarray, schedule: Schedule, name: str) -> None:
    """Refuse a grid that leaves the schedule: on the device a gather would clamp such a timestep silently."""
    last = schedule.num_train_timesteps - 1
    outside = timesteps[(timesteps < 0) | (timesteps > last)]
    if outside.size:
        raise ValueError(
            f"sampler {name!r} would visit timestep {outside[0]:g}, outside 0..{last} (steps_offset is "
            f"{schedule.option('steps_offset', 0)}): use fewer steps or another timestep spacing"
        )


def check_signal(timesteps: np.ndarray, alpha_bar: np.ndarray, name: str) -> None:
    """Refuse a grid that reaches alpha_bar = 0 for a sampler that divides by it."""
    if np.any(alpha_bar == 0):
        raise ValueError(
            f"sampler {name!r} would divide by zero at timestep {timesteps[np.argmin(alpha_bar)]:g}, where alpha_bar "
            "is 0 (zero terminal SNR): use spacing='leading', or sampler 'ddim' if the network predicts v"
        )


def train_sigmas(schedule: Schedule) -> np.ndarray:
    """float64 [num_train_timesteps], ascending; infinite where alpha_bar = 0."""
    alpha_bar = schedule.alpha_bar.copy()
    if schedule.option("rescale_betas_zero_snr", False):
        alpha_bar[-1] = SMALLEST_ALPHA_BAR
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - alpha_bar) / alpha_bar)


def sigma_at(timesteps: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Noise levels at (fractional) timesteps, interpolated between the training ones."""
    return np.interp(timesteps, np.arange(len(sigmas)), sigmas)


def timestep_at(sigma: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The (fractional) timesteps of noise levels, interpolated in log sigma: the network's input off the grid."""
    return np.interp(np.log(sigma), np.log(sigmas), np.arange(len(sigmas)))


def karras_sigmas(sigma_max: float, sigma_min: float, num_steps: int, rho: float = 7.0) -> np.ndarray:
    """Karras et al. 2022, Eq. 5: steps that are even in sigma^(1/rho), so that low noise gets more of them."""
    ramp = np.linspace(0, 1, num_steps)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def final_sigma(schedule: Schedule) -> float:
    """The noise level the last step lands on."""
    kind = schedule.option("final_sigmas_type", "zero")
    if kind == "zero":
        return 0.0
    if kind == "sigma_min":
        return float(np.sqrt((1 - schedule.alpha_bar[0]) / schedule.alpha_bar[0]))
    raise ValueError(f"unknown final_sigmas_type {kind!r} in the scheduler config: write 'zero' or 'sigma_min'")


def sigma_grid(
    schedule: Schedule, name: str, num_steps: int, spacing: str, karras: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps of Euler, Heun and LMS, float32 [n], and noise levels [n + 1], the last one being where they land."""
    offset = schedule.option("steps_offset", 0)
    timesteps = spaced_timesteps(spacing, num_steps, schedule.num_train_timesteps, offset=offset)
    timesteps = timesteps.astype(np.float32)  # the network gets the timestep at which the noise level is read
    check_timesteps(timesteps, schedule, name)
    trained = train_sigmas(schedule)
    sigmas = sigma_at(timesteps, trained)
    check_signal(timesteps, 1 / (1 + sigmas**2), name)
    if karras:
        highest, lowest = sigmas[0], sigmas[-1]
        if name != "lms":  # diffusers' LMS has no such options
            highest, lowest = _karras_range(schedule, highest, lowest)
        sigmas = karras_sigmas(highest, lowest, num_steps)
        timesteps = timestep_at(sigmas, trained).astype(np.float32)
    final = final_sigma(schedule) if name == "euler" else 0.0
    return timesteps, np.append(sigmas, final)


def dpm_grid(
    schedule: Schedule, name: str, num_steps: int, spacing: str, karras: bool
) -> tuple[np.ndarray, np.ndarray]:
    """DPM-Solver++'s and UniPC's timesteps, int [n], and noise levels [n + 1]."""
    trained = train_sigmas(schedule)
    if karras:  # over the whole training range, whatever the spacing
        check_signal(np.arange(len(trained)), 1 / (1 + trained**2), name)
        sigmas = karras_sigmas(*_karras_range(schedule, trained[-1], trained[0]), num_steps)
        timesteps = timestep_at(sigmas, trained)
        cosine = name == "dpmpp_2m" and schedule.option("beta_schedule", "linear") == "squaredcos_cap_v2"
        timesteps = np.trunc(timesteps) if cosine else timesteps.round()
        lands = final_sigma(schedule)
        if name == "unipc" and lands > 0:
            lands = sigmas[-1]
    else:
        usable = len(trained)
        if name == "dpmpp_2m":
            with np.errstate(divide="ignore"):
                usable = int(np.sum(-np.log(trained) >= schedule.option("lambda_min_clipped", -np.inf)))
        timesteps = spaced_timesteps(
            spacing,
            num_steps,
            schedule.num_train_timesteps,
            offset=schedule.option("steps_offset", 0),
            usable=usable,
            drop_end=spacing != "trailing",
        ).round()
        check_timesteps(timesteps, schedule, name)
        sigmas = sigma_at(timesteps, trained)
        check_signal(timesteps, 1 / (1 + sigmas**2), name)
        lands = final_sigma(schedule)
    return timesteps.astype(int), np.append(sigmas, lands)


def _karras_range(schedule: Schedule, highest: float, lowest: float) -> tuple[float, float]:
    """The greatest and the least noise level, where the config sets them."""
    highest, lowest = schedule.option("sigma_max", float(highest)), schedule.option("sigma_min", float(lowest))
    if not 0 < lowest <= highest:
        raise ValueError(f"sigma_min={lowest:g} must be above 0, and sigma_max={highest:g} at least as much")
    return highest, lowest
