"""Sampling with a checkpoint: images from noise, noise from images, and real images purified."""

import math
import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from esd_jax import conditionings, progress, sharding, suggest
from esd_jax.diffusion import programs, samplers
from esd_jax.diffusion.programs import to_uint8
from esd_jax.diffusion.rules import Rule
from esd_jax.diffusion.schedule import Schedule
from esd_jax.params import Conditioning, Params
from esd_jax.pictures import check_drawn
from esd_jax.pipeline import Pipeline, image_size

__all__ = ["example_keys", "initial_noise", "invert", "purify", "reconstruct", "sample", "to_uint8"]


class SamplerReplaced(UserWarning):
    """A checkpoint's own sampler is not implemented, and nobody chose another."""


# What other libraries, and former versions, call an argument.
ELSEWHERE = {
    "num_inference_steps": "steps",
    "num_images": "give a prompt for each image: [prompt] * 4",
    "num_images_per_prompt": "give a prompt for each image: [prompt] * 4",
    "prompt": "prompts",
    "generator": "seed",
    "seeds": "seed",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "scale": "guidance_scale",
    "true_cfg_scale": "true_cfg",
    "scheduler": "sampler",
    "output_type": "images are uint8 arrays; esd_jax.grid makes a PIL image of them",
}
RENAMED = {"num_steps": "steps"}


