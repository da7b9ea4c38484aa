"""Folders of tiny pipelines whose schedulers and configs are changed, opened here and by diffusers."""

import json
import warnings
from functools import cache

import diffusers
import factories
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch_oracle import to_nchw

from esd_jax.diffusion import guidance, samplers
from esd_jax.io import configs, corrections
from esd_jax.models import vae

SD = "StableDiffusionPipeline"
CLASS_OF = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
}
# A folder's scheduler: as its class is made, with the betas of Stable Diffusion, and saved.
SAVED = {
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "EulerAncestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "LMS": (diffusers.LMSDiscreteScheduler, {}),
    "DPM++": (diffusers.DPMSolverMultistepScheduler, {}),
    "DPM++, Karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True, "timestep_spacing": "leading"},
    ),
    "DDIM": (diffusers.DDIMScheduler, {}),
    "DDIM, clipping": (diffusers.DDIMScheduler, {"clip_sample": True, "set_alpha_to_one": False}),
    "DDIM, not clipping": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "DDPM": (diffusers.DDPMScheduler, {}),
    "DEIS": (diffusers.DEISMultistepScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "KDPM2": (diffusers.KDPM2DiscreteScheduler, {}),
    "DPM++ single step": (diffusers.DPMSolverSinglestepScheduler, {}),
    "TCD": (diffusers.TCDScheduler, {}),
    "LCM": (diffusers.LCMScheduler, {}),
}
PROMPTS, STEPS, SCALE = ["a photo of the cat", "dogs, and styles of the cat"], 8, 5.0


def edit_json(path, *gone, **values):
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in gone}))


def set_scheduler(folder, name, *gone, **values):
    """Writes a scheduler as diffusers saves it into a folder, with some fields changed."""
    kind, options = SAVED[name]
    kind(**factories.NOISE, **options).save_pretrained(folder / "scheduler")
    edit_json(folder / "scheduler/scheduler_config.json", *gone, **values)
    edit_json(folder / "model_index.json", scheduler=["diffusers", kind.__name__])


def reopened(folder, kind=None):
    """The folder in diffusers, by its own scheduler or by another class made of its config."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    if kind is not None:
        parts = {**pipe.components, "scheduler": kind.from_config(pipe.scheduler.config)}
        pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def theirs(pipe, latents):
    """Images [n, height, width, 3] in 0..1."""
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "np"}
    return pipe(PROMPTS, latents=to_nchw(latents), **options).images


@cache
def guided(network):
    def both(params, x, t, condition, null):
        return guidance.classifier_free(lambda x, t, c: network.apply(params, x, t, c), condition, null, SCALE)(x, t)

    return jax.jit(both)


@cache
def decoder(network, config):
    return jax.jit(lambda params, latents: network.apply(params, vae.unscale(config, latents), "decode"))


def ours(base, schedule, name, latents):
    """The same by a sampler of ours; all of them share one compilation of the network."""
    sampler = samplers.make_sampler(schedule, name, STEPS)
    encoded = [base.encode_prompts(texts) for texts in (PROMPTS, [""] * len(PROMPTS))]
    network = guided(base.network("unet"))
    latents = steps_of(sampler, lambda x, t: network(base.params["unet"], x, t, *encoded), latents)
    decode = decoder(base.network("vae"), base.configs["vae"])
    return np.clip(np.asarray(decode(base.params["vae"], latents)) * 0.5 + 0.5, 0, 1)


def quietly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", corrections.Corrected)
        return configs.read_architecture(folder)


def steps_of(sampler, denoise, x):
    """A sampler's whole run, a loop in Python."""
    carry = sampler.init(jnp.asarray(x) * sampler.initial_scale)
    for i, t in enumerate(sampler.timesteps):
        output = denoise(carry[0] * np.float32(sampler.input_scale[i]), np.float32(t))
        carry = sampler.step(carry, i, output, None)
    return carry[0]


def told(action, *words):
    """What an action returns; it says so many lines, each with its words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", corrections.Corrected)
        result = action()
    lines = [str(warning.message) for warning in caught if issubclass(warning.category, corrections.Corrected)]
    assert len(lines) == len(words), lines
    for line, word in zip(lines, words, strict=True):
        assert word in line and "\n" not in line
    return result
