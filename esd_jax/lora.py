"""LoRA (Hu et al. 2021): a tensor is trained as its first value plus a product of two thin matrices.

    W = W_0 + A B,    A [inputs, rank] random, B [rank, outputs] zero at first

A convolution's kernel is taken as one matrix [height * width * inputs, outputs]. Training computes x W_0 + (x A) B of
linear layers, and never their sum.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from esd_jax.models.layers import Factored
from esd_jax.params import Params

A, B = ".lora_A", ".lora_B"


def adaptable(names: Iterable[str], shapes: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of some tensors that are matrices or kernels; a vector has no low rank.

    Raises ValueError if there is none.
    """
    matrices = tuple(name for name in names if len(shapes[name].shape) > 1)
    if not matrices:
        raise ValueError("the subset has no matrix, so there is nothing to train with low rank: give rank=0")
    return matrices


def initial(shapes: Mapping[str, Any], rank: int, key: Array) -> Params:
    """The factors of every tensor, "NAME.lora_A" and "NAME.lora_B", whose products are zero."""
    theta: Params = {}
    for i, (name, shape) in enumerate(shapes.items()):
        inputs, outputs = shape.size // shape.shape[-1], shape.shape[-1]
        thin = min(rank, inputs, outputs)
        theta[name + A] = jax.random.normal(jax.random.fold_in(key, i), (inputs, thin)) * inputs**-0.5
        theta[name + B] = jnp.zeros((thin, outputs))
    return theta


def factored(theta: Params, theta_0: Mapping[str, Array]) -> Params:
    """`weights`, of which matrices stay factored, as linear layers take them: W_0 is then not differentiated."""
    kernels = {name: first for name, first in theta_0.items() if first.ndim != 2}
    matrices = theta_0.keys() - kernels.keys()
    return {
        **weights(theta, kernels),
        **{name: Factored(theta_0[name], theta[name + A], theta[name + B]) for name in sorted(matrices)},
    }


def weights(theta: Params, theta_0: Mapping[str, Array]) -> Params:
    """The tensors that the factors and the first values make, in float32 or wider."""

    def whole(name: str, first: Array) -> Array:
        change = jnp.matmul(theta[name + A], theta[name + B], precision="highest")  # else TF32 on a GPU
        return first.astype(jnp.promote_types(first.dtype, change.dtype)) + change.reshape(first.shape)

    return {name: whole(name, first) for name, first in theta_0.items()}
