"""The training of the UNet and, with it, of the text encoder: predict the noise in the artwork's latents."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from esd_jax.diffusion.schedule import Schedule
from esd_jax.families import SD
from esd_jax.params import Network, Params, component

EMA = 0.999
MIN_SNR = 1.0


class Batch(NamedTuple):
    """latents: of the artwork, standardised; tokens: of their captions."""

    latents: Float[Array, "batch height width channels"]
    tokens: Int[Array, "batch tokens"]


def initial(params: Params) -> Params:
    """Random weights in which the UNet's residual branches and its output start at zero, which trains faster."""
    branches = ("conv2.weight", "proj_out.weight", "conv_out.weight")
    return {name: jnp.zeros_like(value) if name.endswith(branches) else value for name, value in params.items()}


def draw(
    key: Array, schedule: Schedule, shape: tuple[int, ...]
) -> tuple[Float[Array, "batch height width channels"], Int[Array, " batch"]]:
    """The noise, and each example's timestep.

    t = 1000 u^0.65 draws more of the noisy timesteps, where shape and style are decided, than uniform t would.
    """
    noise_key, t_key = jax.random.split(key)
    size, steps = shape[0], schedule.num_train_timesteps
    # Stratified: the batch covers all noise levels evenly, which makes the loss's gradient less noisy.
    u = (jax.random.permutation(t_key, size) + jax.random.uniform(jax.random.fold_in(t_key, 1), (size,))) / size
    t = jnp.minimum(steps * u**0.65, steps - 1).astype(jnp.int32)
    return jax.random.normal(noise_key, shape), t


def loss(
    unet: Network, text_encoder: Network, schedule: Schedule, params: Params, batch: Batch, key: Array
) -> Float[Array, ""]:
    """Weighted squared error of the predicted noise (DDPM, Ho et al. 2020, Eq. 14), each example at its own timestep.

    The weight min(SNR, gamma) / SNR of *Efficient Diffusion Training via Min-SNR Weighting Strategy* (Hang et al. 2023,
    Sec. 3.4), with gamma = 1: at low noise most of the error cannot be avoided, and would drown what teaches shapes.
    `params` holds "unet/NAME" and "text_encoder/NAME".
    """
    noise, t = draw(key, schedule, batch.latents.shape)
    alpha_bar = jnp.asarray(schedule.alpha_bar, jnp.float32)[t][:, None, None, None]
    x_t = jnp.sqrt(alpha_bar) * batch.latents + jnp.sqrt(1 - alpha_bar) * noise
    conditioning = SD.encode({}, [text_encoder.apply(component(params, "text_encoder"), batch.tokens)], (0, 0))
    weight = jnp.minimum(1, MIN_SNR * (1 - alpha_bar) / alpha_bar)
    return jnp.mean(weight * (unet.apply(component(params, SD.denoiser), x_t, t, conditioning) - noise) ** 2)


def make_step(
    unet: Network, text_encoder: Network, schedule: Schedule, tx: optax.GradientTransformation
) -> Callable[[Any, Batch], tuple[Any, Float[Array, ""]]]:
    """One jitted update: step(state, batch) -> (state, loss). `state` is donated, and its opt is (tx's, average)."""

    def step(state: Any, batch: Batch) -> Any:
        opt, average = state.opt
        key = jax.random.fold_in(state.key, state.step)
        value, grads = jax.value_and_grad(lambda p: loss(unet, text_encoder, schedule, p, batch, key))(state.theta)
        updates, opt = tx.update(grads, opt, state.theta)
        theta = optax.apply_updates(state.theta, updates)
        # The average's memory grows with the run, so that it never remembers the random start.
        decay = jnp.minimum(EMA, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, theta)
        return state._replace(theta=theta, opt=(opt, average), step=state.step + 1), value

    return jax.jit(step, donate_argnums=0)
