"""Five hundred configs, damaged at random: each means what it means to diffusers, or ends in one clear line.

The seed of a case is its number. A config that diffusers cannot read may be read here where it fails on a field that
the sampler does not need.
"""

import json
import random
from collections import Counter
from functools import cache
from pathlib import Path

import diffusers
import factories
import numpy as np
import pytest
import torch
import transformers
from torch_oracle import in_pipeline

from esd_jax.diffusion import samplers
from esd_jax.diffusion.schedule import OTHER_CLASSES, SAMPLER_OF_CLASS, Schedule
from esd_jax.io import corrections
from esd_jax.io.tensors import torch_shapes
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import VAEConfig
from esd_jax.pipeline import network

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about what it corrects

CLASS_OF = {name: getattr(diffusers, kind) for kind, name in SAMPLER_OF_CLASS.items()}
# The first needs torchsde, and the second is as slow to make as its deterministic kind, which is here.
SKIPPED = ("DPMSolverSDEScheduler", "KDPM2AncestralDiscreteScheduler")
CLASSES = [kind for kind in (*SAMPLER_OF_CLASS, *OTHER_CLASSES) if kind not in SKIPPED]
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
LONGEST = 600  # letters of a message
NONSENSE = (
    float("nan"), float("inf"), -float("inf"), -1, 0, 1, 2, 0.5, -0.5, 1e30, 10**30, 1e-30, True, False, None, "", "x",
    [], [1], [[1]], {}, {"a": 1}, "linear", "zero", "leading", "1", 1.0, 1000, 999,
)  # fmt: skip
WORDS = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "deis"),
    "num_train_timesteps": (1000, 500, 50),
    "steps_offset": (0, 1),
    "beta_start": (0.0001, 0.00085),
    "beta_end": (0.012, 0.02),
}


def damaged(config, others, rng):
    """A config with up to three fields removed, renamed, retyped, or of another value."""
    config = dict(config)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        name = rng.choice(sorted(config))
        change = rng.randrange(6)
        if change == 0:
            del config[name]
        elif change == 1:
            config[name + rng.choice(["_", "s", "2"])] = config.pop(name)
        elif change == 2:
            config[name] = rng.choice(NONSENSE)
        elif change == 3:  # the same, written otherwise
            value = config[name]
            config[name] = rng.choice([str(value), [value], None, float(value) if isinstance(value, int) else value])
        elif change == 4:  # what another class has
            name = rng.choice(sorted(others))
            config[name] = others[name]
        elif known := sorted(WORDS.keys() & config.keys()):
            name = rng.choice(known)
            config[name] = rng.choice(WORDS[name])
        if not config:
            break
    return json.loads(json.dumps(config))


def outcome(action):
    """(what an action returns, None), or (None, its one line); any other error is a failure of the test."""
    try:
        return action(), None
    except (ValueError, OSError) as error:
        text = str(error)
        assert text and "\n" not in text and len(text) <= LONGEST, text
        return None, text


# Schedulers.


@cache
def defaults(kind):
    """A scheduler's config as diffusers writes it, with the betas of Stable Diffusion."""
    noise = {} if kind == "IPNDMScheduler" else factories.NOISE
    return {k: v for k, v in dict(getattr(diffusers, kind)(**noise).config).items() if k != "_use_default_values"}


def reference(kind, config, name, steps):
    """diffusers' scheduler of the sampler `name`, on a grid, made as a pipeline of a folder is given another."""
    loaded = in_pipeline(getattr(diffusers, kind).from_config(config))
    # Stable Diffusion was never published with Runge-Kutta steps, PNDM's class default.
    plms = {"skip_prk_steps": True} if name == "pndm" and "skip_prk_steps" not in config else {}
    scheduler = in_pipeline(CLASS_OF[name].from_config(loaded.config, **plms))
    scheduler.set_timesteps(steps)
    return loaded, scheduler


