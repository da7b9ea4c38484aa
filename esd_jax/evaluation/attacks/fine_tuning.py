"""Fine-tuning of a denoiser on noised images, which several probes make: of tensors themselves, or of a LoRA of them.

    min over theta of E || e_theta(x_t, t, c) - target ||^2

A probe says which x_t, c and target a batch has (`hidden`, `merged`).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Real, UInt8

from esd_jax.erasing.embedding_search import Search
from esd_jax.evaluation.attacks.adversary import Goal
from esd_jax.evaluation.attacks.probe import Unmeasurable
from esd_jax.params import Conditioning, Network, Params
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample
from esd_jax.selection import REGEX
from esd_jax.training.step import student

BENIGN, BENIGN_SEED = 32, 2_000_000  # how many images to fine-tune on, and the seed of the first
LEAST = 8  # of benign images


class Fixed(NamedTuple):
    """What the fine-tuning leaves as it is: the tensors that are not trained, and the first values of the others."""

    frozen: Params
    first: Params


class Batch(NamedTuple):
    """The network's inputs, and what it should predict."""

    x: Float[Array, "batch height width channel"]
    t: Real[Array, " batch"]
    conditioning: Conditioning
    target: Float[Array, "batch height width channel"]


def tuner(
    network: Network,
    batch: Callable[[Any, Fixed, Any], Batch],
    tx: optax.GradientTransformation,
    steps: int,
    weights: Callable[[Params, Params], Params],
    dtype: str,
) -> Callable[..., tuple[Params, Float[Array, " steps"]]]:
    """A function that fine-tunes: one compiled step for all calls of the same shapes.

    Args:
      batch: (number of the step, fixed, case) -> the random batch of a step.
      weights: (theta, first) -> the tensors, from what is trained: `unchanged`, or `lora.weights`.
      dtype: that the network computes in.

    Returns a function (theta, fixed, *case) -> (theta, the loss of each step).
    """

    def loss(theta: Params, drawn: Batch, fixed: Fixed) -> Array:
        params = student(theta, fixed.first, fixed.frozen, compute_dtype=dtype, weights=weights)
        e = network.apply(params, drawn.x, drawn.t, drawn.conditioning).astype(drawn.x.dtype)
        return jnp.mean((e - drawn.target) ** 2)

    # The search that attacks make for embeddings, for the tensors in their place.
    search = Search(batch, loss, tx)

    def run(theta: Params, fixed: Fixed, *case: Any) -> tuple[Params, Float[Array, " steps"]]:
        state, losses = search.run(search.begin(theta), np.arange(steps), fixed, case)
        return state.value, losses

    return run


def benign(base: Pipeline, goal: Goal, **drawing: Any) -> tuple[UInt8[np.ndarray, "n height width 3"], list[str]]:
    """Images that the base draws of the goal's neutral prompts, and their prompts, without those that show the concept.

    A prompt that names no style may be drawn in any style.

    Raises Unmeasurable if that leaves fewer than `LEAST`.
    """
    texts = [prompt for prompt in goal.neutral if prompt]
    texts = texts * max(1, BENIGN // len(texts))
    images = sampled_once(base, tuple(texts), tuple(sorted(drawing.items())))
    without = np.flatnonzero(~np.asarray(goal.detect(images), bool))
    if len(without) < LEAST:
        shown = f"{len(texts) - len(without)} of {len(texts)} images of neutral prompts"
        raise Unmeasurable(f"{goal.concept!r} is detected in {shown}, which leaves too few to train on")
    return images[without], [texts[i] for i in without]


@lru_cache(maxsize=1)
def sampled_once(
    base: Pipeline, texts: tuple[str, ...], drawing: tuple[tuple[str, Any], ...]
) -> UInt8[np.ndarray, "n height width 3"]:
    """The base's images, sampled once for all models of a campaign."""
    seeds = [BENIGN_SEED + i for i in range(len(texts))]
    return sample(base, texts, seed=seeds, **{"sampler": "auto", **dict(drawing)})


def changed(base: Pipeline, victim: Pipeline) -> list[str]:
    """The denoiser's tensors that differ."""
    before, after = (one.params[one.denoiser] for one in (base, victim))
    return [name for name, value in before.items() if name in after and bool((value != after[name]).any())]


def lacking_subset(name: str, subset: str, base: Pipeline) -> str:
    """That the base's family has no such subset of tensors, which a probe trains; empty if it has."""
    own = base.family.subsets
    known = subset.startswith(REGEX) or subset in own
    return "" if known else f"{name} trains the subset {subset!r}, but {base.family.name} has {', '.join(own)}"
