"""SDD: *Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models* (Kim et al., 2023).

    L       = mean (e_theta(x_t, c) - sg[e_theta(x_t, null)])^2
    average <- m average + (1 - m) theta, after every update

Both terms are the student's, and only the first carries a gradient. x_t is drawn by the average, which is also the
result; no prediction of the base holds the empty prompt in place, so a long run may drift. x_t is conditioned on all
concepts at once, as in the released code; its README has the two prompts the other way round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esd_jax.diffusion import samplers
from esd_jax.diffusion.path import VARIANCE_PRESERVING
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing import method as base
from esd_jax.erasing import replay, trajectories
from esd_jax.erasing.concepts import Bank, Concept, make_bank
from esd_jax.erasing.method import Models, Scored, Tools, choose, denoise, squared_error
from esd_jax.erasing.replay import Replaying
from esd_jax.erasing.trajectories import Draws, Trajectory
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
    sampling_steps, sampling_guidance: of the average's trajectory, by DDIM; along a rectified flow by Euler's method,
      where x_t is scored at its own timestep.
    fix_k0: x_t after no sampler step is pure noise. In the released code (False) it is a finished image, which is
      scored at the noisiest timesteps all the same: its "stop after k" test never fires for k = 0.
    ema: the decay of the moving average, m.
    updates_per_trajectory, trajectory_buffer: 1 and 1 sample afresh in every update; else whole trajectories of the
      average are drawn every so many updates, and the last few are kept (see `replay`).
    """

    concept_order: str = "iterative"
    steps_per_concept: int | None = None
    sample_prompt: str = "all"
    sampling_steps: int = 50
    sampling_guidance: float = 3.0
    fix_k0: bool = True
    ema: float = 0.999
    updates_per_trajectory: int = 1
    trajectory_buffer: int = 1

    trained: ClassVar = True
    uses: ClassVar = frozenset({"replace_with"})
    needs: ClassVar = frozenset()
    CHOICES: ClassVar = {
        "concept_order": ("iterative", "random", "composite", "sequential"),
        "sample_prompt": ("all", "concept"),
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "subset": "xattn", "optimizer": "adamw", "learning_rate": 1e-5, "weight_decay": 1e-4,
            "max_grad_norm": 1.0, "steps": 1500,
        },
        "flow": {
            "sampling_steps": 28,
            "subset": "flow-text", "rank": 16, "optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 1e-4,
            "max_grad_norm": 1.0, "steps": 1500,
        },
    }  # fmt: skip

    def __post_init__(self):
        choose(self, **self.CHOICES)
        replay.check(self)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be at least 0 and below 1: at 1 the average never moves")
        if (self.concept_order == "sequential") != (self.steps_per_concept is not None):
            raise ValueError(
                f"steps_per_concept={self.steps_per_concept} with concept_order={self.concept_order!r}: "
                "'sequential' needs it, the others do not have it"
            )
        own = self.sample_prompt == "concept" and self.concept_order in ("iterative", "sequential")
        if own and replay.wanted(self):
            raise ValueError(
                f"a stored trajectory of sample_prompt='concept' is of one concept, which concept_order="
                f"{self.concept_order!r} does not wait for: choose 'random'"
            )
        if self.steps_per_concept is not None and self.steps_per_concept < 1:
            raise ValueError(f"steps_per_concept={self.steps_per_concept} must be at least 1")

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple["Method | Replaying", "Inputs"]:
        """SDD over the concepts. Raises ValueError for images, and for a concept with several replacements."""
        if tools.images is not None:
            raise ValueError("method 'sdd' takes no images: it generates its own")
        for concept in concepts:
            if len(concept.replace_with) > 1:
                raise ValueError(f"replace_with: method 'sdd' takes one text for {concept.text!r}, not several")
        method = Method(self, tools.denoiser, make_trajectory(self, tools.schedule), tools.guide)
        if (kept := replay.of(self, method.trajectory)) is not None:
            own = self.sample_prompt == "concept" and self.concept_order == "random"
            method = Replaying(method, kept, None if own else method.in_order)
        bank = make_bank(tools.encode, concepts, self.roles(concepts))
        return method, Inputs(bank, jnp.float32(self.sampling_guidance))

    def roles(self, concepts: Sequence[Concept]) -> Mapping[str, Callable[[Concept], str]]:
        """Which prompt a concept has in each role of the equation. The anchor is what the student is led to."""
        joined = ", ".join(c.text for c in concepts)
        if self.concept_order == "composite":
            anchor = ", ".join(dict.fromkeys(text for c in concepts for text in c.replace_with))
            return {"concept": lambda c: joined, "anchor": lambda c: anchor, "sample": lambda c: joined}
        return {
            "concept": lambda c: c.text,
            "anchor": lambda c: c.anchor,
            "sample": lambda c: joined if self.sample_prompt == "all" else c.text,
        }


