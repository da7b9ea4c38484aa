"""SDD: *Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models* (Kim et al., 2023).

    L       = mean (e_theta(x_t, c) - sg[e_theta(x_t, null)])^2
    average <- m average + (1 - m) theta, after every update

Both terms are the student's, and only the first carries a gradient. x_t is drawn by the average, which is also the
result; no prediction of the base holds the empty prompt in place, so a long run may drift. x_t is conditioned on all
concepts at once, as in the released code; its README has the two prompts the other way round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esd_jax.diffusion import guidance
from esd_jax.diffusion.schedule import Schedule
from esd_jax.methods import trajectories
from esd_jax.methods.concepts import Bank, Concept, make_bank
from esd_jax.methods.method import Models, Scored, Tools, choose, denoise, squared_error
from esd_jax.methods.trajectories import Draws, Trajectory
from esd_jax.params import Network, Params


@dataclass(frozen=True)
class SDD:
    """Settings; the defaults are the released code's. A concept's `replace_with` takes the place of the empty prompt.

    concept_order: which concept a step is about. "iterative": one after the other, again and again; "random": each
      example draws its own; "composite": all of them, joined by ", "; "sequential": each for `steps_per_concept`
      updates, the last one from then on.
    steps_per_concept: of the order "sequential", and of no other.
    sample_prompt: what the trajectory is conditioned on. "all": every concept, joined by ", "; "concept": the one that
      the step is about, for more concepts than fit a prompt.
    sampling_steps, sampling_guidance: of the average's DDIM trajectory.
    fix_k0: x_t after no sampler step is pure noise. In the released code (False) it is a finished image, which is
      scored at the noisiest timesteps all the same: its "stop after k" test never fires for k = 0.
    ema: m of the moving average.
    """

    concept_order: str = "iterative"
    steps_per_concept: int | None = None
    sample_prompt: str = "all"
    sampling_steps: int = 50
    sampling_guidance: float = 3.0
    fix_k0: bool = True
    ema: float = 0.999

    trained: ClassVar = True
    uses: ClassVar = frozenset({"replace_with"})
    CHOICES: ClassVar = {
        "concept_order": ("iterative", "random", "composite", "sequential"),
        "sample_prompt": ("all", "concept"),
    }
    PRESETS: ClassVar = {
        "paper": {
            "subset": "xattn", "optimizer": "adamw", "learning_rate": 1e-5, "weight_decay": 1e-4,
            "max_grad_norm": 1.0, "steps": 1500,
        },
    }  # fmt: skip

    def __post_init__(self):
        choose(self, **self.CHOICES)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be at least 0 and below 1: at 1 the average never moves")
        if (self.concept_order == "sequential") != (self.steps_per_concept is not None):
            raise ValueError(
                f"steps_per_concept={self.steps_per_concept} with concept_order={self.concept_order!r}: "
                "'sequential' needs it, the others do not have it"
            )
        if self.steps_per_concept is not None and self.steps_per_concept < 1:
            raise ValueError(f"steps_per_concept={self.steps_per_concept} must be at least 1")

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple["Method", "Inputs"]:
        """SDD over the concepts. Raises ValueError for images, and for a concept with several replacements."""
        if tools.images is not None:
            raise ValueError("images mean nothing to method 'sdd', which draws its own")
        for concept in concepts:
            if len(concept.replace_with) > 1:
                raise ValueError(f"replace_with: method 'sdd' takes one text for {concept.text!r}, not several")
        method = Method(self, tools.unet, make_trajectory(self, tools.schedule))
        bank = make_bank(tools.encode, concepts, self.roles(concepts))
        return method, Inputs(bank, jnp.float32(self.sampling_guidance))

    def evaluations(self, schedule: Schedule, images: bool) -> float:
        """Two for each sampler step, the student's on the empty prompt, and its forward and backward pass."""
        return 2 * make_trajectory(self, schedule).mean_updates + 1 + 3

    def roles(self, concepts: Sequence[Concept]) -> Mapping[str, Callable[[Concept], str]]:
        """Which prompt a concept has in each role of the equation. The anchor is what the student is led to."""
        joined = ", ".join(c.text for c in concepts)
        if self.concept_order == "composite":
            anchor = ", ".join(dict.fromkeys(text for c in concepts for text in c.replace_with))
            return {"concept": lambda c: joined, "anchor": lambda c: anchor, "sample": lambda c: joined}
        return {
            "concept": lambda c: c.text,
            "anchor": lambda c: c.replace_with[0] if c.replace_with else "",
            "sample": lambda c: joined if self.sample_prompt == "all" else c.text,
        }


def make_trajectory(settings: SDD, schedule: Schedule) -> Trajectory:
    """x_t after k steps, k counted from noise, at a timestep that is uniform over the k-th part of the schedule."""
    steps, total = settings.sampling_steps, schedule.num_train_timesteps
    sampler, k = trajectories.deterministic(schedule, "ddim", steps), np.arange(steps)
    edges = np.round(total * (1 - np.arange(steps + 1) / steps)).astype(int)
    updates = np.where((k == 0) & (not settings.fix_k0), steps, k)
    return Trajectory(sampler, k, updates, edges[1:], edges[:-1] - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What may change from run to run without compiling again."""

    bank: Bank
    sampling_guidance: Float[Array, ""]


@dataclass(frozen=True, eq=False)
class Method:
    """SDD over one UNet and schedule, as the three functions that a training step is made of."""

    settings: SDD
    unet: Network
    trajectory: Trajectory

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        """The random choices of a step; which concept it is about is drawn in the order "random" alone."""
        count, order = inputs.bank.num_concepts, self.settings.concept_order
        draws = self.trajectory.draw_batch(key, example_keys, shape, count)
        concept = draws.concept
        if order == "iterative":
            concept = jnp.full_like(concept, step % count)
        elif order == "composite":  # every concept's prompt is the same
            concept = jnp.zeros_like(concept)
        elif order == "sequential":
            concept = jnp.full_like(concept, jnp.minimum(step // self.settings.steps_per_concept, count - 1))
        return draws._replace(concept=concept)

    def prepare(self, models: Models, draws: Draws, inputs: Inputs) -> Scored:
        """x_t of the average, and what the student says about it without the concept. Nothing carries a gradient."""
        take = lambda role: inputs.bank.take(role, draws.concept)  # noqa: E731
        guided = guidance.classifier_free(
            partial(denoise, self.unet, models.average), take("sample"), take("null"), inputs.sampling_guidance
        )
        x = self.trajectory.run(guided, draws.noise, draws.index)
        target = denoise(self.unet, models.student, x, draws.t, take("anchor"))
        return Scored(*jax.lax.stop_gradient((x, draws.t, take("concept"), target)))

    def loss(self, student: Params, batch: Scored) -> Float[Array, ""]:
        return squared_error(self.unet, student, batch)
