"""The training of the embedded rectified flow: a T5 learns to imitate CLIP, then transformer and T5 learn the velocity.

CLIP and the VAE are those of the embedded Stable Diffusion, and stay as they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from esd_jax.demo.pretrain.diffusion import EMA
from esd_jax.families import FLUX_UNDISTILLED
from esd_jax.models.mmdit import TIMESTEPS, FlowConditioning
from esd_jax.params import Network, Params, component

T5 = "text_encoder_2"


class Batch(NamedTuple):
    """latents: of the artwork, standardised; tokens: of their captions, T5's; pooled: what CLIP makes of these."""

    latents: Float[Array, "batch height width channels"]
    tokens: Int[Array, "batch tokens"]
    pooled: Float[Array, "batch width"]


def initial(params: Params) -> Params:
    """Random weights in which every block is the identity and the output zero (adaLN-Zero, Peebles & Xie 2023)."""
    zero = tuple(
        f"{name}.{leaf}"
        for name in ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")
        for leaf in ("weight", "bias")
    )
    output = ("proj_out.weight", "proj_out.bias")  # of the network; a block of one stream has a proj_out of its own
    return {
        name: jnp.zeros_like(value) if name.endswith(zero) or name in output else value
        for name, value in params.items()
    }


def draw(key: Array, shape: tuple[int, ...], shift: float) -> tuple[Float[Array, "*shape"], Float[Array, " batch"]]:
    """The noise, and each example's level: the shifted sigmoid of a normal number (Esser et al. 2024, Eq. 19 and 23).

    Stratified: the batch covers the distribution evenly, which makes the loss's gradient less noisy.
    """
    noise_key, order_key, place_key = jax.random.split(key, 3)
    size = shape[0]
    u = (jax.random.permutation(order_key, size) + jax.random.uniform(place_key, (size,))) / size
    sigma = jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u, 1e-4, 1 - 1e-4)))
    return jax.random.normal(noise_key, shape), shift * sigma / (1 + (shift - 1) * sigma)


def loss(transformer: Network, t5: Network, params: Params, batch: Batch, key: Array, shift: float) -> Float[Array, ""]:
    """Squared error of the velocity eps - x0 (Esser et al. 2024, Sec. 2), each example at its own noise level.

    `params` holds "transformer/NAME" and "text_encoder_2/NAME".
    """
    noise, sigma = draw(key, batch.latents.shape, shift)
    level = sigma[:, None, None, None]
    x_t = (1 - level) * batch.latents + level * noise
    conditioning = FlowConditioning(t5.apply(component(params, T5), batch.tokens), batch.pooled)
    velocity = transformer.apply(component(params, FLUX_UNDISTILLED.denoiser), x_t, TIMESTEPS * sigma, conditioning)
    return jnp.mean((velocity - (noise - batch.latents)) ** 2)


def make_step(
    transformer: Network, t5: Network, tx: optax.GradientTransformation, shift: float
) -> Callable[[Any, Batch], tuple[Any, Float[Array, ""]]]:
    """One jitted update: step(state, batch) -> (state, loss). `state` is donated, and its opt is (tx's, average)."""

    def step(state: Any, batch: Batch) -> Any:
        opt, average = state.opt
        key = jax.random.fold_in(state.key, state.step)
        value, grads = jax.value_and_grad(lambda p: loss(transformer, t5, p, batch, key, shift))(state.theta)
        updates, opt = tx.update(grads, opt, state.theta)
        theta = optax.apply_updates(state.theta, updates)
        # The average's memory grows with the run, so that it never remembers the random start.
        decay = jnp.minimum(EMA, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, theta)
        return state._replace(theta=theta, opt=(opt, average), step=state.step + 1), value

    return jax.jit(step, donate_argnums=0)


def imitation_step(
    t5: Network, tx: optax.GradientTransformation
) -> Callable[[Params, Any, Array, Array], tuple[Params, Any, Float[Array, ""]]]:
    """One jitted update of T5 towards the states that CLIP has of the same words: step(params, opt, tokens, states)."""

    def step(params: Params, opt: Any, tokens: Array, states: Array) -> Any:
        def error(p: Params) -> Array:
            return jnp.mean((t5.apply(p, tokens) - states) ** 2)

        value, grads = jax.value_and_grad(error)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return jax.jit(step, donate_argnums=(0, 1))