def make_trajectory(settings: SDD, schedule: Schedule) -> Trajectory:
    """x_t after k steps, k counted from noise, at a timestep that is uniform over the k-th part of the schedule.

    A flow's network was trained on x_t at its own noise level alone, and its timesteps are no whole numbers.
    """
    steps, total = settings.sampling_steps, schedule.num_train_timesteps
    grid = trajectories.on_grid(schedule, samplers.plain(schedule), steps)
    k = grid.support
    updates = np.where((k == 0) & (not settings.fix_k0), steps, k)
    if schedule.path is not VARIANCE_PRESERVING:
        return replace(grid, num_updates=updates)
    edges = np.round(total * (1 - np.arange(steps + 1) / steps)).astype(int)
    return Trajectory(grid.sampler, k, updates, edges[1:], edges[:-1] - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What may change from run to run without compiling again."""

    bank: Bank
    sampling_guidance: Float[Array, ""]


@dataclass(frozen=True, eq=False)
class Method(base.Method):
    """SDD over one denoiser and schedule, as the three functions that a training step is made of."""

    settings: SDD
    denoiser: Network
    trajectory: Trajectory
    guide: base.Guide | None = None

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        """The random choices of a step; which concept it is about is drawn in the order "random" alone."""
        draws = self.trajectory.draw_batch(key, example_keys, shape, inputs.bank.num_concepts)
        return draws._replace(concept=self.in_order(step, draws.concept, inputs.bank.num_concepts))

    def in_order(self, step: Array, concept: Int[Array, " batch"], count: int) -> Int[Array, " batch"]:
        """The concepts that a step is about; `concept` holds the drawn ones."""
        order = self.settings.concept_order
        if order == "iterative":
            return jnp.full_like(concept, step % count)
        if order == "composite":  # every concept's prompt is the same
            return jnp.zeros_like(concept)
        if order == "sequential":
            assert self.settings.steps_per_concept is not None
            return jnp.full_like(concept, jnp.minimum(step // self.settings.steps_per_concept, count - 1))
        return concept

    def prepare(self, models: Models, draws: Draws, inputs: Inputs) -> Scored:
        """x_t of the average, and the student's prediction without the concept. Nothing carries a gradient."""
        x = self.trajectory.run(self.guided(models, draws.concept, inputs), draws.noise, draws.index)
        return self.scored(models, x, draws.t, draws.concept, (), inputs)

    def predict(self, models: Models, concept: Int[Array, " batch"], inputs: Inputs) -> replay.Predict:
        """What samples whole trajectories."""
        guided = self.guided(models, concept, inputs)
        return lambda x, t, i: (guided(x, t), ())

    def guided(self, models: Models, concept: Int[Array, " batch"], inputs: Inputs) -> Callable[..., Array]:
        """(x, t) -> the average's guided output."""
        sample, null = (inputs.bank.take(role, concept) for role in ("sample", "null"))
        assert models.average is not None  # `ema` is a number
        return base.sampling(self.denoiser, models.average, sample, null, inputs.sampling_guidance, self.guide)

    def scored(
        self,
        models: Models,
        x: Array,
        t: Array,
        index: Int[Array, " batch"],
        predictions: tuple[Array, ...],
        inputs: Inputs,
    ) -> Scored:
        """The student's prediction at x_t without the concept. index: the examples' concepts."""
        concept, anchor = (inputs.bank.take(role, index) for role in ("concept", "anchor"))
        target = denoise(self.denoiser, models.student, x, t, anchor)
        return Scored(*jax.lax.stop_gradient((x, t, concept, target)))

    def loss(self, student: Params, batch: Scored) -> Float[Array, ""]:
        return squared_error(self.denoiser, student, batch)
