"""ESD: *Erasing Concepts from Diffusion Models* (Gandikota et al., ICCV 2023).

    target = e*(x_t, anchor) - eta [ e*(x_t, c) - e*(x_t, null) ]          (teacher, no gradient)
    L      = mean (e_theta(x_t, c) - target)^2                             (Eq. 6-7: anchor = null)

with x_t drawn by the model itself from the concept. Beside the concept alone, prompts p that have it in them may be
erased from, too (no paper's; `contexts`), with the rest of the prompt as anchor:

    L      = mean (e_theta(x_t, p) - target)^2,    anchor = p without c,    x_t drawn from p

Published variants differ in how x_t, its timestep and the anchor are chosen; `ESD.PRESETS` reproduces each with its
off-by-ones, as switches of one implementation. Along a rectified flow e is the velocity: at one x_t and t it is an
affine function of the noise that it implies, so the equations are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from esd_jax.diffusion import guidance, samplers
from esd_jax.diffusion.path import VARIANCE_PRESERVING
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing import contexts, galleries, replay, rounds, trajectories
from esd_jax.erasing import method as base
from esd_jax.erasing.concepts import Bank, Concept, make_bank
from esd_jax.erasing.contexts import Context
from esd_jax.erasing.method import Models, Scored, Tools, choose, denoise, evaluate, project, squared_error
from esd_jax.erasing.replay import Replaying
from esd_jax.erasing.round_settings import RoundsSettings
from esd_jax.erasing.trajectories import Trajectory
from esd_jax.params import Conditioning, Network, Params


@dataclass(frozen=True)
class ESD(RoundsSettings):
    """Settings; the defaults are the paper's (the `paper` preset).

    sample_with: "student" (2023) or "teacher" (2025): whose trajectories x_t is taken from.
    sampler: any of `samplers.SAMPLERS`.
    timestep_mode: which timestep x_t is scored at, after `num_updates` sampler steps (see `make_trajectory`).
      "compvis": the released 2023 code. It starts one grid entry late and scores x_t at t ~ U[20k, 20k + 19], 39 to 58
        training steps noisier than x_t is; k = 0 and k = 1 share one x_t.
      "grid": x_t is scored at its own timestep.
      "alt1000": the 2024 demo code. x_t after i steps is scored at t = 1000 - 20 i, 19 steps noisier than it is.
    anchor: what the target starts from. "null": the empty prompt; "from": `from_`, or the concept itself where
      `from_` is absent; "auto": `replace_with` where it is given, else `from_` where that is given and is not the
      concept itself, else the empty prompt.
    sample_prompt: "concept" or "from": what the trajectory is conditioned on.
    contexts: "a dog in {}: a dog | {} in ink style: {} in ink style": prompts with {} for the concept, and what each
      becomes, with {} for its `replace_with`. An update is made on the concept alone or on one of these, all equally
      often.
    context_eta: strength there. The anchor already says nothing of the concept, so 0 takes it away, too.
    window: x_t is drawn from this first part of the trajectory's points, pure noise among them; 1 is all of it.
    eta: strength. With `anchor="from"` and no `from_`, it is the paper's eta + 1 (the anchor is eps_c, not eps_null).
    sampling_steps, sampling_guidance: of the trajectory.
    train_guidance: the scale that a guidance-distilled network (FLUX.1 [dev]) takes wherever it is scored, by teacher
      and student alike; at 1 its output is that of the prompt alone. Other networks take none.
    updates_per_trajectory, trajectory_buffer: 1 and 1 sample afresh up to a random x_t in every update, as all papers
      do. Else whole trajectories are drawn every so many updates, the last few of them are kept for each example of
      a batch, and an update takes random points of these, each example at a timestep of its own (see `replay`).
    as_released: two slips of the released SDXL code. x_t is scored as Euler's sampler keeps it, up to 13 times larger
      than the network was trained on, since it is not scaled; and its trajectory is guided from zeros, though the null
      that is scored is the encoded empty prompt.
    """

    sample_with: str = "student"
    sampler: str = "ddim"
    timestep_mode: str = "compvis"
    anchor: str = "auto"
    sample_prompt: str = "concept"
    eta: float = 1.0
    sampling_steps: int = 50
    sampling_guidance: float = 3.0
    as_released: bool = False
    updates_per_trajectory: int = 1
    trajectory_buffer: int = 1
    contexts: str | None = None
    context_eta: float = 1.0
    window: float = 1.0
    train_guidance: float = 1.0

    trained: ClassVar = True
    uses: ClassVar = frozenset({"from_", "replace_with", "strength"})
    needs: ClassVar = frozenset()
    ema: ClassVar = None
    CHOICES: ClassVar = {
        "sample_with": ("student", "teacher"),
        "sampler": samplers.SAMPLERS,
        "timestep_mode": trajectories.MODES,
        "anchor": ("null", "from", "auto"),
        "sample_prompt": ("concept", "from"),
    }
    # "flux2026" is the released code for FLUX.1 [dev]; the three after it are this package's, untuned.
    FLOW: ClassVar[Mapping[str, Any]] = {
        "sample_with": "teacher", "sampler": "flow_euler", "timestep_mode": "grid", "sampling_steps": 28,
        "subset": "flow-text", "rank": 16, "optimizer": "adam", "learning_rate": 1e-4, "steps": 1400,
        "sampling_guidance": 3.5, "height": 512, "width": 512,
    }  # fmt: skip
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"subset": "esd-x", "optimizer": "adam", "learning_rate": 1e-5, "steps": 1000},
        "esd2025": {
            "sample_with": "teacher", "sampler": "pndm", "timestep_mode": "grid", "anchor": "from",
            "sample_prompt": "from", "eta": 2.0,
            "subset": "esd-x", "optimizer": "adam", "learning_rate": 5e-5, "steps": 200,
        },
        "sdxl": {
            "sample_with": "teacher", "sampler": "euler", "timestep_mode": "grid", "anchor": "from",
            "sample_prompt": "from", "eta": 1.0, "sampling_guidance": 2.0,
            "subset": "esd-x", "optimizer": "adam", "learning_rate": 2e-4, "steps": 200,
        },
        "alt": {
            "timestep_mode": "alt1000", "eta": 2.0,
            "subset": "esd-all", "optimizer": "adam", "learning_rate": 2e-5, "steps": 200,
        },
        "fast": {
            "sample_with": "teacher", "sampler": "dpmpp_2m", "timestep_mode": "grid", "sampling_steps": 20,
            "updates_per_trajectory": 10, "trajectory_buffer": 4,
            "subset": "esd-x", "optimizer": "adam", "learning_rate": 1e-5, "steps": 1000,
        },
        "flux2026": {**FLOW, "anchor": "from", "sample_prompt": "from", "subset": "esd-x", "rank": 0},
        "flux": {**FLOW},
        "schnell": {**FLOW, "sampling_steps": 4, "updates_per_trajectory": 4},
        "sd3": {**FLOW, "sampling_guidance": 4.5},
    }  # fmt: skip

    def __post_init__(self):
        choose(self, **self.CHOICES)
        replay.check(self)
        self.check_rounds()
        if not 0 < self.window <= 1:
            raise ValueError(f"window={self.window} must be above 0 and at most 1")
        if self.sentences and self.anchor != "auto":
            raise ValueError(f"contexts name their own anchors, so they need anchor='auto', not {self.anchor!r}")
        if self.as_released and replay.wanted(self):
            raise ValueError(
                "as_released repeats code that samples afresh in every update: leave updates_per_trajectory and "
                "trajectory_buffer at 1"
            )

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple[base.Method, Any]:
        """ESD for the concepts' kinds of anchor."""
        if tools.guide is None and self.train_guidance != 1:
            raise ValueError(f"train_guidance={self.train_guidance} is for guidance-distilled models: leave it out")
        roles, trajectory = self.roles(), make_trajectory(self, tools.schedule)
        named = galleries.prompts_of(concepts, self.sentences, roles) if self.rounds_every else []
        concepts = contexts.expanded(concepts, self.sentences)
        separate = any(roles["anchor"](c) not in ("", c.text) for c in concepts)
        method: Any = Method(self, tools.denoiser, tools.schedule, trajectory, separate, tools.null, tools.guide)
        own = all(roles["sample"](c) == c.text for c in concepts)
        # A distilled network samples at one scale of guidance, and is scored at another.
        predictions = 2 if self.predicts(trajectory) and own and not separate and tools.guide is None else 0
        if (kept := replay.of(self, trajectory, predictions)) is not None:
            if tools.images is not None:
                raise ValueError(
                    "with images nothing is sampled: leave updates_per_trajectory and trajectory_buffer at 1"
                )
            method = Replaying(method, kept)
        eta = [c.strength * (self.context_eta if self.in_context(c) else self.eta) for c in concepts]
        bank = make_bank(tools.encode, concepts, roles)
        inputs = Inputs(bank, jnp.asarray(eta, jnp.float32), jnp.float32(self.sampling_guidance), tools.images)
        sampling = {"steps": self.sampling_steps, "guidance_scale": self.sampling_guidance}
        return rounds.adding(self, method, inputs, tools, named, sampling)

    def predicts(self, trajectory: Trajectory) -> bool:
        """Whether the sampler evaluates the teacher just where the loss does."""
        return self.sample_with == "teacher" and trajectory.scored_where_sampled

    @property
    def sentences(self) -> tuple[Context, ...]:
        """`contexts`, as they are read."""
        return contexts.parse(self.contexts)

    def in_context(self, concept: Concept) -> bool:
        """Whether it is a concept in one of `contexts`, as `contexts.expanded` makes them."""
        return bool(self.sentences) and concept.from_ is not None

    def roles(self) -> Mapping[str, Callable[[Concept], str]]:
        """Which prompt a concept has in each role of the equation."""
        anchors = {
            "null": lambda c: "",
            "from": lambda c: c.from_ or c.text,
            "auto": lambda c: c.replace_with[0] if c.replace_with else "" if c.from_ in (None, c.text) else c.from_,
        }
        return {
            "concept": lambda c: c.text,
            "student": lambda c: c.from_ or c.text,
            "anchor": anchors[self.anchor],
            "sample": lambda c: c.from_ or c.text if self.sample_prompt == "from" or self.in_context(c) else c.text,
        }


