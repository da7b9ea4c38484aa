"""A loss that holds the student to the base on prompts that are to be kept, beside any trained method.

    L = L_method + weight mean (e_theta(x_t, p) - e*(x_t, p))^2,    x_t drawn by the base from p

No paper's: ESD, SDD and All but One train on the erased concept alone, and their neighbours suffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from esd_jax.diffusion import guidance
from esd_jax.methods import method as base
from esd_jax.methods import trajectories
from esd_jax.methods.concepts import Bank, Concept, make_bank
from esd_jax.methods.trajectories import Trajectory
from esd_jax.models.unet import Conditioning
from esd_jax.params import Network, Params

STEPS, GUIDANCE = 20, 3.0  # of the trajectories


class Draws(NamedTuple):
    inner: Any
    t: Array
    index: Int[Array, ""]
    own_t: Float[Array, ""]
    prompt: Int[Array, " batch"]
    noise: Float[Array, "batch height width channel"]


class Batch(NamedTuple):
    inner: Any
    x: Float[Array, "batch height width channel"]
    t: Float[Array, ""]
    conditioning: Conditioning
    target: Float[Array, "batch height width channel"]
    weight: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """bank: of the prompts, as if each were a concept."""

    inner: Any
    bank: Bank
    weight: Float[Array, ""]


@dataclass(frozen=True, eq=False)
class Preserving:
    """A method with the loss added. Every example preserves one prompt, drawn from all concepts' prompts alike."""

    method: base.Method
    unet: Network
    trajectory: Trajectory

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        inner = self.method.draw(step, key, example_keys, shape, inputs.inner)
        index, t = self.trajectory.draw(jax.random.fold_in(key, 1))

        def example(key: Array) -> tuple[Array, Array]:
            prompt, noise = jax.random.split(jax.random.fold_in(key, 1))
            return jax.random.randint(prompt, (), 0, inputs.bank.num_concepts), jax.random.normal(noise, shape)

        return Draws(inner, inner.t, index, t, *jax.vmap(example)(example_keys))

    def prepare(self, models: base.Models, draws: Draws, inputs: Inputs) -> Batch:
        inner = self.method.prepare(models, draws.inner, inputs.inner)
        null, kept = (inputs.bank.take(role, draws.prompt) for role in ("null", "kept"))
        network = partial(base.denoise, self.unet, models.base)
        x = self.trajectory.run(guidance.classifier_free(network, kept, null, GUIDANCE), draws.noise, draws.index)
        target = network(x, draws.own_t, kept)
        return Batch(inner, *jax.lax.stop_gradient((x, draws.own_t, kept, target, inputs.weight)))

    def loss(self, student: Params, batch: Batch) -> Float[Array, ""]:
        e = base.denoise(self.unet, student, batch.x, batch.t, batch.conditioning)
        return self.method.loss(student, batch.inner) + batch.weight * jnp.mean((e - batch.target) ** 2)


def preserving(
    method: base.Method, inputs: Any, tools: base.Tools, concepts: Sequence[Concept], weight: float
) -> tuple[base.Method, Any]:
    """The method and its inputs with the loss on the concepts' `preserve` prompts; unchanged if there are none."""
    prompts = list(dict.fromkeys(prompt for concept in concepts for prompt in concept.preserve))
    if not prompts:
        return method, inputs
    bank = make_bank(tools.encode, list(map(Concept, prompts)), {"kept": lambda c: c.text})
    trajectory = trajectories.on_grid(tools.schedule, "ddim", STEPS)
    return Preserving(method, tools.unet, trajectory), Inputs(inputs, bank, jnp.float32(weight))
