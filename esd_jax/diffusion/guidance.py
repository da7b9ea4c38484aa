"""Classifier-free guidance (Ho & Salimans 2022) over network outputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def cfg(eps_null: Float[Array, "..."], eps_c: Float[Array, "..."], scale: ArrayLike) -> Float[Array, "..."]:
    """`eps_null + scale (eps_c - eps_null)`, in float32 or wider: 1 is purely conditional, 0 purely unconditional.

    This is the convention of diffusers; Ho & Salimans' w (Eq. 6) is `scale - 1`. It acts on the raw network output: x0
    and eps are linear in it, so guidance means the same under every prediction type. `scale` may be traced.
    """
    dtype = jnp.promote_types(jnp.result_type(eps_null, eps_c), jnp.float32)
    eps_null, eps_c, scale = (jnp.asarray(array, dtype) for array in (eps_null, eps_c, scale))
    return eps_null + scale * (eps_c - eps_null)


def interleave(a: Array, b: Array) -> Array:
    """Two [batch, ...] arrays -> [2 batch, ...]: a_0, b_0, a_1, b_1, ...

    Concatenating all of `a` before all of `b` would move half of every example to another device when the batch axis is
    sharded; interleaved, each device keeps its own pairs.
    """
    if a.shape != b.shape:
        raise ValueError(f"only equal shapes interleave, not {a.shape} and {b.shape}")
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def split_pair(x: Array) -> tuple[Array, Array]:
    """The inverse of `interleave`: [2 batch, ...] -> two [batch, ...]."""
    pairs = x.reshape(x.shape[0] // 2, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def classifier_free(
    denoise: Callable[[Array, Array, Any], Array], cond: Any, null: Any, scale: ArrayLike
) -> Callable[[Array, Array], Array]:
    """`denoise(x, t, cond) -> output` -> `guided(x, t) -> output`, one call on the interleaved pair for each step.

    `cond` and `null` are pytrees of [batch, ...] arrays with the same structure (None leaves allowed); `t` is a scalar
    or [batch]; `scale` may be traced. The guided output is float32 or wider. Raises `ValueError` where `cond` and
    `null` differ in structure or shapes.
    """
    if jax.tree.structure(cond) != jax.tree.structure(null):
        raise ValueError(f"cond and null differ: {jax.tree.structure(cond)} and {jax.tree.structure(null)}")
    pair = jax.tree.map(interleave, null, cond)

    def guided(x: Array, t: Array) -> Array:
        t = t if jnp.ndim(t) == 0 else interleave(t, t)
        eps_null, eps_c = split_pair(denoise(interleave(x, x), t, pair))
        return cfg(eps_null, eps_c, scale)

    return guided
