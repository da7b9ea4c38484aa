"""Erasing methods along a rectified flow in torch, from the equations: the oracle of `test_methods_flow.py`.

    x_sigma = (1 - sigma) x0 + sigma n,    v = n - x0,    the network gets 1,000 sigma

x_t of a trajectory follows Euler's method, x' = x + (sigma' - sigma) v. Tensors are NCHW, in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import esd_oracle
import numpy as np
import torch
from torch import Tensor

from esd_jax.params import Network

SHIFT = 3.0
Velocity = Callable[[Tensor, Any], Tensor]


def shifted(sigma: np.ndarray) -> np.ndarray:
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


TRAINED = shifted(np.arange(1, 1001) / 1000)  # sigma of each training timestep


def grid(steps: int) -> np.ndarray:
    """sigma [steps + 1] of SD3's pipeline, which shifts twice."""
    return np.append(shifted(np.linspace(TRAINED[-1], TRAINED[0], steps)), 0)


def told(sigma: Any) -> Any:
    """What the network gets, in float32 as everywhere."""
    return np.float32(1000 * sigma)


def precise(network: Network) -> Network:
    """The toy, whose timesteps are in the dtype of x: they have fractions along a flow."""

    def apply(params: Any, x: Any, t: Any, *others: Any) -> Any:
        return network.apply(params, x, t.astype(x.dtype), *others)

    return Network(apply, network.shapes, network.layouts)


def says(network: torch.nn.Module, models: esd_oracle.Models, x: Tensor, t: Any, texts: Sequence[str]) -> Tensor:
    """The network's output. t: one for all, or one for each."""
    t = torch.tensor(np.broadcast_to(np.asarray(t, np.float64), len(x)).copy())[:, None, None, None]
    return network(x, t, models.encode(texts)).sample


def sampled(velocity: Velocity, noise: Tensor, k: int, steps: int) -> Tensor:
    """x after k of so many of Euler's steps from noise."""
    sigma, x = grid(steps), noise
    with torch.no_grad():
        for now, then in zip(sigma[:k], sigma[1 : k + 1], strict=True):
            x = x + (then - now) * velocity(x, told(now))
    return x


def guided(network: torch.nn.Module, models: esd_oracle.Models, texts: Sequence[str], scale: float) -> Velocity:
    """Classifier-free, from the empty prompt."""

    def velocity(x: Tensor, t: Any) -> Tensor:
        null, own = (says(network, models, x, t, prompts) for prompts in ([""] * len(texts), texts))
        return null + scale * (own - null)

    return velocity


def noised(images: Tensor, noise: Tensor, t: np.ndarray) -> Tensor:
    """Images at the noise levels that the network is told of as t."""
    sigma = torch.tensor(np.asarray(t, np.float64) / 1000)[:, None, None, None]
    return (1 - sigma) * images + sigma * noise


def largest(direction: Tensor, kappa: float) -> Tensor:
    """`direction` where its size is at least that quantile over its channel's pixels; else 0."""
    size = direction.abs()
    threshold = torch.quantile(size.flatten(2), kappa, dim=-1)[:, :, None, None]
    return torch.where(size >= threshold, direction, torch.zeros_like(direction))
