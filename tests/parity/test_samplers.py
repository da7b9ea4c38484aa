"""Every sampler, step by step, against the diffusers scheduler class it reproduces."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sampler_oracle import (
    CLASS_OF_SAMPLER,
    DISCRETE,
    KARRAS,
    LEADING,
    LINSPACE,
    NOISE,
    SD14,
    START,
    TRAILING,
    X0,
    V,
    config,
    denoise,
    denoise_torch,
    name_of,
    reference_scheduler,
    rescaled_betas,
)

from esd_jax.diffusion.samplers import make_sampler, run
from esd_jax.diffusion.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


def reference_trajectory(scheduler, x, monkeypatch, **step_options):
    """[x before the first step, ..., x after the last step] as NHWC."""
    noise = iter(torch.tensor(z, dtype=x.dtype).permute(0, 3, 1, 2) for z in NOISE)
    for module in ("ddim", "ddpm", "euler_ancestral_discrete", "lcm", "dpmsolver_multistep"):
        monkeypatch.setattr(
            f"diffusers.schedulers.scheduling_{module}.randn_tensor", lambda *args, **kwargs: next(noise)
        )
    x = x.permute(0, 3, 1, 2) * scheduler.init_noise_sigma
    trajectory = [x]
    for t in scheduler.timesteps:
        output = denoise_torch(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, **step_options).prev_sample
        trajectory.append(x)
    return [x.permute(0, 2, 3, 1).numpy() for x in trajectory]


def our_trajectory(sampler, x):
    noise = jnp.asarray(np.array(NOISE), x.dtype)
    until = jax.jit(lambda x, stop: run(sampler, denoise, x, stop=stop, step_noise=lambda i: noise[i]))
    stops = range(len(sampler.timesteps) + 1)
    trajectory = [np.asarray(until(x * sampler.initial_scale, stop)) for stop in stops]
    assert until._cache_size() == 1
    return trajectory


def assert_same_trajectory(ours, theirs, tolerance):
    """At every step, against the size of x at that step: the start of Euler's x is a hundred times its end."""
    assert len(ours) == len(theirs)
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]
    assert np.isfinite(errors).all() and max(errors) <= tolerance, np.round(np.log10(errors), 1)


ZERO_SNR = {**V, "rescale_betas_zero_snr": True}
SD = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

