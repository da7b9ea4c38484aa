"""Every sampler, step by step, against the diffusers scheduler class it reproduces."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from messages import one_line

from esd_jax.diffusion.samplers import SAMPLERS, default_sampler, drop_first, make_sampler, run
from esd_jax.diffusion.schedule import OTHER_CLASSES, SAMPLER_OF_CLASS, Schedule, add_noise
from esd_jax.erasing import trajectories

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

CLASS_OF_SAMPLER = {name: class_name for class_name, name in SAMPLER_OF_CLASS.items()}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Stable Diffusion 1.4's file: written before timestep_spacing existed.
SD14 = {
    "_class_name": "PNDMScheduler",
    **BETAS,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SHAPE = (2, 8, 8, 4)
MIX = np.random.default_rng(0).standard_normal((4, 4)) * 0.6
START, *NOISE = np.random.default_rng(1).standard_normal((52, *SHAPE))


def config(sampler, **options):
    own = {"skip_prk_steps": True} if sampler == "pndm" else {}
    return {"_class_name": CLASS_OF_SAMPLER[sampler], **BETAS, **own, **options}


def denoise(x, t):
    return jnp.tanh(x @ jnp.asarray(MIX, x.dtype)) + 0.3 * jnp.sin(0.01 * t.astype(x.dtype) + jnp.arange(4))


def denoise_torch(x, t):
    """The same function on NCHW."""
    mixed = torch.einsum("bchw,cd->bdhw", x, torch.tensor(MIX, dtype=x.dtype))
    return torch.tanh(mixed) + 0.3 * torch.sin(0.01 * t.to(x.dtype) + torch.arange(4)).reshape(4, 1, 1)


def reference_scheduler(sampler, raw, num_steps):
    scheduler = getattr(diffusers, CLASS_OF_SAMPLER[sampler]).from_config(raw)
    scheduler.set_timesteps(num_steps)
    return scheduler


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


def rescaled_betas():
    """Zero terminal SNR as `trained_betas`, for the classes that have no option for it."""
    alpha_bar = Schedule.from_config(config("ddim", rescale_betas_zero_snr=True)).alpha_bar
    return (1 - alpha_bar / np.concatenate([[1], alpha_bar[:-1]])).tolist()


V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True}
LEADING, LINSPACE, TRAILING = ({"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing"))
KARRAS = {"use_karras_sigmas": True}
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


def name_of(case):
    return case if isinstance(case, str) else json.dumps(case).translate({ord(c): None for c in '{}" '}) or "defaults"


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


@pytest.mark.parametrize("name", SAMPLERS)
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


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_and_scales_are_those_of_diffusers(name, spacing, offset):
    raw = config(name, timestep_spacing=spacing, steps_offset=offset)
    schedule = Schedule.from_config(raw)
    scheduler = getattr(diffusers, CLASS_OF_SAMPLER[name]).from_config(raw)
    for num_steps in (1, 2, 3, 7, 16, 20, 28, 35, 48, 50, 80, 100, 333):
        if name == "lcm" and num_steps > 50:
            continue
        scheduler.set_timesteps(num_steps)
        sampler = make_sampler(schedule, num_steps=num_steps)
        theirs = scheduler.timesteps.numpy()
        assert sampler.timesteps.dtype == theirs.dtype
        np.testing.assert_array_equal(sampler.timesteps, theirs, err_msg=f"{num_steps} steps")
        # 1 - alpha_bar_0, which one step of linspace starts at, is good to 7e-5 in their float32.
        assert sampler.initial_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=3.5e-5)
        seen = scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])
        assert sampler.input_scale[0] == pytest.approx(float(seen), rel=3.5e-5)
        assert len(sampler.input_scale) == len(sampler.timesteps)


COSINE = {"beta_schedule": "squaredcos_cap_v2", "sigma_max": 30.0}


@pytest.mark.parametrize(
    "name, options",
    [(name, options) for name in ("lms", "euler", "dpmpp_2m") for options in ({}, LEADING)]
    + [("euler", COSINE), ("dpmpp_2m", COSINE)],
    ids=name_of,
)
def test_karras_timesteps_are_those_of_diffusers(name, options):
    raw = config(name, use_karras_sigmas=True, **options)
    schedule = Schedule.from_config(raw)
    scheduler = reference_scheduler(name, raw, 20)
    scheduler.alphas_cumprod = torch.tensor(schedule.alpha_bar)  # theirs is float32
    scheduler.set_timesteps(20)
    theirs = scheduler.timesteps.numpy()
    # The float32 timesteps are interpolated; DPM-Solver++ makes them whole.
    np.testing.assert_allclose(
        make_sampler(schedule, num_steps=20).timesteps, theirs, rtol=0, atol=0 if name == "dpmpp_2m" else 1e-3
    )


def test_spacing_and_karras_override_the_config():
    schedule = Schedule.from_config(config("euler"))
    for spacing in ("leading", "trailing"):
        ours = make_sampler(schedule, num_steps=20, spacing=spacing)
        theirs = make_sampler(Schedule.from_config(config("euler", timestep_spacing=spacing)), num_steps=20)
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
        assert ours.initial_scale == theirs.initial_scale
    theirs = make_sampler(Schedule.from_config(config("euler", use_karras_sigmas=True)), num_steps=20)
    np.testing.assert_array_equal(make_sampler(schedule, num_steps=20, karras=True).timesteps, theirs.timesteps)


def test_the_grids_of_the_papers():
    schedule = Schedule.from_config(SD14)
    assert make_sampler(schedule, "ddim", 50).timesteps.tolist() == list(range(981, 0, -20))
    assert make_sampler(schedule, "ddim", 35).timesteps.tolist() == list(range(953, 0, -28))
    plms = make_sampler(schedule, "plms", 50)
    assert plms.timesteps.tolist() == [981, 961, *range(961, 0, -20)] and len(plms.timesteps) == 51


def test_trailing_grid_never_leaves_the_schedule():
    """diffusers appends a timestep -1 for 62 of the step counts, where a float division rounds up: 61 is the first."""
    schedule = Schedule.from_config(config("ddim", timestep_spacing="trailing"))
    theirs = reference_scheduler("ddim", schedule.config, 61).timesteps.tolist()
    assert theirs[-1] == -1
    assert make_sampler(schedule, num_steps=61).timesteps.tolist() == theirs[:-1]
    for num_steps in range(1, 1001):
        timesteps = make_sampler(schedule, num_steps=num_steps, eta=1.0).timesteps
        assert len(timesteps) == num_steps and timesteps[0] == 999 and (np.diff(timesteps) < 0).all()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("euler_ancestral", "ddpm", "lcm")])
def test_x_after_r_steps_is_at_the_noise_level_of_timestep_r(name):
    """With a network that knows the noise, x stays x0 plus that noise at every step, PNDM's doubled call included."""
    schedule = Schedule.from_config(SD14)
    sampler = make_sampler(schedule, name, 20, spacing="leading")
    x0, noise = jnp.float32(NOISE[0]), jnp.float32(START)
    t = sampler.timesteps.astype(int)
    until = jax.jit(lambda x, stop: run(sampler, lambda x, t: noise, x, stop=stop))
    first = add_noise(schedule, x0, noise, t[0]) / sampler.input_scale[0]
    for stop in (0, 1, 2, 3, 10, len(t) - 1):
        x = until(first, stop) * sampler.input_scale[stop]
        np.testing.assert_allclose(x, add_noise(schedule, x0, noise, t[stop]), atol=1e-4)