@suggest.keywords(ELSEWHERE, RENAMED)
def sample(
    pipeline: Pipeline,
    prompts: str | Sequence[str] | Conditioning,
    *,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | Sequence[str | None] | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    latents: Float[Array | np.ndarray, "batch h w channel"] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    rule: Rule | None = None,
    reweight: Mapping[str, float] | None = None,
    true_cfg: float | None = None,
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Samples one image per prompt from a loaded pipeline: `esd_jax.sample`, which documents the arguments.

    Returns uint8 [n, height, width, 3].

    Raises TypeError for an unknown argument, ValueError as `esd_jax.sample` does.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    steps, guidance_scale = _defaults(pipeline, steps, guidance_scale)
    n = conditionings.count(prompts)
    guided = _check(pipeline, steps, batch_size, guidance_scale, rule, negative_prompt, true_cfg)
    # Of a guidance-distilled network its own scale is an input, and this one is classifier-free beside it.
    scale = guidance_scale if true_cfg is None else true_cfg
    size = image_size(pipeline.configs, height, width)
    schedule = pipeline.schedule_at(size)
    if not n:
        return np.zeros((0, *size, 3), np.uint8)
    keys = example_keys(seed, n)
    needed = jax.eval_shape(lambda: initial_noise(pipeline, keys, size)).shape
    if latents is None:
        latents = initial_noise(pipeline, keys, size)
    elif latents.shape != needed:
        raise ValueError(f"latents has shape {latents.shape}, but {n} prompts and the image size need {needed}")
    if sampler == "auto":
        sampler = _default_sampler(schedule, steps)
    name = sampler or samplers.default_sampler(schedule)
    solver = programs.sampler(schedule, name, steps, float(eta))
    run = programs.steps(pipeline.network(pipeline.denoiser), solver, type(rule) if rule else None)
    rows = min(batch_size, n)
    condition = conditionings.make_conditioning(
        pipeline, prompts, size, rows, guided, negative_prompt, rule, reweight, guidance_scale
    )
    numbers, images = rule.numbers if rule else None, []
    params = {name: pipeline.params[name] for name in (pipeline.denoiser, "vae")}
    mesh = sharding.make_mesh(rows, jax.local_devices())
    if mesh.size > 1:
        params = sharding.place(params, mesh)
    with _task("sampling", n) as task:
        for index in _batches(n, batch_size):
            noise, encoded, noise_keys = jnp.asarray(latents)[index], condition(index), keys[index]
            if mesh.size > 1:
                noise, encoded, noise_keys = sharding.spread((noise, encoded, noise_keys), mesh)
            drawn = run(params[pipeline.denoiser], noise, encoded, jnp.float32(scale), numbers, noise_keys)
            images.append(decoded(pipeline, params["vae"], drawn, index, prompts, guidance_scale))
            task.advance(min(batch_size, int(n - index[0])))
    return np.concatenate(images)[:n]


@suggest.keywords(ELSEWHERE, RENAMED)
def invert(
    pipeline: Pipeline,
    images: UInt8[np.ndarray, "batch height width 3"],
    prompts: str | Sequence[str] = "",
    *,
    steps: int = 35,
    guidance_scale: float = 1.0,
    timestep: str = "level",
    batch_size: int = 8,
) -> Float32[np.ndarray, "batch h w channel"]:
    """The noise from which `sample(sampler="ddim")`, or "flow_euler" along a rectified flow, draws about these images,
    with as many steps.

    Args:
      pipeline: the checkpoint that inverts.
      images: of a size that the checkpoint generates.
      prompts: what they show, or ""; one for all, or one per image.
      steps: of DDIM, or along a rectified flow of Euler's method, upwards.
      guidance_scale: 1 or less inverts without guidance. Guidance spoils the inversion (Mokady et al. 2023).
      timestep: the network's input, "level" or "target": see `inversion.inverter`.
      batch_size: images per call of the network.

    Returns:
      Latents at the noisiest timestep, for `sample(latents=...)`.
    """
    steps, guidance_scale = _defaults(pipeline, steps, guidance_scale)
    guided = _check(pipeline, steps, batch_size, guidance_scale, None)
    images, size = _check_images(pipeline, images)
    n = len(images)
    prompts = [prompts] * n if isinstance(prompts, str) else prompts
    if len(prompts) != n:
        raise ValueError(f"{len(prompts)} prompts for {n} images")
    if not n:
        return np.asarray(initial_noise(pipeline, example_keys(0, 0), size))
    encode = programs.encoder(pipeline.network("vae"), pipeline.configs["vae"])
    schedule = pipeline.schedule_at(size)
    down = programs.inverter(schedule, steps, timestep)
    run = programs.steps(pipeline.network(pipeline.denoiser), down)
    condition = conditionings.make_conditioning(
        pipeline, prompts, size, min(batch_size, n), guided, guidance_scale=guidance_scale
    )
    noise = []
    with _task("inverting", n) as task:
        for index in _batches(n, batch_size):
            latents = encode(pipeline.params["vae"], images[index])
            inverted = run(pipeline.params[pipeline.denoiser], latents, condition(index), jnp.float32(guidance_scale))
            check_drawn(jnp.isfinite(inverted).all(axis=(1, 2, 3)), index, prompts, guidance_scale)
            noise.append(np.asarray(inverted))
            task.advance(min(batch_size, int(n - index[0])))
    return np.concatenate(noise)[:n]


@suggest.keywords(ELSEWHERE, RENAMED)
def purify(
    pipeline: Pipeline,
    images: UInt8[np.ndarray, "batch height width 3"],
    prompts: str | Sequence[str] = "",
    *,
    inverter: Pipeline | None = None,
    steps: int = 35,
    guidance_scale: float = 1.0,
    inversion_guidance_scale: float = 1.0,
    timestep: str = "level",
    batch_size: int = 8,
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Regenerates real images with an erased checkpoint (Hong et al. 2024, "concept purification").

    They are inverted and drawn with the same prompt: "", or the concept. The paper leaves open which model inverts. If
    it is the one that draws, at the same guidance, every picture comes back, with what was erased, as exactly as DDIM's
    steps can be reversed; if it is the unmodified one, what only that one knows does not.

        image = np.asarray(read_image("neon_cat.png"))  # of esd_jax.io.images
        drawn = purify(erased, image[None], inverter=base)

    Args:
      pipeline: the checkpoint that samples.
      images, prompts, steps, timestep, batch_size: as in `invert`.
      inverter: the checkpoint that inverts; by default the one that samples.
      guidance_scale: of sampling (the paper trains for 7.5; 1 is the inverse of 1).
      inversion_guidance_scale: of inverting.

    Returns:
      uint8 [n, height, width, 3].
    """
    options: dict[str, Any] = {"steps": steps, "batch_size": batch_size}
    latents = invert(
        inverter or pipeline, images, prompts, guidance_scale=inversion_guidance_scale, timestep=timestep, **options
    )
    prompts = [prompts] * len(latents) if isinstance(prompts, str) else prompts
    height, width = np.shape(images)[1:3]
    return sample(
        pipeline, prompts, guidance_scale=guidance_scale, sampler=samplers.plain(pipeline.schedule), latents=latents,
        height=height, width=width, **options,
    )  # fmt: skip


def reconstruct(
    pipeline: Pipeline, images: UInt8[np.ndarray, "batch height width 3"], *, batch_size: int = 8
) -> UInt8[np.ndarray, "batch height width 3"]:
    """What the autoencoder alone makes of images: as exactly as `purify` could draw them."""
    images, _ = _check_images(pipeline, images)
    network, config, params = pipeline.network("vae"), pipeline.configs["vae"], pipeline.params["vae"]
    encode, batches = programs.encoder(network, config), _batches(len(images), batch_size)
    parts = [decoded(pipeline, params, encode(params, images[index]), index) for index in batches]
    return np.concatenate([*parts, images[:0]])[: len(images)]


def decoded(
    pipeline: Pipeline,
    params: Params,
    latents: Float[Array, "batch h w channel"],
    index: np.ndarray,
    prompts: Any = None,
    guidance_scale: float | None = None,
) -> UInt8[np.ndarray, "batch height width 3"]:
    """The images of a batch of latents. params: the VAE's; for the others see `check_drawn`, which may raise.

    NaN, which uint8 does not have, becomes one colour: an image of one colour is decoded again, to distinguish them.
    """
    network, config = pipeline.network("vae"), pipeline.configs["vae"]
    images = np.asarray(programs.decoder(network, config)(params, latents))
    if any((image == image[:1, :1]).all() for image in images):
        check_drawn(programs.finite(network, config)(params, latents), index, prompts, guidance_scale)
    return images


def example_keys(seed: int | Sequence[int], n: int) -> Array:
    """One random key per example: of (seed, i), or of seed[i] alone. Raises ValueError for a seed beyond 32 bits."""
    for one in np.atleast_1d(np.asarray(seed, object)):
        try:
            fits = 0 <= operator.index(one) < 2**32  # JAX would use 32 bits of it
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"seed={one!r} must be a whole number in 0..{2**32 - 1}")
    if isinstance(seed, Sequence | np.ndarray):
        if len(seed) != n:
            raise ValueError(f"{len(seed)} seeds for {n} prompts")
        return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), 0))(jnp.asarray(seed, jnp.uint32))
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def initial_noise(pipeline: Pipeline, keys: Array, size: tuple[int, int]) -> Float[Array, "batch h w channel"]:
    """Unit Gaussian latents for images of `size` pixels, one per key."""
    shape = pipeline.family.latents(pipeline.configs, size)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _default_sampler(schedule: Schedule, steps: int) -> str:
    """The checkpoint's own sampler; "ddim", with a warning, where that one is not implemented."""
    try:
        return samplers.make_sampler(schedule, num_steps=steps).name
    except ValueError as error:
        kind = schedule.config["_class_name"]
        warnings.warn(f"images are sampled by ddim in place of {kind}: {error}", SamplerReplaced, stacklevel=4)
        return "ddim"


def _defaults(pipeline: Pipeline, steps: int | None, guidance_scale: float | None) -> tuple[int, float]:
    """The number of steps and the guidance scale, those of the family where they are None.

    Raises ValueError for a pipeline that is not loaded.
    """
    if isinstance(pipeline, str | os.PathLike):
        raise ValueError(f"the pipeline is {str(pipeline)!r}: load it first, esd_jax.load({str(pipeline)!r})")
    own = pipeline.family.sampling(pipeline.configs)
    return own.steps if steps is None else steps, own.guidance_scale if guidance_scale is None else guidance_scale


def _check(
    pipeline: Pipeline,
    steps: int,
    batch_size: int,
    guidance_scale: float,
    rule: Rule | None,
    negative_prompt: str | Sequence[str | None] | None = None,
    true_cfg: float | None = None,
) -> bool:
    """Whether sampling is guided classifier-free. Raises ValueError for numbers out of range, and for what a family
    does not take.
    """
    most = pipeline.schedule.num_train_timesteps
    if not 1 <= steps <= most:
        raise ValueError(f"steps={steps} must be in 1..{most}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} must be finite")
    return conditionings.classifier_free(pipeline, guidance_scale, rule, negative_prompt, true_cfg)


def _check_images(pipeline: Pipeline, images: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Images, and their size in pixels; raises ValueError for what the checkpoint does not draw."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [n, height, width, 3], not {images.dtype} {list(images.shape)}")
    return images, image_size(pipeline.configs, *images.shape[1:3])


def _task(name: str, n: int) -> AbstractContextManager[progress.Task]:
    return progress.task(name, n, unit="images", start="compiling, once")


def _batches(n: int, batch_size: int) -> list[np.ndarray]:
    """Indices of the examples of each batch. The last is filled up: every batch has the shape that was compiled."""
    return [np.minimum(np.arange(i, i + min(batch_size, n)), n - 1) for i in range(0, n, batch_size)]
