"""A loss that holds the student to the base on prompts that are to be kept, beside any trained method.

    L = L_method + weight mean (e_theta(x_t, p) - e*(x_t, p))^2,    x_t drawn by the base from p

No paper's: ESD, SDD and All but One train on the erased concept alone, and their neighbours suffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esd_jax.diffusion import samplers
from esd_jax.erasing import method as base
from esd_jax.erasing import trajectories
from esd_jax.erasing.concepts import Bank, Concept, make_bank
from esd_jax.erasing.trajectories import Trajectory
from esd_jax.params import Network, Params

STEPS, GUIDANCE = 20, 3.0  # of the trajectories


class Draws(NamedTuple):
    """The method's own, and those of the prompts that are kept."""

    inner: Any
    t: Array
    kept: trajectories.Draws


class Batch(NamedTuple):
    inner: Any
    kept: base.Scored
    weight: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """kept: of the prompts, as if each were a concept."""

    inner: Any
    kept: Bank
    weight: Float[Array, ""]

    @property
    def bank(self) -> Any:
        """The method's own."""
        return self.inner.bank


@dataclass(frozen=True, eq=False)
class Preserving(base.Wrapping):
    """A method with the loss added. Every example preserves one prompt, drawn from all concepts' prompts alike."""

    denoiser: Network
    trajectory: Trajectory
    guide: base.Guide | None = None

    def own_inputs(self, inputs: Inputs) -> Any:
        return inputs.inner

    def own_batch(self, batch: Batch) -> Any:
        return batch.inner

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        inner = self.method.draw(step, key, example_keys, shape, inputs.inner)
        key, example_keys = jax.random.fold_in(key, 1), jax.vmap(lambda key: jax.random.fold_in(key, 1))(example_keys)
        kept = self.trajectory.draw_batch(key, example_keys, shape, inputs.kept.num_concepts)
        return Draws(inner, inner.t, kept)

    def recall(self, models: base.Models, draws: Draws, memory: Any, step: Array, inputs: Inputs) -> tuple[Any, Draws]:
        memory, inner = self.method.recall(models, draws.inner, memory, step, inputs.inner)
        return memory, draws._replace(inner=inner)

    def prepare(self, models: base.Models, draws: Draws, inputs: Inputs) -> Batch:
        inner, own = self.method.prepare(models, draws.inner, inputs.inner), draws.kept
        null, kept = (inputs.kept.take(role, own.concept) for role in ("null", "kept"))
        guided = base.sampling(self.denoiser, models.base, kept, null, GUIDANCE, self.guide)
        x = self.trajectory.run(guided, own.noise, own.index)
        scored = base.Scored(x, own.t, kept, base.denoise(self.denoiser, models.base, x, own.t, kept))
        return Batch(inner, *jax.lax.stop_gradient((scored, inputs.weight)))

    def loss(self, student: Params, batch: Batch) -> Float[Array, ""]:
        kept = base.squared_error(self.denoiser, student, batch.kept)
        return self.method.loss(student, batch.inner) + batch.weight * kept


def preserving(
    method: base.Method, inputs: Any, tools: base.Tools, concepts: Sequence[Concept], weight: float
) -> tuple[base.Method, Any]:
    """The method and its inputs with the loss on the concepts' `preserve` prompts; unchanged if there are none."""
    prompts = list(dict.fromkeys(prompt for concept in concepts for prompt in concept.preserve))
    if not prompts:
        return method, inputs
    bank = make_bank(tools.encode, prompts, {"kept": str})
    trajectory = trajectories.on_grid(tools.schedule, samplers.plain(tools.schedule), STEPS)
    return Preserving(method, tools.denoiser, trajectory, tools.guide), Inputs(inputs, bank, jnp.float32(weight))