def test_one_compilation_for_every_stop():
    sampler = make_sampler(Schedule.from_config(SD14), "ddim", 20)
    until = jax.jit(lambda x, stop: run(sampler, denoise, x, stop=stop))
    found = [until(jnp.float32(START), stop) for stop in (1, 2, 7, 20)]
    assert until._cache_size() == 1
    whole = run(sampler, denoise, jnp.float32(START))
    rest = run(sampler, denoise, found[2], start=7)
    size = np.abs(whole).max()
    np.testing.assert_allclose(found[3] / size, whole / size, atol=2e-6)
    np.testing.assert_allclose(rest / size, whole / size, atol=2e-6)


def test_x_is_kept_in_float32_or_wider():
    sampler = make_sampler(Schedule.from_config(SD14), num_steps=2)
    half = run(sampler, lambda x, t: denoise(x, t).astype(jnp.bfloat16), jnp.bfloat16(START))
    assert half.dtype == jnp.float32
    seen = []
    run(sampler, lambda x, t: (seen.append((x.dtype, t.dtype, t.shape)), denoise(x, t))[1], jnp.float32(START))
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"), ())}


def test_drop_first_starts_lower_with_pure_noise():
    """The 2023 ESD grid: 961, 941, ..., 1, and 49 updates that are the last 49 of the whole grid."""
    whole = make_sampler(Schedule.from_config(SD14), "ddim", 50)
    sampler = drop_first(whole)
    assert sampler.timesteps.tolist() == list(range(961, 0, -20)) and sampler.initial_scale == 1
    x = jnp.float32(START)
    np.testing.assert_allclose(run(sampler, denoise, x), run(whole, denoise, x, start=1), atol=1e-6)
    np.testing.assert_array_equal(drop_first(whole, 0).timesteps, whole.timesteps)
    for other in set(SAMPLERS) - {"ddim"}:
        with pytest.raises(ValueError, match="only sampler 'ddim'"):
            drop_first(make_sampler(Schedule.from_config(SD14), other, 20))
    with pytest.raises(ValueError, match="cannot drop 50 of 50"):
        drop_first(whole, 50)


