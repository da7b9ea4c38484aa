"""The three published ESD codes in torch, one training step each: the oracle of `test_esd.py`.

What a step draws goes in; x_t, the timestep at which it is scored, and the target come out. Written from the equations
and grids of the codes, which are only described here:

- `paper`: the CompVis code of 2023, with its own DDIM loop. x_T ~ N(0, I).
- `esd2025`: the diffusers code of 2025, through diffusers' PNDMScheduler.
- `alt`: the diffusers code of the 2024 demo, through diffusers' DDIMScheduler.

A `pair` is (what is erased, from where); "from where" is None where the concept is erased everywhere. The CompVis code
has no such pairs, and they mean there what they mean in `alt`. Tensors are NCHW.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch_oracle import in_pipeline

SD14 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
BETAS = np.linspace(SD14["beta_start"] ** 0.5, SD14["beta_end"] ** 0.5, 1000) ** 2
ALPHA_BAR = torch.from_numpy(np.cumprod(1 - BETAS))
STEPS = 50

Pair = tuple[str, str | None]
Eps = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Models:
    """student, teacher: (x, t, encoder_hidden_states) -> output with a field `sample`. encode: texts -> embeddings."""

    student: torch.nn.Module
    teacher: torch.nn.Module
    encode: Callable[[Sequence[str]], Tensor]

    def e_star(self, x: Tensor, t: int, texts: Sequence[str]) -> Tensor:
        """The teacher's prediction."""
        with torch.no_grad():
            return self.teacher(x, torch.tensor(t), self.encode(texts)).sample

    def loss(self, x: Tensor, t: int, texts: Sequence[str], target: Tensor) -> Tensor:
        """What the student's gradient is taken of."""
        return torch.nn.functional.mse_loss(self.student(x, torch.tensor(t), self.encode(texts)).sample, target)


@dataclass(frozen=True)
class Target:
    """x_t, its scoring timestep, the student's prompts and what it should say."""

    x: Tensor
    t: int
    prompts: list[str]
    target: Tensor


def paper(
    models: Models,
    pairs: Sequence[Pair],
    noise: Tensor,
    k: int,
    t: int,
    *,
    strength: float = 1.0,
    guidance: float = 3.0,
    anchor: str = "auto",
    image: Tensor | None = None,
) -> Target:
    """k ~ U{0..49} (0 is clean), t ~ U{20k .. 20k+19}: both are drawn outside."""
    erased, origin = split(pairs)
    x = compvis_ddim(guided(models, models.student, erased, guidance), noise, k)
    x = x if image is None else diffused(image, noise, t)
    e0, ep = models.e_star(x, t, [""] * len(pairs)), models.e_star(x, t, erased)
    return Target(x, t, origin, anchored(models, x, t, pairs, anchor) - strength * (ep - e0))


def esd2025(
    models: Models,
    pairs: Sequence[Pair],
    noise: Tensor,
    r: int,
    *,
    strength: float = 2.0,
    guidance: float = 3.0,
    anchor: str = "from",
    image: Tensor | None = None,
) -> Target:
    """r ~ U{0..49} into PNDM's table of 51 timesteps; sampled by the teacher from "from where"."""
    erased, origin = split(pairs)
    scheduler = exact(diffusers.PNDMScheduler(**SD14, skip_prk_steps=True), noise.dtype)
    x = scheduled(scheduler, guided(models, models.teacher, origin, guidance), noise, r)
    t = int(scheduler.timesteps[r])
    x = x if image is None else diffused(image, noise, t)
    e_0, e_er = models.e_star(x, t, [""] * len(pairs)), models.e_star(x, t, erased)
    return Target(x, t, origin, anchored(models, x, t, pairs, anchor) - strength * (e_er - e_0))


