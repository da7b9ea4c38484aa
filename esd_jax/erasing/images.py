"""Images that a method learns from: applied in batches, noised, and what a network should output for them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from esd_jax.diffusion.path import VARIANCE_PRESERVING
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.method import Tools

AT_ONCE = 8  # images encoded


def in_batches(function: Callable[[Any], Any], items: Sequence[Any] | np.ndarray, size: int) -> Any:
    """`function` of `size` items at a time (of the rest, at the end), the results put together along their first axis.

    Hundreds of images, or of prompts, at once would not fit where a run does.
    """
    parts = [function(items[start : start + size]) for start in range(0, len(items), size)]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def sampled(
    tools: Tools, prompts: Sequence[str], count: int, **options: Any
) -> Float[Array, "prompts images height width channel"]:
    """Latents of so many images of the base of each prompt. options: of `Tools.sample`."""
    images = tools.sample([prompt for prompt in prompts for _ in range(count)], **options)
    latents = in_batches(tools.to_latents, images, AT_ONCE)
    return latents.reshape(len(prompts), count, *latents.shape[1:])


def drawn(
    tools: Tools,
    prompts: Sequence[str],
    settings: Any,
    count: int = 1,
    negative: str | Sequence[str | None] | None = None,
) -> Float[Array, "prompts images height width channel"]:
    """`sampled`, as the fields drawing_* of a method's settings say.

    negative: a negative prompt for all, or one or None for each prompt.
    """
    if not (negative is None or isinstance(negative, str)):
        negative = [text for text in negative for _ in range(count)]
    return sampled(
        tools,
        prompts,
        count,
        seed=settings.drawing_seed,
        steps=settings.drawing_steps,
        guidance_scale=settings.drawing_guidance,
        sampler=settings.drawing_sampler,
        **({} if negative is None else {"negative_prompt": negative}),
    )


def true_output(
    schedule: Schedule,
    images: Float[Array, "batch ..."],
    noise: Float[Array, "batch ..."],
    t: Real[Array, " batch"],
) -> Float[Array, "batch ..."]:
    """What the network should output for `add_noise(schedule, images, noise, t)`: eps, v, x0 or the flow's velocity."""
    if schedule.prediction_type == "v_prediction":
        return add_noise(schedule, noise, -images, t)  # alpha eps - sigma x0 (Salimans & Ho 2022, Sec. 4)
    if schedule.prediction_type == "flow_prediction":
        return noise - images
    return noise if schedule.prediction_type == "epsilon" else images


def carried(
    schedule: Schedule,
    output: Float[Array, "batch ..."],
    source: Float[Array, "batch ..."],
    x: Float[Array, "batch ..."],
    t: Real[Array, " batch"],
) -> Float[Array, "batch ..."]:
    """The output at x that means the clean image which `output` means at `source`, both at t."""
    discrete = schedule.path is VARIANCE_PRESERVING
    level = jnp.asarray(schedule.levels, x.dtype)[t] if discrete else t / schedule.num_train_timesteps
    clean, noise = schedule.to_x0_eps(level[:, None, None, None], source, output)
    sigma = add_noise(schedule, jnp.zeros_like(x), jnp.ones_like(x), t)
    return true_output(schedule, clean, noise + (x - source) / sigma, t)