def test_the_checkpoints_own_sampler_is_the_default():
    for class_name, name in SAMPLER_OF_CLASS.items():
        schedule = Schedule.from_config({"_class_name": class_name, "skip_prk_steps": True})
        assert default_sampler(schedule) == name == make_sampler(schedule, num_steps=3).name
    assert default_sampler(Schedule.from_config({"_class_name": "DDIMParallelScheduler"})) == "ddim"


@pytest.mark.parametrize("class_name", [name for name in OTHER_CLASSES if "Parallel" not in name])
def test_a_class_whose_sampler_is_not_implemented_is_sampled_by_another(class_name):
    schedule = Schedule.from_config({"_class_name": class_name, **BETAS})
    with pytest.raises(ValueError, match=one_line(f"scheduler_config.json names {class_name}", "--sampler=")):
        make_sampler(schedule)
    for name in SAMPLERS:
        assert make_sampler(schedule, name, 20).name == name


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("ddim", {"thresholding": True}, "thresholding=True"),
        ("pndm", {"skip_prk_steps": False}, "skip_prk_steps=False"),
        ("pndm", {"skip_prk_steps": None}, "skip_prk_steps=False"),
        ("pndm", X0, "'sample'"),
        ("lms", {"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ("euler", {"use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type=log_linear"),
        ("euler", {"timestep_type": "continuous"}, "timestep_type=continuous"),
        ("euler", {"final_sigmas_type": "one"}, "final_sigmas_type 'one'"),
        ("euler_ancestral", X0, "'sample'"),
        ("lcm", {"original_inference_steps": 10}, "'lcm' makes at most 10 steps .* not 20"),
        ("lcm", {"rescale_betas_zero_snr": True}, "'lcm' would divide by zero at timestep 999"),
        ("dpmpp_2m", {"solver_order": 3}, "solver_order=3"),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver"}, "algorithm_type=dpmsolver"),
        ("dpmpp_2m", {"solver_type": "bh3"}, "solver_type=bh3"),
        ("unipc", {"solver_type": "bh3"}, "solver_type=bh3"),
        ("unipc", {"solver_order": 4}, "solver_order=4"),
        ("unipc", {"lower_order_final": False}, "lower_order_final to true"),
        ("unipc", {"disable_corrector": ["0"]}, "disable_corrector="),
        ("unipc", {"solver_order": 1.5}, "solver_order=1.5"),
        ("unipc", {"predict_x0": False}, "predict_x0=False"),
        ("ddpm", {"variance_type": "fixed_large"}, "variance_type=fixed_large"),
        ("pndm", V | {"rescale_betas_zero_snr": True}, "'pndm' has no option rescale_betas_zero_snr"),
        ("lms", V | {"rescale_betas_zero_snr": True}, "'lms' has no option rescale_betas_zero_snr"),
        ("heun", V | {"rescale_betas_zero_snr": True}, "'heun' has no option rescale_betas_zero_snr"),
        ("euler", KARRAS | {"sigma_min": -1.0}, "sigma_min=-1 must be above 0"),
        ("dpmpp_2m", KARRAS | {"sigma_max": float("nan")}, "sigma_max=nan must be"),
        ("ddim", {"set_alpha_to_one": "no"}, "set_alpha_to_one='no' must be true or false"),
        ("dpmpp_2m", {"variance_type": "learned_range"}, "variance_type=learned"),
        ("dpmpp_2m", {"use_lu_lambdas": True}, "use_lu_lambdas=True"),
        ("dpmpp_2m", {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        # alpha_bar = 0 on the grid
        ("ddim", TRAILING | {"rescale_betas_zero_snr": True}, "'ddim' would divide by zero at timestep 999"),
        ("pndm", V | TRAILING | {"trained_betas": "zero_snr"}, "'pndm' would divide by zero at timestep 999"),
        ("lms", V | {"trained_betas": "zero_snr"}, "'lms' would divide by zero at timestep 999"),
        ("euler", V | {"trained_betas": "zero_snr"}, "'euler' would divide by zero at timestep 999"),
        ("dpmpp_2m", V | KARRAS | {"trained_betas": "zero_snr"}, "'dpmpp_2m' would divide by zero"),
    ],
    ids=name_of,
)
def test_what_is_not_implemented_is_refused_by_name(name, options, named):
    if options.get("trained_betas"):
        options = options | {"trained_betas": rescaled_betas()}
    schedule = Schedule.from_config(config(name, **options))
    with pytest.raises(ValueError, match=named):
        make_sampler(schedule, num_steps=20)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"name": "deis"}, "unknown sampler 'deis': known are ddim, pndm"),
        ({"num_steps": 0}, "num_steps must be in 1..1000, not 0"),
        ({"num_steps": 1001}, "num_steps must be in 1..1000, not 1001"),
        ({"num_steps": 1000}, r"visit timestep 1000, outside 0..999 \(steps_offset is 1\)"),
        ({"num_steps": 1000, "name": "pndm"}, "visit timestep 1000"),
        ({"num_steps": 1000, "name": "euler", "spacing": "leading"}, "visit timestep 1000"),
        ({"num_steps": 1000, "name": "dpmpp_2m"}, "share a noise level"),
        ({"spacing": "uniform"}, "unknown timestep spacing 'uniform'"),
        ({"eta": 1.5}, "eta must be in 0..1"),
        ({"eta": 0.5, "name": "euler"}, "not 0.5 for 'euler'"),
        ({"karras": True}, "'ddim' has no Karras noise levels"),
    ],
    ids=name_of,
)
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        make_sampler(Schedule.from_config(SD14), **{"name": "ddim"} | settings)


