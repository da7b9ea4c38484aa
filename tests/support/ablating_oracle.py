"""Ablating Concepts in torch, one training step: the oracle of `test_ablating.py`.

Written from the equations and quirks of the released codes, which are only described here: the loss of an example is
the sum of the masked squares over channels and pixels, divided by the mask's area alone, and so `channels` times their
mean; the prior term of the first code has the same factor. Tensors are NCHW.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import esd_oracle
import numpy as np
import torch
from attention_oracle import ByHand
from torch import Tensor

CHANNELS = 4


@dataclass(frozen=True)
class Noised:
    """Latents, their masks, the timestep and noise of each, and captions."""

    latents: Tensor
    mask: Tensor
    t: Tensor
    noise: Tensor
    texts: Sequence[str]

    @property
    def x(self) -> Tensor:
        a = esd_oracle.ALPHA_BAR[self.t][:, None, None, None].to(self.noise.dtype)
        return a.sqrt() * self.latents + (1 - a).sqrt() * self.noise


def detaching(unet: torch.nn.Module, tokens: int, first: bool = True) -> torch.nn.Module:
    """A copy of a UNet in whose cross-attention the first token's keys and values get no gradient."""
    unet = copy.deepcopy(unet)
    detach = np.arange(tokens)[None] == 0 if first else None
    unet.set_attn_processor(
        {
            name: ByHand(detach=detach) if "attn2" in name else diffusers.models.attention_processor.AttnProcessor()
            for name in unet.attn_processors
        }
    )
    return unet


def predict(models: esd_oracle.Models, unet: torch.nn.Module, noised: Noised, texts: Sequence[str]) -> Tensor:
    return unet(noised.x, noised.t, models.encode(texts)).sample


def target(models: esd_oracle.Models, unet: torch.nn.Module | None, ablated: Noised, anchors: Sequence[str]) -> Tensor:
    """Model-based: what `unet` predicts under the anchor's captions. Noise-based, without a UNet: the noise."""
    if unet is None:
        return ablated.noise
    with torch.no_grad():
        return predict(models, unet, ablated, anchors)


def loss(
    models: esd_oracle.Models,
    student: torch.nn.Module,
    ablated: Noised,
    wanted: Tensor,
    prior: Noised | None = None,
    weight: float = 0.0,
) -> Tensor:
    """The released loss, divided by its factor."""

    def area_mean(noised: Noised, wanted: Tensor) -> Tensor:
        squares = noised.mask * (predict(models, student, noised, noised.texts) - wanted) ** 2
        return (squares.sum([1, 2, 3]) / noised.mask.sum([1, 2, 3])).mean()

    value = area_mean(ablated, wanted)
    if prior is not None:
        value = value + weight * area_mean(prior, prior.noise)
    return value / CHANNELS


def clip(parameters: Sequence[Tensor], most: float) -> None:
    """Clips the gradients' global norm. torch's own function adds 1e-6 to the norm."""
    norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    for parameter in parameters:
        parameter.grad *= min(1.0, most / norm)
