"""The timesteps of samplers against diffusers, what they keep, and what they refuse."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from messages import one_line
from sampler_oracle import (
    BETAS,
    CLASS_OF_SAMPLER,
    DISCRETE,
    KARRAS,
    LEADING,
    NOISE,
    SD14,
    START,
    TRAILING,
    X0,
    V,
    config,
    denoise,
    name_of,
    reference_scheduler,
    rescaled_betas,
)

from esd_jax.diffusion.samplers import default_sampler, drop_first, make_sampler, run
from esd_jax.diffusion.schedule import OTHER_CLASSES, SAMPLER_OF_CLASS, Schedule, add_noise
from esd_jax.erasing import trajectories

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", DISCRETE)
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
        scaled = scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])
        assert sampler.input_scale[0] == pytest.approx(float(scaled), rel=3.5e-5)
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


@pytest.mark.parametrize("name", [name for name in DISCRETE if name not in ("euler_ancestral", "ddpm", "lcm")])
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
    results = [until(jnp.float32(START), stop) for stop in (1, 2, 7, 20)]
    assert until._cache_size() == 1
    whole = run(sampler, denoise, jnp.float32(START))
    rest = run(sampler, denoise, results[2], start=7)
    size = np.abs(whole).max()
    np.testing.assert_allclose(results[3] / size, whole / size, atol=2e-6)
    np.testing.assert_allclose(rest / size, whole / size, atol=2e-6)


def test_x_is_kept_in_float32_or_wider():
    sampler = make_sampler(Schedule.from_config(SD14), num_steps=2)
    half = run(sampler, lambda x, t: denoise(x, t).astype(jnp.bfloat16), jnp.bfloat16(START))
    assert half.dtype == jnp.float32
    calls = []
    run(sampler, lambda x, t: (calls.append((x.dtype, t.dtype, t.shape)), denoise(x, t))[1], jnp.float32(START))
    assert set(calls) == {(jnp.dtype("float32"), jnp.dtype("float32"), ())}


def test_drop_first_starts_lower_with_pure_noise():
    """The 2023 ESD grid: 961, 941, ..., 1, and 49 updates that are the last 49 of the whole grid."""
    whole = make_sampler(Schedule.from_config(SD14), "ddim", 50)
    sampler = drop_first(whole)
    assert sampler.timesteps.tolist() == list(range(961, 0, -20)) and sampler.initial_scale == 1
    x = jnp.float32(START)
    np.testing.assert_allclose(run(sampler, denoise, x), run(whole, denoise, x, start=1), atol=1e-6)
    np.testing.assert_array_equal(drop_first(whole, 0).timesteps, whole.timesteps)
    for other in set(DISCRETE) - {"ddim"}:
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
    for name in DISCRETE:
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
