"""The noise schedule against the diffusers classes that write its config."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from esd_jax.diffusion.path import to_x0_eps
from esd_jax.diffusion.samplers import make_sampler
from esd_jax.diffusion.schedule import OTHER_CLASSES, SAMPLER_OF_CLASS, Schedule, add_noise

pytestmark = pytest.mark.filterwarnings("ignore:__array")  # diffusers with numpy 2

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAINED = (np.linspace(0.02, 0.3, 40) ** 2).tolist()
ZERO_SNR_CLASSES = [
    name for name in SAMPLER_OF_CLASS if name not in ("PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler")
]


def config(class_name="DDIMScheduler", **options):
    return {"_class_name": class_name, **options}


# IPNDM keeps no alphas_cumprod, and DPMSolverSDE needs one library more.
WITH_ALPHAS = [n for n in (*SAMPLER_OF_CLASS, *OTHER_CLASSES) if n not in ("IPNDMScheduler", "DPMSolverSDEScheduler")]


@pytest.mark.parametrize("class_name", WITH_ALPHAS)
@pytest.mark.parametrize(
    "options",
    [
        {},  # the class defaults
        STABLE_DIFFUSION,
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
        {"trained_betas": TRAINED, "num_train_timesteps": 40},
        {**STABLE_DIFFUSION, "trained_betas": None, "num_train_timesteps": 500},
    ],
)
def test_alpha_bar_is_that_of_every_class(class_name, options):
    known = {key: value for key, value in options.items() if value is not None}
    theirs = getattr(diffusers, class_name)(**known).alphas_cumprod.numpy()
    ours = Schedule.from_config(config(class_name, **options))
    assert ours.alpha_bar.dtype == np.float64 and ours.num_train_timesteps == len(theirs)
    assert ours.prediction_type == "epsilon"
    np.testing.assert_allclose(ours.alpha_bar, theirs, rtol=2e-5)  # they multiply up to 1000 factors in float32


@pytest.mark.parametrize("class_name", ZERO_SNR_CLASSES)
def test_zero_terminal_snr(class_name):
    options = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True}
    theirs = getattr(diffusers, class_name)(**options).alphas_cumprod.numpy()
    ours = Schedule.from_config(config(class_name, **options)).alpha_bar
    assert ours[-1] == 0
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=1e-4, atol=1e-7)
    assert theirs[-1] == (0 if class_name in ("DDIMScheduler", "DDPMScheduler", "LCMScheduler") else 2**-24)


def test_signal_that_float32_does_not_hold_is_none():
    """The sigma samplers would divide by it; no such noise level is drawn from."""
    schedule = Schedule.from_config(config(beta_start=0.5, beta_end=0.6))
    assert schedule.alpha_bar[-1] == 0 and schedule.alpha_bar[50] > 0
    with pytest.raises(ValueError, match="divide by zero at timestep 999"):
        make_sampler(schedule, "euler", 20)


def test_stable_diffusion_constants():
    alpha_bar = Schedule.from_config(config(**STABLE_DIFFUSION)).alpha_bar
    assert alpha_bar[0] == 1 - 0.00085
    assert alpha_bar[999] == pytest.approx(0.0046601, rel=1e-4)
    with pytest.raises(ValueError, match="read-only"):
        alpha_bar[0] = 1


def test_config_is_kept_and_missing_options_take_the_default():
    raw = config(steps_offset=1, clip_sample=False, sigma_min=None, set_alpha_to_one=None, something_new=3)
    schedule = Schedule.from_config(raw)
    assert schedule.config == raw
    assert schedule.option("steps_offset", 0) == 1
    assert schedule.option("clip_sample", True) is False
    assert schedule.option("sigma_min", 7) == 7 and schedule.option("absent", "x") == "x"
    assert schedule.option("set_alpha_to_one", True) is False  # a null switch is off


@pytest.mark.parametrize(
    "raw, named",
    [
        ({}, "scheduler class None"),
        (config("FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler"),
        (config(beta_schedule="sigmoid"), "sigmoid"),
        (config(prediction_type="flow_prediction"), "flow_prediction"),
        (config(timestep_spacing="quadratic"), "quadratic"),
        (config(use_flow_sigmas=True), "flow matching, is not implemented"),
        (config("EDMEulerScheduler"), "'EDMEulerScheduler' is not implemented"),
        (config("IPNDMScheduler"), "says nothing of the betas"),
        (config(rescale_betas_zero_snr=True, num_train_timesteps=1), "more than one noise level"),
        (config(beta_start=None), "field beta_start=None must be"),
        (config(prediction_type=None), "field prediction_type=None must be"),
        (config(beta_start=-0.1), "betas must be above 0"),
        (config(beta_end=float("nan")), "field beta_end=nan must be"),
        (config(beta_end="0.02"), "field beta_end='0.02' must be"),
        (config(num_train_timesteps=True), "field num_train_timesteps=True must be"),
        (config(num_train_timesteps=10**400), "field num_train_timesteps=1000"),
        (config(num_train_timesteps=0), "no number of timesteps"),
        (config(rescale_betas_zero_snr=1), "rescale_betas_zero_snr=1 must be true or false"),
        (config(trained_betas=[0.1, 0.2], num_train_timesteps=3), r"trained_betas has shape \(2,\)"),
        (config(trained_betas=[0.1, 1.2], num_train_timesteps=2), "betas must be above 0 and at most 1"),
        (config(trained_betas=[0.1, float("nan")], num_train_timesteps=2), "trained_betas must be a list of numbers"),
        (config(trained_betas="0.1"), "trained_betas must be a list of numbers"),
    ],
)
def test_what_is_not_known_is_refused_by_name(raw, named):
    with pytest.raises(ValueError, match=named):
        Schedule.from_config(raw)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_pair_is_read_off_every_prediction(prediction_type):
    x0, eps = (jax.random.normal(key, (3, 4, 4, 2)) for key in jax.random.split(jax.random.key(0)))
    alpha_bar = jnp.array([0.9, 0.5, 0.05]).reshape(3, 1, 1, 1)
    x = jnp.sqrt(alpha_bar) * x0 + jnp.sqrt(1 - alpha_bar) * eps
    v = jnp.sqrt(alpha_bar) * eps - jnp.sqrt(1 - alpha_bar) * x0
    output = {"epsilon": eps, "v_prediction": v, "sample": x0}[prediction_type]
    for actual, true in zip(to_x0_eps(prediction_type, alpha_bar, x, output), (x0, eps), strict=True):
        np.testing.assert_allclose(actual, true, atol=3e-6)
    half = to_x0_eps(prediction_type, 0.5, x.astype(jnp.bfloat16), output.astype(jnp.bfloat16))
    assert {array.dtype for array in half} == {jnp.dtype("float32")}


@pytest.mark.parametrize("alpha_bar, expected", [(0.0, (-1, 1)), (1.0, (1, 1))])
def test_v_prediction_stands_both_ends(alpha_bar, expected):
    one = jnp.ones((1, 2))
    pair = to_x0_eps("v_prediction", alpha_bar, one, one)
    assert [float(array[0, 0]) for array in pair] == [expected[0], expected[1]]


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'velocity'"):
        to_x0_eps("velocity", 0.5, jnp.ones(2), jnp.ones(2))


def test_add_noise_is_that_of_diffusers_for_scalar_batch_and_traced_t():
    schedule = Schedule.from_config(config(**STABLE_DIFFUSION))
    theirs = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    t = np.array([0, 500, 999])
    expected = theirs.add_noise(torch.tensor(x0), torch.tensor(noise), torch.tensor(t)).numpy()
    x0, noise = jnp.asarray(x0), jnp.asarray(noise)
    np.testing.assert_allclose(add_noise(schedule, x0, noise, t), expected, atol=2e-6)
    np.testing.assert_allclose(add_noise(schedule, x0, noise, 500)[1], expected[1], atol=2e-6)
    traced = jax.jit(lambda t: add_noise(schedule, x0, noise, t))
    np.testing.assert_allclose(traced(t), expected, atol=2e-6)
    np.testing.assert_allclose(traced(999)[2], expected[2], atol=2e-6)


@pytest.mark.parametrize(
    "t, named", [(1000, "1000 is outside 0..999"), (np.array([3, -1]), "outside"), (1.5, "integer")]
)
def test_add_noise_refuses_what_the_gather_would_clamp(t, named):
    schedule = Schedule.from_config(config())
    with pytest.raises(ValueError, match=named):
        add_noise(schedule, jnp.ones((2, 3)), jnp.ones((2, 3)), t)
