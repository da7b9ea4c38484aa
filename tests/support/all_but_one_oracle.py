"""Algorithm 1 of All but One in torch, one training step: the oracle of `test_all_but_one.py`.

Written from the paper's equations, with the sampler of diffusers. What a step draws goes in; x_t, its timestep, the
teacher's guidance and the loss come out. Tensors are NCHW.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import esd_oracle
import numpy as np
import torch
from torch import Tensor
from torch_oracle import in_pipeline

T = 35
Order = Sequence[tuple[str, float]]  # the instructions of one example: (c'', g)


@dataclass(frozen=True)
class Paper:
    """gamma_1, gamma_2, lambda; B_c, in sampler steps or, with `tau`, in Algorithm 1's; B_w; kappa.

    whole: the quantile is over all of an example. scales: of the tokens in the teacher's maps; makes delta implicit.
    """

    gamma_1: float = 7.5
    gamma_2: float = 7.5
    penalty: float = 5.0
    high: int = 12
    low: int = 35
    warmup: int = 5
    tau: bool = False
    kappa: float = 0.95
    whole: bool = False
    scales: np.ndarray | None = None


@dataclass(frozen=True)
class Step:
    x: Tensor
    t: int
    guidance: Tensor  # gamma_1 (e*(c) - e*(null)) + delta


def all_but_one(
    models: esd_oracle.Models, concepts: Sequence[str], orders: Sequence[Order], noise: Tensor, i: int, paper: Paper
) -> Step:
    """x_t after i updates, and its guidance."""
    scheduler = esd_oracle.exact(in_pipeline(diffusers.DDIMScheduler(**esd_oracle.SD14)), noise.dtype)
    scheduler.set_timesteps(T)
    suppressed = None if paper.scales is None else attending(models.teacher, torch.from_numpy(paper.scales))
    nothing = [""] * len(concepts)

    def guidance(x: Tensor, step: int) -> Tensor:
        t = int(scheduler.timesteps[step])
        e_null, e_c = models.e_star(x, t, nothing), models.e_star(x, t, concepts)
        if suppressed is not None:
            with torch.no_grad():
                e_suppressed = suppressed(x, torch.tensor(t), models.encode(concepts)).sample
            delta = paper.gamma_1 * (e_suppressed - e_c)
        else:
            delta = explicit(models, x, t, e_null, T - step if paper.tau else step, orders, paper)
        return paper.gamma_1 * (e_c - e_null) + delta

    x, step = noise, 0
    while step != i:
        t = scheduler.timesteps[step]
        x = scheduler.step(models.e_star(x, int(t), nothing) + guidance(x, step), t, x).prev_sample
        step += 1
    return Step(x, int(scheduler.timesteps[i]), guidance(x, i))


def explicit(
    models: esd_oracle.Models, x: Tensor, t: int, e_null: Tensor, count: int, orders: Sequence[Order], paper: Paper
) -> Tensor:
    """The sum over c'' of g beta Delta, example by example."""
    delta = torch.zeros_like(x)
    if not (paper.high <= count <= paper.low and count >= paper.warmup):
        return delta
    for b, order in enumerate(orders):
        for text, g in order:
            direction = models.e_star(x[b : b + 1], t, [text])[0] - e_null[b]
            rows = direction.abs().flatten() if paper.whole else direction.abs().flatten(1)
            threshold = torch.quantile(rows, paper.kappa, dim=-1)
            mask = direction.abs() >= (threshold if paper.whole else threshold[:, None, None])
            delta[b] += g * torch.where(mask, direction, torch.zeros_like(direction))
    return delta


def loss(models: esd_oracle.Models, concepts: Sequence[str], step: Step, paper: Paper) -> Tensor:
    """L_concept + lambda L_penalty, on the student's graph."""
    t, nothing = torch.tensor(step.t), [""] * len(concepts)
    v = models.student(step.x, t, models.encode(concepts)).sample
    u = models.student(step.x, t, models.encode(nothing)).sample
    concept = torch.mean((paper.gamma_2 * (v - u.detach()) - step.guidance) ** 2)
    return concept + paper.penalty * torch.mean((u - models.e_star(step.x, step.t, nothing)) ** 2)


class Reweighted:
    """Attention written out; the maps' columns are multiplied by `scales` [batch, tokens] after softmax."""

    def __init__(self, scales: Tensor):
        self.scales = scales

    def __call__(self, attn, x, encoder_hidden_states=None, **_):
        q, k, v = (
            h.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for h in (attn.to_q(x), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        maps = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1) * self.scales.to(q.dtype)[:, None, None, :]
        return attn.to_out[0]((maps @ v).transpose(1, 2).flatten(-2))


def attending(unet: torch.nn.Module, scales: Tensor) -> torch.nn.Module:
    """A copy whose cross-attentions are re-weighted."""
    unet = copy.deepcopy(unet)
    plain = diffusers.models.attention_processor.AttnProcessor
    unet.set_attn_processor({n: Reweighted(scales) if "attn2" in n else plain() for n in unet.attn_processors})
    return unet
