"""The training of the VAE: reconstruct the artwork; then the latents are standardised."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from esd_jax.params import Network, Params

KL_WEIGHT = 1e-3


def loss(vae: Network, params: Params, images: Float[Array, "batch height width 3"], key: Array) -> Float[Array, ""]:
    """L1 + L2 of the pixels, L1 of their differences along both axes (edges carry these styles), and a little KL."""
    posterior = vae.apply(params, images, "encode")
    noise = jax.random.normal(key, posterior.mean.shape)
    difference = vae.apply(params, posterior.sample(noise), "decode") - images
    edges = jnp.abs(jnp.diff(difference, axis=1)).mean() + jnp.abs(jnp.diff(difference, axis=2)).mean()
    variance = jnp.exp(posterior.log_variance)
    kl = 0.5 * (posterior.mean**2 + variance - 1 - posterior.log_variance).mean()
    return jnp.abs(difference).mean() + (difference**2).mean() + edges + KL_WEIGHT * kl


def make_step(
    vae: Network, tx: optax.GradientTransformation, seed: int
) -> Callable[[Params, Any, UInt8[Array, "batch height width 3"], int], tuple[Params, Any, Array]]:
    """One jitted update: step(params, opt, images, index) -> (params, opt, loss)."""

    def step(params: Params, opt: Any, images: Array, index: Array) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), index)
        value, grads = jax.value_and_grad(lambda p: loss(vae, p, to_signed(images), key))(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return jax.jit(step, donate_argnums=(0, 1))


def standardised(params: Params, mean: Float[np.ndarray, " 4"], std: Float[np.ndarray, " 4"]) -> Params:
    """The same VAE, whose latents have zero mean and unit variance in every channel.

    The two 1x1 convolutions around the latents take the change of scale up exactly, so that the UNet's noise meets
    every channel at the same signal-to-noise ratio and `scaling_factor` is 1.
    """
    shift, scale = np.concatenate([mean, 2 * np.log(std)]), np.concatenate([1 / std, np.ones_like(std)])
    decode = params["post_quant_conv.weight"]
    return {
        **params,
        "quant_conv.weight": params["quant_conv.weight"] * scale,
        "quant_conv.bias": (params["quant_conv.bias"] - shift) * scale,
        "post_quant_conv.weight": decode * std[:, None],
        "post_quant_conv.bias": params["post_quant_conv.bias"] + mean @ decode[0, 0],
    }


def encode(
    vae: Network, params: Params, images: UInt8[np.ndarray, "n height width 3"], batch_size: int = 64
) -> Float[np.ndarray, "n h w channels"]:
    """The means of the images' latents."""
    mean = jax.jit(lambda p, x: vae.apply(p, to_signed(x), "encode").mean)
    batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    return np.concatenate([np.asarray(mean(params, batch)) for batch in batches])


def to_signed(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """uint8 -> [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1