def test_impossible_runs_are_refused():
    schedule = Schedule.from_config(SD14)
    x = jnp.float32(START)
    ddim = make_sampler(schedule, "ddim", 20)
    for bounds in ({"stop": 21}, {"stop": -1}, {"start": 3, "stop": 2}):
        with pytest.raises(ValueError, match="cannot run steps"):
            run(ddim, denoise, x, **bounds)
    for name in ("pndm", "lms", "dpmpp_2m"):
        with pytest.raises(ValueError, match="can only start at 0"):
            run(make_sampler(schedule, name, 20), denoise, x, start=2)
    for sampler in (make_sampler(schedule, "ddim", 20, eta=1.0), make_sampler(schedule, "euler_ancestral", 20)):
        with pytest.raises(ValueError, match="needs step_noise"):
            run(sampler, denoise, x)


def test_a_parallel_variant_is_the_class_that_it_batches():
    raw = config("ddpm", variance_type="fixed_large")
    for class_name in ("DDPMScheduler", "DDPMParallelScheduler"):
        with pytest.raises(ValueError, match="variance_type=fixed_large is not implemented"):
            make_sampler(Schedule.from_config({**raw, "_class_name": class_name}), num_steps=5)


def test_a_trajectory_keeps_a_spacing_that_is_no_class_default():
    for class_name in (
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "DDPMParallelScheduler",
        "TCDScheduler",
        "LCMScheduler",
    ):
        schedule = Schedule.from_config({**SD14, "_class_name": class_name, "timestep_spacing": "linspace"})
        assert list(trajectories.deterministic(schedule, "ddim", 4).timesteps) == [999, 666, 333, 0], class_name
    for steps in (2, 3):
        with pytest.raises(ValueError, match="'heun' calls the network twice"):
            trajectories.deterministic(Schedule.from_config(SD14), "heun", steps)
