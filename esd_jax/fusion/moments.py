"""Second moments of what linear layers are multiplied with, on an erasure's own prompts and on those that are retained.

Keys and values of cross-attention read token vectors, which are the same at every timestep: their moment is exact. All
other layers read activations, which are collected where the base's samples of the prompts pass:

    S = mean over draws of sum over positions of (x, 1)^T (x, 1),    x the layer's inputs at x_t

x is followed by a 1 where the layer has a bias, so that its bias is one more row of its kernel. This is the regression
of Jin et al. (2023, RegMean, arXiv 2212.09849) with MACE's retained prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esd_jax.diffusion import guidance, samplers
from esd_jax.erasing import corpora, trajectories
from esd_jax.erasing.method import Tools, denoise, project
from esd_jax.params import Conditioning, Network, Params, prefixed

STEPS, GUIDANCE = 20, 3.0  # of the trajectories, as those of preserved prompts
TOGETHER = 8  # samples that share a timestep

Moment = Float[np.ndarray, "inputs inputs"]
Points = Iterable[tuple[Array, Array, Conditioning]]  # (x_t, t, conditioning) of some samples each


def collected(network: Network, params: Params, layers: Mapping[str, bool], points: Points) -> dict[str, Moment]:
    """The moment of each layer's inputs, summed up in float64.

    Args:
      params: of the denoiser, by their own names.
      layers: the names of linear kernels -> whether a 1 follows the inputs.
      points: where the network is evaluated.
    """
    total, count, moments = dict.fromkeys(layers, np.zeros(())), 0, _moments(network, tuple(layers.items()))
    for x, t, conditioning in points:
        for name, value in moments(params, x, t, conditioning).items():
            total[name] = total[name] + np.asarray(value, np.float64)
        count += len(x)
    return {name: value / count for name, value in total.items()}


@lru_cache(maxsize=2)
def _moments(network: Network, layers: tuple[tuple[str, bool], ...]) -> Any:
    """(params, x, t, conditioning) -> name -> the sum of (x, 1)^T (x, 1) over samples and positions."""
    inputs = network.inputs
    assert inputs is not None

    @jax.jit
    def moments(params: Params, x: Array, t: Array, conditioning: Conditioning) -> dict[str, Array]:
        t = jnp.broadcast_to(t, x.shape[:1])  # so that layers of the timestep, too, read it once for each sample
        read = inputs(params, [name for name, _ in layers], x, t, conditioning)

        def moment(rows: Array, one: bool) -> Array:
            rows = rows.reshape(-1, rows.shape[-1]).astype(jnp.float32)
            rows = jnp.concatenate([rows, jnp.ones((len(rows), 1))], axis=1) if one else rows
            return jnp.matmul(rows.T, rows, precision="highest")

        return {name: moment(read[name], one) for name, one in layers}

    return moments


def points(tools: Tools, params: Params, weights: Mapping[str, float], draws: int, seed: int) -> Points:
    """x_t of prompts, which the base samples: at random points of trajectories, prompts drawn by their weights.

    params: of the base's denoiser, by their own names. draws: samples, rounded up to whole groups of `TOGETHER`.
    """
    rng, sampled, null = np.random.default_rng(seed), _sampler(tools), tools.encode([""] * TOGETHER)
    for number in range(-(-draws // TOGETHER)):
        prompt = tools.encode(corpora.drawn(weights, TOGETHER, rng))
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), (TOGETHER, *tools.shape))
        x, t = sampled(prefixed(params, tools.component), prompt, null, noise, jnp.int32(rng.integers(STEPS)))
        yield x, t, prompt


@lru_cache(maxsize=2)
def _sampler(tools: Tools) -> Any:
    """(params, prompts, empty prompts, noise, sampler steps) -> (x_t, t)."""
    trajectory = trajectories.on_grid(tools.schedule, samplers.plain(tools.schedule), STEPS)

    @jax.jit
    def sampled(params: Params, prompt: Conditioning, null: Conditioning, noise: Array, index: Array) -> Any:
        network, once = (partial(f, tools.denoiser, params) for f in (denoise, project))
        x = trajectory.run(guidance.classifier_free(network, prompt, null, GUIDANCE, once), noise, index)
        return x, jnp.asarray(trajectory.t_low, jnp.float32)[index]

    return sampled


def kernel_of(name: str) -> str:
    """The kernel of a layer, by the name of its kernel or of its bias."""
    return name.removesuffix("bias") + "weight" if name.endswith(".bias") else name


def bias_of(name: str) -> str:
    """The bias of a layer, by its kernel's name."""
    return name.removesuffix("weight") + "bias"


def layers_of(changes: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """The kernels of the layers that any part changes -> whether any changes the bias, too."""
    names = {name for one in changes for name in one}
    return {name: bias_of(name) in names for name in sorted(set(map(kernel_of, names)))}


def joined(change: Mapping[str, Any], layers: Mapping[str, bool], shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A part's changes, a matrix for each layer: of the kernel and, as the last row, of the bias where there is one."""

    def part(name: str) -> np.ndarray:
        return np.asarray(change.get(name, np.zeros(shapes[name].shape)), np.float64)

    return {
        name: np.concatenate([part(name), part(bias_of(name))[None]]) if bias else part(name)
        for name, bias in layers.items()
        if {name, bias_of(name)} & change.keys()
    }


def parted(matrices: Mapping[str, np.ndarray], layers: Mapping[str, bool]) -> dict[str, np.ndarray]:
    """`joined`, undone."""
    kernels = {name: matrix[:-1] if layers[name] else matrix for name, matrix in matrices.items()}
    return kernels | {bias_of(name): matrix[-1] for name, matrix in matrices.items() if layers[name]}