CASES = [
    ("ddim", SD),
    ("ddim", {"clip_sample": False}),  # the class's other defaults
    ("ddim", SD | V),
    ("ddim", SD | X0),
    ("ddim", SD | LINSPACE),
    ("ddim", SD | TRAILING | {"set_alpha_to_one": True}),
    ("ddim", SD | ZERO_SNR),
    ("ddim", SD | ZERO_SNR | LINSPACE),
    ("ddim", SD | ZERO_SNR | TRAILING),
    ("ddim", SD | X0 | {"rescale_betas_zero_snr": True} | TRAILING),
    ("pndm", {}),
    ("pndm", {"set_alpha_to_one": True, "steps_offset": 1}),
    ("pndm", SD | V),
    ("pndm", LINSPACE),
    ("pndm", V | TRAILING),
    ("pndm", V | LEADING | {"trained_betas": "zero_snr"}),
    ("lms", {}),
    ("lms", LEADING | {"steps_offset": 1}),
    ("lms", TRAILING),
    ("lms", V),
    ("lms", X0),
    ("lms", KARRAS),
    ("lms", V | KARRAS | LEADING),
    ("lms", V | LEADING | {"trained_betas": "zero_snr"}),
    ("euler", {}),
    ("euler", LEADING | {"steps_offset": 1}),
    ("euler", TRAILING),
    ("euler", V),
    ("euler", X0),
    ("euler", KARRAS),
    ("euler", KARRAS | V | LEADING | {"final_sigmas_type": "sigma_min", "sigma_min": 0.05, "sigma_max": 10.0}),
    ("euler", {"final_sigmas_type": "sigma_min", "beta_schedule": "squaredcos_cap_v2"} | LEADING),
    ("euler", ZERO_SNR),
    ("euler", ZERO_SNR | TRAILING),
    ("euler", ZERO_SNR | LEADING | {"steps_offset": 1}),
    ("euler_ancestral", {}),
    ("euler_ancestral", LEADING | {"steps_offset": 1}),
    ("euler_ancestral", TRAILING),
    ("euler_ancestral", V),
    ("euler_ancestral", ZERO_SNR | TRAILING),
    ("dpmpp_2m", {}),
    ("dpmpp_2m", LEADING | {"steps_offset": 1}),
    ("dpmpp_2m", TRAILING),
    ("dpmpp_2m", V),
    ("dpmpp_2m", X0),
    ("dpmpp_2m", KARRAS),
    ("dpmpp_2m", KARRAS | V | {"sigma_min": 0.05, "sigma_max": 10.0}),
    ("dpmpp_2m", V | {"solver_type": "heun"}),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", KARRAS | {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("dpmpp_2m", KARRAS | {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "sigma_max": 30.0}),
    ("dpmpp_2m", ZERO_SNR),
    ("dpmpp_2m", ZERO_SNR | TRAILING),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
    ("dpmpp_2m", KARRAS | V | {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    # As DEIS has them; diffusers' DPM-Solver++ does not land on zero from there.
    ("dpmpp_2m", LEADING | {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"solver_type": "bh2"}),  # as UniPC has it
    ("heun", {}),
    ("heun", LEADING | V | {"steps_offset": 1}),
    ("heun", X0),
    ("heun", TRAILING),
    ("heun", KARRAS | {"sigma_min": 0.05}),
    ("unipc", {}),
    ("unipc", LEADING | {"steps_offset": 1}),
    ("unipc", V | TRAILING),
    ("unipc", X0),
    ("unipc", {"solver_type": "bh1", "solver_order": 1, "final_sigmas_type": "sigma_min"}),  # zero is NaN there
    ("unipc", {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ("unipc", {"solver_type": "midpoint", "solver_order": 3} | LEADING),
    ("unipc", KARRAS | {"final_sigmas_type": "sigma_min", "disable_corrector": [0, 3]}),
    ("unipc", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("unipc", ZERO_SNR),
    ("ddpm", {"clip_sample": False}),
    ("ddpm", SD),
    ("ddpm", SD | V | TRAILING),
    ("ddpm", SD | X0 | LINSPACE),
    ("ddpm", SD | ZERO_SNR | TRAILING),
    ("lcm", {}),
    ("lcm", V | {"original_inference_steps": 40, "timestep_scaling": 0.1}),
    ("lcm", X0),
    ("lcm", ZERO_SNR),
]


@pytest.mark.parametrize("name, options", CASES, ids=name_of)
def test_trajectory_is_that_of_diffusers(name, options, monkeypatch):
    if options.get("trained_betas"):
        options = options | {"trained_betas": rescaled_betas()}
    raw = config(name, **options)
    x = np.float32(START)
    theirs = reference_trajectory(reference_scheduler(name, raw, 20), torch.tensor(x), monkeypatch)
    sampler = make_sampler(Schedule.from_config(raw), num_steps=20)
    assert sampler.name == name
    assert_same_trajectory(our_trajectory(sampler, jnp.asarray(x)), theirs, 1e-4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("options", [SD, SD | V | TRAILING], ids=name_of)
def test_ddim_with_eta_is_that_of_diffusers(eta, options, monkeypatch):
    raw = config("ddim", **options)
    scheduler = reference_scheduler("ddim", raw, 20)
    theirs = reference_trajectory(scheduler, torch.tensor(START, dtype=torch.float32), monkeypatch, eta=eta)
    sampler = make_sampler(Schedule.from_config(raw), num_steps=20, eta=eta)
    assert sampler.stochastic
    assert_same_trajectory(our_trajectory(sampler, jnp.float32(START)), theirs, 1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 14, 15])
@pytest.mark.parametrize("name", ["pndm", "lms", "dpmpp_2m"])
def test_short_multistep_runs_are_those_of_diffusers(name, num_steps, monkeypatch):
    """The lower orders at the start, and at the end of DPM-Solver++ below 15 steps."""
    # A final sigma of 0 would end in a first-order step anyway.
    options = {"final_sigmas_type": "sigma_min"} if name == "dpmpp_2m" else {}
    raw = config(name, **options, **LEADING)
    theirs = reference_trajectory(
        reference_scheduler(name, raw, num_steps), torch.tensor(START, dtype=torch.float32), monkeypatch
    )
    sampler = make_sampler(Schedule.from_config(raw), num_steps=num_steps)
    assert_same_trajectory(our_trajectory(sampler, jnp.float32(START)), theirs, 1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name, options", [("euler", TRAILING), ("euler_ancestral", TRAILING), ("lcm", {})])
def test_few_steps_are_those_of_diffusers(name, options, num_steps, monkeypatch):
    """SDXL-Lightning, SDXL-Turbo and latent consistency models."""
    raw = config(name, **options)
    x = torch.tensor(START, dtype=torch.float32)
    theirs = reference_trajectory(reference_scheduler(name, raw, num_steps), x, monkeypatch)
    sampler = make_sampler(Schedule.from_config(raw), num_steps=num_steps)
    assert_same_trajectory(our_trajectory(sampler, jnp.float32(START)), theirs, 1e-4)


@pytest.mark.parametrize("name", DISCRETE)
def test_another_sampler_than_the_checkpoints_own(name, monkeypatch):
    """As `Class.from_config(checkpoint.scheduler.config)`: what the file does not say, the new class decides."""
    pndm = diffusers.PNDMScheduler.from_config(SD14)
    scheduler = getattr(diffusers, CLASS_OF_SAMPLER[name]).from_config(pndm.config)
    scheduler.set_timesteps(20)
    theirs = reference_trajectory(scheduler, torch.tensor(START, dtype=torch.float32), monkeypatch)
    sampler = make_sampler(Schedule.from_config(SD14), name, num_steps=20)
    assert_same_trajectory(our_trajectory(sampler, jnp.float32(START)), theirs, 1e-4)


@pytest.mark.parametrize(
    "options, eta",
    [
        (SD, 0.0),
        (SD | V, 0.0),
        (SD | X0, 0.0),
        (SD | ZERO_SNR | TRAILING, 0.0),
        (SD, 1.0),
        (SD | V, 1.0),
        (SD | X0, 0.5),
    ],
    ids=name_of,
)
def test_ddim_in_float64(options, eta, monkeypatch):
    raw = config("ddim", **options)
    schedule = Schedule.from_config(raw)
    scheduler = reference_scheduler("ddim", raw, 20)
    scheduler.alphas_cumprod = torch.tensor(schedule.alpha_bar)  # theirs is float32
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    theirs = reference_trajectory(scheduler, torch.tensor(START), monkeypatch, eta=eta)
    with jax.enable_x64(True):
        ours = our_trajectory(make_sampler(schedule, num_steps=20, eta=eta), jnp.float64(START))
    assert ours[-1].dtype == np.float64
    assert_same_trajectory(ours, theirs, 1e-10)
