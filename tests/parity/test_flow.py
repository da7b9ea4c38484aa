"""The schedule of a rectified flow, and Euler's method along it, against diffusers' scheduler class."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from messages import one_line
from sampler_oracle import SD14, START, denoise, denoise_torch

from esd_jax.diffusion.flow import FlowSchedule
from esd_jax.diffusion.samplers import SAMPLERS, default_sampler, make_sampler, run
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing import trajectories

CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
DEV = CLASS | {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
}  # fmt: skip
SCHNELL = DEV | {"shift": 1.0, "use_dynamic_shifting": False}
SD3 = CLASS | {"num_train_timesteps": 1000, "shift": 3.0}
# (config, whether the pipeline asks for an even grid, image tokens)
CASES = {
    "dev": (DEV, True, 4096),
    "dev-512": (DEV, True, 1024),
    "schnell": (SCHNELL, True, 1024),
    "sd3": (SD3, False, 4096),
    "dynamic-sd3": (DEV, False, 1024),
    "linear": (DEV | {"time_shift_type": "linear"}, True, 2304),
    "defaults": (CLASS | {"num_train_timesteps": 500}, False, 4096),
}


def reference(config, even, tokens, num_steps):
    """The scheduler as `FluxPipeline`, or `StableDiffusion3Pipeline`, sets it."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    options = {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)} if even else {}
    if scheduler.config.use_dynamic_shifting:
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        options["mu"] = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(num_steps, **options)
    return scheduler


def ours(case):
    config, even, tokens = CASES[case]
    return FlowSchedule.from_config(config, even).at(tokens)


@pytest.mark.parametrize("case", CASES)
def test_grids_are_those_of_diffusers(case):
    total = CASES[case][0].get("num_train_timesteps", 1000)
    for num_steps in (1, 2, 3, 4, 5, 17, 28, 50, 333):
        scheduler, sampler = reference(*CASES[case], num_steps), make_sampler(ours(case), num_steps=num_steps)
        np.testing.assert_allclose(ours(case).visited(num_steps), scheduler.sigmas[:-1], rtol=0, atol=3e-7)
        np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps, rtol=0, atol=3e-7 * total)
        assert sampler.initial_scale == 1 and np.all(sampler.input_scale == 1) and not sampler.stochastic