def alt(
    models: Models,
    pairs: Sequence[Pair],
    noise: Tensor,
    i: int,
    *,
    strength: float = 2.0,
    guidance: float = 3.0,
    anchor: str = "auto",
    image: Tensor | None = None,
) -> Target:
    """i ~ U{1..48} student DDIM steps on the erased concept; scored at entry i / 50 * 1000 of a 1000-step grid."""
    erased, origin = split(pairs)
    scheduler = exact(in_pipeline(diffusers.DDIMScheduler(**SD14)), noise.dtype)
    x = scheduled(scheduler, guided(models, models.student, erased, guidance), noise, i)
    scheduler.set_timesteps(1000)
    t = int(scheduler.timesteps[int(i / STEPS * 1000)])
    x = x if image is None else diffused(image, noise, t)
    e_0, e_er = models.e_star(x, t, [""] * len(pairs)), models.e_star(x, t, erased)
    return Target(x, t, origin, anchored(models, x, t, pairs, anchor) - strength * (e_er - e_0))


def split(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """What is erased, and from where: by default from itself."""
    return [erased for erased, _ in pairs], [erased if origin is None else origin for erased, origin in pairs]


def anchored(models: Models, x: Tensor, t: int, pairs: Sequence[Pair], anchor: str) -> Tensor:
    """What the target starts from: "null" is e*(null), "from" is e*(from where), "auto" the latter if it differs."""
    erased, origin = split(pairs)
    everywhere = [a == b for a, b in zip(erased, origin, strict=True)]
    if anchor == "null" or (anchor == "auto" and all(everywhere)):
        return models.e_star(x, t, [""] * len(pairs))
    if anchor == "auto":
        origin = ["" if same else text for same, text in zip(everywhere, origin, strict=True)]
    return models.e_star(x, t, origin)


def guided(models: Models, unet: torch.nn.Module, prompts: Sequence[str], scale: float) -> Eps:
    """Classifier-free guidance against the empty prompt: 1 is purely conditional."""
    texts = models.encode([*[""] * len(prompts), *prompts])

    def eps(x: Tensor, t: int) -> Tensor:
        with torch.no_grad():
            null, cond = unet(torch.cat([x, x]), torch.tensor(t), texts).sample.chunk(2)
        return null + scale * (cond - null)

    return eps


def compvis_ddim(eps: Eps, x: Tensor, k: int) -> Tensor:
    """The CompVis sampler as ESD patched it: its noisiest entry is cut off, and it stops "at k"."""
    grid = np.arange(0, 1000, 1000 // STEPS) + 1  # 1, 21, ..., 981
    level, below = ALPHA_BAR[grid], torch.cat([ALPHA_BAR[:1], ALPHA_BAR[grid[:-1]]])
    grid = grid[:-1]  # 981 is dropped: pure noise is taken for 961
    for index in reversed(range(len(grid))):
        e = eps(x, int(grid[index]))
        a, b = level[index].to(x.dtype), below[index].to(x.dtype)
        if SD14.get("prediction_type") == "v_prediction":  # v = sqrt(a) e - sqrt(1 - a) x0
            e = a.sqrt() * e + (1 - a).sqrt() * x
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        x = b.sqrt() * x0 + (1 - b).sqrt() * e
        if index == k - 1:  # never so for k = 0
            break
    return x


def scheduled(scheduler: diffusers.SchedulerMixin, eps: Eps, x: Tensor, updates: int) -> Tensor:
    """The first `updates` entries of a diffusers scheduler."""
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps[:updates]:
        x = scheduler.step(eps(x, int(t)), t, x).prev_sample
    return x


def diffused(image: Tensor, noise: Tensor, t: int) -> Tensor:
    """A memorised image at noise level t, in place of a sample (Sec. 5.4 of the paper)."""
    a = ALPHA_BAR[t].to(noise.dtype)
    return a.sqrt() * image + (1 - a).sqrt() * noise


def exact(scheduler: diffusers.SchedulerMixin, dtype: torch.dtype) -> diffusers.SchedulerMixin:
    """In float64, with the noise levels in float64: diffusers keeps them in float32 whatever the network's dtype."""
    if dtype == torch.float64:
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = ALPHA_BAR, ALPHA_BAR[0]
    return scheduler
