"""The released SDXL code of ESD in torch, one training step: the oracle of `test_esd_sdxl.py`.

Written from its equations, which are only described here. What it does, with `as_released=True`: its trajectory comes
from diffusers' own pipeline without a negative prompt, which guides from zeros; the null that it scores is the encoded
empty prompt; and it scores x_t as Euler's scheduler keeps it, without `scale_model_input`. Else there is one null, and
x_t is scaled.

Everything goes through diffusers' pipeline: its tokenizers, text encoders, scheduler and sizes. Tensors are NCHW.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

SIZE = (16, 16)  # pixels
Told = tuple[Tensor, Tensor]  # embeddings and pooled, a row per prompt


@dataclass(frozen=True)
class Target:
    """x_t as it is scored, its timestep, what the student is told and what it should say."""

    x: Tensor
    t: Tensor
    told: Told
    target: Tensor


@torch.no_grad()
def step(
    pipe: diffusers.StableDiffusionXLPipeline,
    pairs: Sequence[tuple[str, str | None]],
    noise: Tensor,
    r: int,
    *,
    null: str = "empty",
    as_released: bool = False,
    strength: float = 1.0,
    guidance: float = 2.0,
    steps: int = 50,
) -> Target:
    """One step at entry r of Euler's table. pairs: (what is erased, from where or None)."""
    erased = [text for text, _ in pairs]
    origin = [text if place is None else place for text, place in pairs]
    start = encode(pipe, [""] * len(pairs), zeros=as_released or null == "zeros")
    scored = encode(pipe, [""] * len(pairs), zeros=null == "zeros" and not as_released)

    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x, drawn = noise * scheduler.init_noise_sigma, encode(pipe, origin)
    for t in scheduler.timesteps[:r]:
        scaled = scheduler.scale_model_input(x, t)
        away, towards = (e(pipe.unet, scaled, t, prompt) for prompt in (start, drawn))
        x = scheduler.step(away + guidance * (towards - away), t, x).prev_sample
    t = scheduler.timesteps[r]
    if not as_released:
        scheduler._step_index = None  # it is told the timestep anew
        x = scheduler.scale_model_input(x, t)
    e_0, e_er, e_from = (e(pipe.unet, x, t, prompt) for prompt in (scored, encode(pipe, erased), drawn))
    return Target(x, t, drawn, e_from - strength * (e_er - e_0))


def loss(student: torch.nn.Module, scored: Target) -> Tensor:
    """What the student's gradient is taken of."""
    return torch.nn.functional.mse_loss(e(student, scored.x, scored.t, scored.told), scored.target)


def encode(pipe: diffusers.StableDiffusionXLPipeline, texts: Sequence[str], zeros: bool = False) -> Told:
    """What diffusers' pipeline tells the UNet of prompts; of zeros, what it does without a negative prompt."""
    embeddings, null, pooled, null_pooled = pipe.encode_prompt(list(texts), do_classifier_free_guidance=zeros)
    return (null, null_pooled) if zeros else (embeddings, pooled)


def e(unet: torch.nn.Module, x: Tensor, t: Tensor, prompt: Told) -> Tensor:
    """A UNet's output, told that images are SIZE and not cropped."""
    sizes = torch.tensor([[*SIZE, 0, 0, *SIZE]], dtype=x.dtype).repeat(len(x), 1)
    embeddings, pooled = prompt
    return unet(x, t, embeddings, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