def test_grids_are_the_published_ones():
    """As Black Forest Labs' `get_schedule` and Stability's `get_sigmas` have them."""

    def ends(case, num_steps, count):
        sigma = ours(case).visited(num_steps)
        return np.round([*sigma[:count], *sigma[-count:]], 5)

    np.testing.assert_allclose(ends("dev", 28, 3), [1, 0.98841, 0.97622, 0.27483, 0.19545, 0.10472], atol=1e-5)
    np.testing.assert_allclose(ends("dev-512", 28, 3), [1, 0.98066, 0.96064, 0.18388, 0.1262, 0.06502], atol=1e-5)
    assert ours("schnell").visited(4).tolist() == [1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(1000 * ours("sd3").visited(4), [1000, 857.69, 602.15, 8.93], atol=6e-3)
    np.testing.assert_allclose(ends("sd3", 28, 3), [1, 0.98738, 0.97411, 0.19983, 0.11091, 0.00893], atol=1e-5)
    shifts = {256: 0.5, 1024: 0.63, 2304: 2542 / 3000, 4096: 1.15}
    for tokens, mu in shifts.items():
        assert np.log(ours("dev").shift_at(tokens)) == pytest.approx(mu, abs=1e-3)


def test_levels_are_those_of_training():
    """sigma of the class's own timesteps: shifted, unless the shift depends on the image."""
    for case in CASES:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(CASES[case][0])
        np.testing.assert_allclose(ours(case).levels[::-1], scheduler.sigmas, rtol=0, atol=3e-7)


@pytest.mark.parametrize("num_steps", [3, 4, 28, 50])
@pytest.mark.parametrize("case", ["dev", "schnell", "sd3"])
def test_trajectories_are_those_of_diffusers(case, num_steps):
    scheduler, sampler = reference(*CASES[case], num_steps), make_sampler(ours(case), num_steps=num_steps)
    theirs = torch.tensor(START, dtype=torch.float32).permute(0, 3, 1, 2)
    until = jax.jit(lambda x, stop: run(sampler, denoise, x, stop=stop))
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(denoise_torch(theirs, t), t, theirs).prev_sample
        mine = until(jnp.float32(START), i + 1)
        expected = theirs.permute(0, 2, 3, 1).numpy()
        assert np.abs(mine - expected).max() <= 1e-5 * np.abs(expected).max()
    assert until._cache_size() == 1


def test_noise_is_added_at_sigma():
    scheduler, schedule = reference(*CASES["sd3"], 7), ours("sd3")
    x0, noise = (np.random.default_rng(i).normal(size=(3, 2, 2, 4)).astype(np.float32) for i in range(2))
    t = scheduler.timesteps[[0, 2, 6]]
    expected = scheduler.scale_noise(torch.tensor(x0), t, torch.tensor(noise))
    np.testing.assert_allclose(add_noise(schedule, x0, noise, t.numpy()), expected, atol=1e-6)
    np.testing.assert_array_equal(add_noise(schedule, x0, noise, 1000), noise)
    np.testing.assert_array_equal(add_noise(schedule, x0, noise, 0.0), x0)
    for t in (1000.5, -1.0, np.nan):
        with pytest.raises(ValueError, match=one_line("outside 0..1000")):
            add_noise(schedule, x0, noise, t)


def test_a_method_scores_x_at_the_samplers_own_levels():
    trajectory = trajectories.of_mode(ours("dev"), "grid", "flow_euler", 5)
    index, t = trajectory.draw(jax.random.key(3))
    assert trajectory.scored_where_sampled and t == np.float32(1000 * ours("dev").visited(5)[int(index)])
    with pytest.raises(ValueError, match=one_line("timestep_mode='compvis'", "'grid'")):
        trajectories.of_mode(ours("dev"), "compvis", "flow_euler", 5)


def test_equal_schedules_are_equal():
    assert ours("dev") == ours("dev") and hash(ours("dev")) == hash(ours("dev"))
    different = [
        ours("dev"),
        ours("dev-512"),
        FlowSchedule.from_config(DEV, even=True),
        ours("dynamic-sd3"),
        ours("sd3"),
    ]
    assert len({*different}) == len(different)
    assert FlowSchedule.from_config(SD3) == ours("sd3")  # whose shift does not depend on the image


def test_the_names_of_the_sampler():
    assert default_sampler(ours("dev")) == "flow_euler" in SAMPLERS
    assert make_sampler(ours("sd3"), "euler", 3).name == "flow_euler"
    for name in set(SAMPLERS) - {"euler", "flow_euler"}:
        with pytest.raises(ValueError, match=one_line(f"'{name}'", "rectified flow", "use flow_euler")):
            make_sampler(ours("sd3"), name, 3)
    for options, named in (({"karras": True}, "Karras"), ({"spacing": "trailing"}, "'trailing'")):
        with pytest.raises(ValueError, match=one_line(named, "use flow_euler")):
            make_sampler(ours("sd3"), "euler", 3, **options)
    with pytest.raises(ValueError, match=one_line("'flow_euler'", "variance-preserving")):
        make_sampler(Schedule.from_config(SD14), "flow_euler", 3)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "'FlowMatchHeunDiscreteScheduler'"),
        ({"invert_sigmas": True}, "invert_sigmas=True"),
        ({"shift_terminal": 0.1}, "shift_terminal=0.1"),
        ({"stochastic_sampling": True}, "stochastic_sampling=True"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({"shift": 0}, "shift=0"),
        ({"shift": "3"}, "shift='3'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"time_shift_type": "square"}, "'square'"),
        ({"max_image_seq_len": 256}, "max_image_seq_len"),
        ({"max_shift": float("inf")}, "max_shift"),
        ({"max_shift": 1e9}, "max_shift"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=one_line(named)):
        FlowSchedule.from_config(DEV | change)


def test_switches_that_are_off_are_passed_over():
    off = {"invert_sigmas": False, "shift_terminal": None, "use_beta_sigmas": None, "max_shift": 1.15}
    np.testing.assert_array_equal(FlowSchedule.from_config(SD3 | off).visited(5), ours("sd3").visited(5))


def test_an_unknown_size_is_an_error():
    with pytest.raises(ValueError, match=one_line("image size", "use_dynamic_shifting")):
        make_sampler(FlowSchedule.from_config(DEV, even=True), num_steps=4)
