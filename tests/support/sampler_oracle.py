"""Schedulers of diffusers, and trajectories of theirs and ours."""

import json

import diffusers
import jax.numpy as jnp
import numpy as np
import torch

from esd_jax.diffusion.schedule import SAMPLER_OF_CLASS, Schedule

CLASS_OF_SAMPLER = {name: class_name for class_name, name in SAMPLER_OF_CLASS.items()}
DISCRETE = tuple(CLASS_OF_SAMPLER)  # the samplers of discrete betas
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


def rescaled_betas():
    """Zero terminal SNR as `trained_betas`, for the classes that have no option for it."""
    alpha_bar = Schedule.from_config(config("ddim", rescale_betas_zero_snr=True)).alpha_bar
    return (1 - alpha_bar / np.concatenate([[1], alpha_bar[:-1]])).tolist()


V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
LEADING, LINSPACE, TRAILING = ({"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing"))
KARRAS = {"use_karras_sigmas": True}


def name_of(case):
    return case if isinstance(case, str) else json.dumps(case).translate({ord(c): None for c in '{}" '}) or "defaults"
