"""SDD in torch, one training step, and draws by hand."""

import diffusers
import esd_oracle
import jax.numpy as jnp
import torch
from distilled import noise_of
from torch_oracle import in_pipeline

from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.trajectories import Draws

CONCEPTS = (Concept("a cat"), Concept("Van Gogh", replace_with=("a painting",)))
JOINED = "a cat, Van Gogh"


def oracle(
    models: esd_oracle.Models, anchors: list[str], noise: torch.Tensor, k: int, t: int, faithful: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and the target. `models.teacher` is the average. k sampler steps from noise; t ~ U{980 - 20k .. 999 - 20k}.

    The released loop runs over all of the grid, and leaves it after the update with i == k - 1.
    """
    scheduler = esd_oracle.exact(in_pipeline(diffusers.DDIMScheduler(**esd_oracle.SD14)), noise.dtype)
    scheduler.set_timesteps(50)
    eps = esd_oracle.guided(models, models.teacher, [JOINED] * len(anchors), 3.0)
    x = noise
    for i, level in enumerate(scheduler.timesteps):
        if k == 0 and not faithful:
            break
        x = scheduler.step(eps(x, int(level)), level, x).prev_sample
        if i == k - 1:
            break
    with torch.no_grad():
        return x, models.student(x, torch.tensor(t), models.encode(anchors)).sample


def given(k: int, dtype: str) -> Draws:
    """Draws by hand: example i erases concept i."""
    return Draws(jnp.int32(k), jnp.float32(980 - 20 * k + 7 * (k + 1) % 20), jnp.arange(2), noise_of(k, dtype))
