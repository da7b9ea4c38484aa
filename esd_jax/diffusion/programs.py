"""The jitted functions that run a checkpoint's networks; cached, so that equal settings compile once."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from esd_jax.diffusion import guidance, inversion, rules, samplers
from esd_jax.diffusion.rules import Rule
from esd_jax.diffusion.schedule import Schedule
from esd_jax.diffusion.solvers import Sampler
from esd_jax.models import vae
from esd_jax.models.attention import Attention
from esd_jax.models.vae import VAEConfig
from esd_jax.params import Conditioning, Network, Params

# A batch's conditioning, and the factors of the attention to its tokens.
ScaledConditioning = tuple[Conditioning, Float[Array, "batch tokens"] | None]


@lru_cache(maxsize=16)
def sampler(schedule: Schedule, name: str, num_steps: int, eta: float) -> Sampler:
    """`samplers.make_sampler`; the same object for equal settings."""
    return samplers.make_sampler(schedule, name, num_steps, eta=eta)


@lru_cache(maxsize=16)
def inverter(schedule: Schedule, num_steps: int, timestep: str) -> Sampler:
    """`inversion.inverter`, likewise."""
    return inversion.inverter(schedule, num_steps, timestep)


@lru_cache(maxsize=16)
def steps(unet: Network, sampler: Sampler, rule: type[Rule] | None = None) -> Callable[..., Array]:
    """From noise to latents, or back: (params, x, encoded, guidance scale, the rule's numbers, keys) -> x.

    encoded: the conditioning of the prompt; (null prompt, prompt); or, with a rule, (null prompt, prompt, *rule's).
    keys: one for each example, needed by a stochastic sampler.
    """

    def run(
        params: Params,
        x: Array,
        encoded: tuple[ScaledConditioning, ...],
        scale: Array,
        numbers: Any = None,
        keys: Array | None = None,
    ) -> Array:
        def denoise(x: Array, t: Array, prompt: ScaledConditioning) -> Array:
            conditioning, token_scale = prompt
            edits = () if token_scale is None else (Attention(token_scale),)
            return unet.apply(params, x, t, conditioning, *edits).astype(jnp.float32)

        def project(prompt: ScaledConditioning) -> ScaledConditioning:
            return unet.project(params, prompt[0]), prompt[1]

        def step_noise(i: Array) -> Array:
            # 1 + i: fold 0 is the initial noise's, when each example has a seed.
            return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1 + i), x.shape[1:]))(keys)

        memory = None
        if rule is not None:
            per_output = sampler.eps_per_output
            denoiser = rules.ruled(denoise, rule, numbers, encoded, scale, project, per_output)
            memory = rule.start(x)
        elif len(encoded) == 2:
            null, condition = encoded
            denoiser = guidance.classifier_free(denoise, condition, null, scale, project)
        else:
            condition = project(*encoded)
            denoiser = lambda x, t: denoise(x, t, condition)  # noqa: E731
        noise = step_noise if sampler.stochastic else None
        return samplers.run(sampler, denoiser, x * sampler.initial_scale, step_noise=noise, memory=memory)

    return jax.jit(run)


@lru_cache(maxsize=8)
def decoder(network: Network, config: VAEConfig) -> Callable[[Params, Array], Array]:
    """From latents to uint8 images."""

    def decode(params: Params, latents: Array) -> Array:
        return to_uint8(network.apply(params, vae.unscale(config, latents), "decode").astype(jnp.float32))

    return jax.jit(decode)


@lru_cache(maxsize=8)
def finite(network: Network, config: VAEConfig) -> Callable[[Params, Array], Array]:
    """From latents to whether each image is finite, which uint8 cannot show."""

    def decode(params: Params, latents: Array) -> Array:
        images = network.apply(params, vae.unscale(config, latents), "decode")
        return jnp.isfinite(images).all(axis=(1, 2, 3))

    return jax.jit(decode)


@lru_cache(maxsize=8)
def encoder(network: Network, config: VAEConfig) -> Callable[[Params, Array | np.ndarray], Array]:
    """From uint8 images to the mean of their latents."""

    def encode(params: Params, images: Array) -> Array:
        mean = network.apply(params, images.astype(jnp.float32) / 127.5 - 1, "encode").mean
        return vae.scale(config, mean.astype(jnp.float32))

    return jax.jit(encode)


def to_uint8(images: Float[Array | np.ndarray, "batch height width 3"]) -> UInt8[Array, "batch height width 3"]:
    """[-1, 1] -> 0..255."""
    return jnp.round(jnp.clip(images * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)
