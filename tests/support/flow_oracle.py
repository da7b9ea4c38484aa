"""One update of ESD on a flow-matching transformer in torch, from the equations: the oracle of `test_esd_flow.py` and
`test_esd_klein.py`.

    x_t after k steps of Euler's method from noise, by the teacher, for the concept
    target = v*(x_t, anchor) - eta [v*(x_t, c) - v*(x_t, "")]
    loss = mean (v_theta(x_t, c) - target)^2

FLUX.1 [dev] samples at one scale of guidance, an input of the network, and is scored at another; SD3 and FLUX.2 [klein]
are sampled with classifier-free guidance. Everything is NCHW.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

Velocity = Callable[[torch.nn.Module, Tensor, Tensor, Sequence[str], float | None], Tensor]


@dataclass(frozen=True)
class Update:
    x: Tensor
    t: float
    target: Tensor
    loss: Tensor


def flux(pipe: diffusers.FluxPipeline, tokens: int) -> Velocity:
    """v of a [dev] or [schnell] transformer; its conditioning is the pipeline's."""

    def velocity(transformer, x, t, prompts, guidance):
        n, channels, height, width = x.shape
        with torch.no_grad():
            embeddings, pooled, text_ids = pipe.encode_prompt(list(prompts), max_sequence_length=tokens)
        packed = transformer(
            pipe._pack_latents(x, n, channels, height, width),
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            timestep=t.expand(n) / 1000,
            img_ids=pipe._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", x.dtype),
            txt_ids=text_ids,
            guidance=torch.full([n], guidance) if transformer.config.guidance_embeds else None,
        ).sample
        factor = pipe.vae_scale_factor
        return pipe._unpack_latents(packed, height * factor, width * factor, factor)

    return velocity


def sd3(pipe: diffusers.StableDiffusion3Pipeline) -> Velocity:
    """v of SD3's transformer."""

    def velocity(transformer, x, t, prompts, guidance):
        with torch.no_grad():
            embeddings, _, pooled, _ = pipe.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=False)
        return transformer(x, embeddings, pooled, t.expand(len(x))).sample

    return velocity


def klein(pipe: diffusers.Flux2KleinPipeline, layers: Sequence[int]) -> Velocity:
    """v of FLUX.2 [klein]'s transformer, of hidden states after these layers of its text encoder."""

    def velocity(transformer, x, t, prompts, guidance):
        with torch.no_grad():
            embeddings, text_ids = pipe.encode_prompt(list(prompts), text_encoder_out_layers=layers)
        packed = transformer(
            pipe._pack_latents(x),
            encoder_hidden_states=embeddings,
            timestep=t.expand(len(x)) / 1000,
            img_ids=pipe._prepare_latent_ids(x),
            txt_ids=text_ids,
        ).sample
        return packed.transpose(1, 2).reshape(x.shape)

    return velocity


def update(
    velocity: Velocity,
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    scheduler: diffusers.SchedulerMixin,
    noise: Tensor,
    k: int,
    concepts: Sequence[str],
    *,
    sampling_guidance: float,
    distilled: bool,
    eta: float = 1.0,
    train_guidance: float = 1.0,
) -> Update:
    """scheduler: set to its timesteps. The anchor is the empty prompt."""
    null = [""] * len(concepts)
    with torch.no_grad():
        x = noise
        for t in scheduler.timesteps[:k]:
            if distilled:
                v = velocity(teacher, x, t, concepts, sampling_guidance)
            else:
                v_null, v_c = (velocity(teacher, x, t, prompts, None) for prompts in (null, concepts))
                v = v_null + sampling_guidance * (v_c - v_null)
            x = scheduler.step(v, t, x).prev_sample
        t = scheduler.timesteps[k]
        v_null, v_c = (velocity(teacher, x, t, prompts, train_guidance) for prompts in (null, concepts))
        target = v_null - eta * (v_c - v_null)
    loss = torch.nn.functional.mse_loss(velocity(student, x, t, concepts, train_guidance), target)
    return Update(x, float(t), target, loss)
