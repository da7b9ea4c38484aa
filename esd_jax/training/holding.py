"""Gradients that lead less far away from the base's weights: AEGIS's directional gradient rectification.

    d = theta - theta_0,    g <- g - omega (<g, d> / ||d||^2) d    where <g, d> < 0, else g

over all trained tensors at once, before anything else that an optimizer does with the gradient g of the loss. theta_0
are the base's weights. Where <g, d> < 0, a descent step along -g moves further away from them; with omega = 1 it keeps
its distance, to first order. AEGIS (ICLR 2026) adapts omega by sign steps; here it is fixed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from esd_jax.params import Params


class Held(NamedTuple):
    """An optimizer's state, and theta_0 at full precision, which a base in half precision does not have."""

    inner: Any
    first: Params


def holding(tx: optax.GradientTransformation, omega: float) -> optax.GradientTransformation:
    """`tx` of rectified gradients, where theta_0 is what its state is made of; `tx` itself if `omega` is 0."""
    if not omega:
        return tx

    def init(params: Any) -> Held:
        return Held(tx.init(params), jax.tree.map(jnp.copy, params))  # its own buffers, since a step donates both

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Held]:
        away = jax.tree.map(jnp.subtract, params, state.first)
        along, square = _inner(updates, away), _inner(away, away)
        part = jnp.where(along < 0, -omega * along / jnp.where(square > 0, square, 1), 0)
        updates, inner = tx.update(jax.tree.map(lambda g, d: g + part * d, updates, away), state.inner, params)
        return updates, Held(inner, state.first)

    return optax.GradientTransformation(init, update)


def held_from(opt: Any, theta_0: Params) -> Any:
    """An optimizer's state with this theta_0, for training that does not begin there."""
    first = jax.tree.map(jnp.copy, dict(theta_0))
    is_held = lambda state: isinstance(state, Held)  # noqa: E731
    return jax.tree.map(lambda state: state._replace(first=first) if is_held(state) else state, opt, is_leaf=is_held)


def _inner(a: Any, b: Any) -> Float[Array, ""]:
    """The inner product of two trees. Not `vdot`, which GPUs and TPUs compute in lower precision."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jax.tree.reduce(jnp.add, products)