def check_scheduler(number):
    rng = random.Random(number)
    kind, other = rng.choice(CLASSES), rng.choice(CLASSES)
    config = damaged({k: v for k, v in defaults(kind).items() if not k.startswith("_")}, defaults(other), rng)
    name, steps = rng.choice([*CLASS_OF, "ddim", "euler", "dpmpp_2m", "lms"]), rng.choice([5, 20, 50])
    config = {"_class_name": kind, **{k: v for k, v in config.items() if k != "_class_name"}}
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", kind]}

    def read():
        schedule = Schedule.from_config(corrections.scheduler(index, config, Path("scheduler_config.json")))
        return schedule, samplers.make_sampler(schedule, name, steps)

    ours, refused = outcome(read)
    try:
        loaded, theirs = reference(kind, config, name, steps)
        failed = None
    except Exception as error:  # whatever diffusers fails with
        failed = error
    where = f"{number}: {config}, by {name} in {steps}"
    if ours is None:
        return ("refused by both" if failed else "refused"), refused
    if failed:
        return "read here alone", f"{where}: {type(failed).__name__}: {failed}"
    schedule, scheduler = ours
    # Betas that are left out are those of the class that the network was trained with, whatever samples from it.
    betas = {field: loaded.config[field] for field in BETAS if field in loaded.config}
    zero = bool(loaded.config.get("rescale_betas_zero_snr"))
    alphas = diffusers.DDIMScheduler(**betas, rescale_betas_zero_snr=zero).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(schedule.alpha_bar, alphas, rtol=2e-4, atol=1e-7, err_msg=where)
    assert schedule.prediction_type == theirs.config.prediction_type, where
    timesteps = theirs.timesteps.double().numpy()
    if timesteps[-1] == -1:  # a rounding of theirs, one step too many
        timesteps = timesteps[:-1]
    tolerance = 0 if np.issubdtype(scheduler.timesteps.dtype, np.integer) else 2e-2
    np.testing.assert_allclose(scheduler.timesteps, timesteps, rtol=0, atol=tolerance, err_msg=where)
    if all(field in config for field in ("beta_start", "beta_end", "beta_schedule")):
        assert scheduler.initial_scale == pytest.approx(float(theirs.init_noise_sigma), rel=1e-3), where
    return "the same", where


def tally(check, numbers):
    """How often each outcome is found; raises for the cases that are wrong, all of them."""
    counts, wrong = Counter(), []
    for number in numbers:
        try:
            kind, text = check(number)
            counts[kind] += 1
            print(f"{kind}: {text}")
        except Exception as error:  # what the test is for
            wrong.append(f"{number}: {type(error).__name__}: {error}")
    assert not wrong, "\n\n".join([f"{len(wrong)} of {len(numbers)}", *wrong])
    return counts


def test_schedulers():
    counts = tally(check_scheduler, range(350))
    assert counts["the same"] >= 150 and counts["refused"] <= 90


# Networks.

UNET = {
    "sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2, "cross_attention_dim": 32,
}  # fmt: skip
VAE = {
    "sample_size": 16, "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
TEXT = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 77, "projection_dim": 32, "eos_token_id": 99,
}  # fmt: skip
NETWORKS = {
    "unet": (UNET, UNetConfig, diffusers.UNet2DConditionModel, 70),
    "vae": (VAE, VAEConfig, diffusers.AutoencoderKL, 40),
    "text_encoder": (TEXT, CLIPTextConfig, transformers.CLIPTextModel, 40),
}


def torch_network(component, config):
    """diffusers' network, or transformers', without weights, and its settings."""
    kind = NETWORKS[component][2]
    with torch.device("meta"):
        if component == "text_encoder":
            network = kind(transformers.CLIPTextConfig(**config))
        else:
            network = kind.from_config(config)
    return network, network.config if component != "text_encoder" else network.config.to_dict()


@cache
def network_defaults(component):
    network, config = torch_network(component, NETWORKS[component][0])
    return json.loads(json.dumps({k: v for k, v in dict(config).items() if not k.startswith("_")}))


def check_network(component, number):
    rng, reader = random.Random(number), NETWORKS[component][1]
    whole = network_defaults(component)
    # Most fields of the whole config say that something is off: damage those that shape the network more often.
    config = damaged(whole if rng.random() < 0.3 else NETWORKS[component][0], whole, rng)

    def read():
        correct = getattr(corrections, component)
        settings = reader.from_dict(correct("StableDiffusionPipeline", config, Path("config.json")))
        return settings, torch_shapes(network(settings, "float32"))

    ours, refused = outcome(read)
    where = f"{component} {number}: {config}"
    try:
        torch_net, settings = torch_network(component, config)
        failed = None
    except Exception as error:  # whatever torch fails with
        failed = error
    if ours is None:
        return ("refused by both" if failed else "refused"), f"{where}: {refused}"
    if failed:
        return "read here alone", f"{where}: {type(failed).__name__}: {failed}"
    parsed, shapes = ours
    theirs = {name.removeprefix("text_model."): tuple(value.shape) for name, value in torch_net.state_dict().items()}
    theirs = {name: shape for name, shape in theirs.items() if "position_ids" not in name}
    assert shapes == theirs, where
    for name, value in vars(parsed).items():
        if name in settings and name != "shift_factor":  # which the pipeline does not read
            expected = settings[name]
            assert value == (tuple(expected) if isinstance(expected, list | tuple) else expected), (where, name)
    return "the same", where


@pytest.mark.parametrize("component", NETWORKS)
def test_networks(component):
    counts = tally(lambda number: check_network(component, number), range(NETWORKS[component][3]))
    assert counts["the same"] >= 10
