"""Guidance: a network's outputs for several prompts become one.

Classifier-free guidance (Ho & Salimans 2022) needs two prompts, the rules of `rules` more.
"""

from collections.abc import Callable, Sequence
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


def interleave(*arrays: Array) -> Array:
    """k arrays [batch, ...] -> [k batch, ...]: a_0, b_0, ..., a_1, b_1, ...

    Concatenating all of `a` before all of `b` would move half of every example to another device when the batch axis is
    sharded; interleaved, each device keeps its own.
    """
    if any(array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"only equal shapes interleave, not {' and '.join(str(array.shape) for array in arrays)}")
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def split(x: Array, k: int) -> tuple[Array, ...]:
    """The inverse of `interleave`: [k batch, ...] -> k arrays [batch, ...]."""
    groups = x.reshape(x.shape[0] // k, k, *x.shape[1:])
    return tuple(groups[:, j] for j in range(k))


def split_pair(x: Array) -> tuple[Array, Array]:
    """`split` in two."""
    first, second = split(x, 2)
    return first, second


def together(
    denoise: Callable[[Array, Array, Any], Array], prompts: Sequence[Any], project: Callable[[Any], Any] = lambda p: p
) -> Callable[[Array, Array], tuple[Array, ...]]:
    """`denoise(x, t, prompt) -> output` -> `f(x, t) -> outputs`, one for each prompt, in a single call.

    `prompts` are pytrees of [batch, ...] arrays with the same structure (None leaves allowed); `t` is a scalar or
    [batch]. `project` is applied to the prompts once, however often `f` is called.
    """
    k, stacked = len(prompts), project(jax.tree.map(interleave, *prompts))

    def outputs(x: Array, t: Array) -> tuple[Array, ...]:
        t = t if jnp.ndim(t) == 0 else interleave(*[t] * k)
        return split(denoise(interleave(*[x] * k), t, stacked), k)

    return outputs


def classifier_free(
    denoise: Callable[[Array, Array, Any], Array],
    cond: Any,
    null: Any,
    scale: ArrayLike,
    project: Callable[[Any], Any] = lambda p: p,
) -> Callable[[Array, Array], Array]:
    """`denoise(x, t, cond) -> output` -> `guided(x, t) -> output`, one call on the interleaved pair for each step.

    `cond` and `null` are pytrees of [batch, ...] arrays with the same structure (None leaves allowed); `t` is a scalar
    or [batch]; `scale` may be traced; `project` is `together`'s. The guided output is float32 or wider. Raises
    `ValueError` where `cond` and `null` differ in structure or shapes.
    """
    if jax.tree.structure(cond) != jax.tree.structure(null):
        raise ValueError(f"cond and null differ: {jax.tree.structure(cond)} and {jax.tree.structure(null)}")
    pair = together(denoise, [null, cond], project)
    return lambda x, t: cfg(*pair(x, t), scale=scale)