def make_trajectory(settings: ESD, schedule: Schedule) -> Trajectory:
    """The tables of a timestep mode, and what of them is drawn.

    Raises ValueError where a mode and a sampler do not go together, or nothing is left to draw.
    """
    whole = trajectories.of_mode(schedule, settings.timestep_mode, settings.sampler, settings.sampling_steps)
    return whole.first(settings.window, settings.sampling_steps)


class Draws(NamedTuple):
    """Everything random in one step. `index` and `t` are shared by the batch, so that one loop serves all of it."""

    index: Int[Array, ""]
    t: Float[Array, ""]
    concept: Int[Array, " batch"]
    noise: Float[Array, "batch height width channel"]
    image: Int[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What may change from run to run without compiling again.

    images: latents of memorised images [images, height, width, channel]; with them x_t is a noised image instead of
      a sample (Sec. 5.4 of the paper).
    """

    bank: Bank
    eta: Float[Array, " concepts"]
    sampling_guidance: Float[Array, ""]
    images: Float[Array, "images height width channel"] | None = None


@dataclass(frozen=True, eq=False)
class Method(base.Method):
    """ESD over one denoiser and schedule, as the three functions that a training step is made of.

    `separate_anchor`: whether any anchor is neither the empty prompt nor the concept; only then does the target
    cost a third evaluation of the teacher. null, guide: `Tools.null`, `Tools.guide`.
    """

    settings: ESD
    denoiser: Network
    schedule: Schedule
    trajectory: Trajectory
    separate_anchor: bool
    null: Callable[..., Conditioning]
    guide: base.Guide | None = None

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        """The random choices of a step: index and t from `key`, the rest of each example from its own key."""
        index, t = self.trajectory.draw(key)
        num_images = 1 if inputs.images is None else inputs.images.shape[0]

        def example(key: Array) -> tuple[Array, Array, Array]:
            concept, noise, image = jax.random.split(key, 3)
            return (
                jax.random.randint(concept, (), 0, inputs.bank.num_concepts),
                jax.random.normal(noise, shape),
                jax.random.randint(image, (), 0, num_images),
            )

        concept, noise, image = jax.vmap(example)(example_keys)
        return Draws(index, t, concept, noise, image)

    def prepare(self, models: Models, draws: Draws, inputs: Inputs) -> Scored:
        """x_t, and the student's target. Nothing here carries a gradient."""
        if inputs.images is not None:
            discrete = self.schedule.path is VARIANCE_PRESERVING
            t = draws.t.astype(jnp.int32) if discrete else draws.t
            x = add_noise(self.schedule, inputs.images[draws.image], draws.noise, t)
        else:
            guided = self.predict(models, draws.concept, inputs)
            x = self.trajectory.run(
                lambda x, t: guided(x, t, draws.index)[0],
                draws.noise,
                draws.index,
                scale=not self.settings.as_released,
            )
        return self.scored(models, x, draws.t, draws.concept, (), inputs)

    def predict(self, models: Models, concept: Int[Array, " batch"], inputs: Inputs) -> replay.Predict:
        """What samples trajectories, with (eps_null, eps_c); without, if guidance is an input of the network."""
        if self.guide is not None:
            null, prompt = (inputs.bank.take(role, concept) for role in ("null", "sample"))
            own = (self.denoiser, self.sampler(models), prompt, null)
            network = base.sampling(*own, inputs.sampling_guidance, self.guide)
            return lambda x, t, i: (network(x, t), ())
        pair = self.pair(models, concept, inputs)

        def guided(x: Array, t: Array, i: Array) -> tuple[Array, tuple[Array, ...]]:
            predictions = pair(x, t)
            return guidance.cfg(*predictions, scale=inputs.sampling_guidance), predictions

        return guided

    def pair(self, models: Models, concept: Int[Array, " batch"], inputs: Inputs) -> Callable[..., tuple[Array, ...]]:
        """(x, t) -> (eps_null, eps_c), by the model that trajectories are taken from."""
        params = self.sampler(models)
        null, sample = (inputs.bank.take(role, concept) for role in ("null", "sample"))
        start = self.null(null) if self.settings.as_released else null
        network, once = (partial(f, self.denoiser, params) for f in (denoise, project))
        return guidance.together(network, [start, sample], once)

    def sampler(self, models: Models) -> Params:
        """The weights of the model that trajectories are taken from."""
        return models.student if self.settings.sample_with == "student" else models.base

    def scored(
        self,
        models: Models,
        x: Float[Array, "batch height width channel"],
        t: Float[Array, "*batch"],
        index: Int[Array, " batch"],
        predictions: tuple[Array, ...],
        inputs: Inputs,
    ) -> Scored:
        """The student's target at x_t.

        index: the examples' concepts. predictions: the teacher's (eps_null, eps_c) there; () evaluates it.
        """
        take = partial(inputs.bank.take, concept=index)
        score = partial(evaluate, self.denoiser, models.base, x, t)
        if self.separate_anchor:
            eps_anchor, eps_c, eps_null = score([take("anchor"), take("concept"), take("null")])
        else:
            eps_null, eps_c = predictions or score([take("concept"), take("null")])[::-1]
            is_null = (inputs.bank.roles["anchor"][index] == 0)[:, None, None, None]
            eps_anchor = jnp.where(is_null, eps_null, eps_c)
        target = eps_anchor - inputs.eta[index][:, None, None, None] * (eps_c - eps_null)
        return Scored(*jax.lax.stop_gradient((x, t, take("student"), target)))

    def led(self, inputs: Inputs) -> tuple[Array, Array]:
        """An anchor that is the concept itself says nothing of what remains of it: then it is the empty prompt."""
        asked, anchor = inputs.bank.roles["student"], inputs.bank.roles["anchor"]
        return asked, jnp.where(anchor == asked, 0, anchor)

    def loss(self, student: Params, batch: Scored) -> Float[Array, ""]:
        return squared_error(self.denoiser, student, batch)
