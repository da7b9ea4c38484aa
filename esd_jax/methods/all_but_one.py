"""All but One: *Surgical Concept Erasing with Model Preservation* (Hong, Lee & Woo, AAAI 2024).

    d = gamma_1 [e*(x_t, c) - e*(x_t, null)] + delta                            (teacher, no gradient)
    L = mean (gamma_2 [e_theta(x_t, c) - sg[e_theta(x_t, null)]] - d)^2
        + lambda mean (e_theta(x_t, null) - e*(x_t, null))^2                    (Algorithm 1)

with x_t drawn by the teacher from e*(x, null) + d. So a student without loss that is sampled with plain guidance
gamma_2 draws what the teacher draws with delta. delta comes from instructions, texts c'' with a scale g each, or from
attention maps in which the concept's tokens are suppressed (Prompt-to-Prompt):

    explicit: sum g [step in window] [|D| >= quantile(|D|)] D,    D = e*(x_t, c'') - e*(x_t, null)
    implicit: gamma_1 [e*_suppressed(x_t, c) - e*(x_t, c)]

No code was released. Where the paper contradicts itself or is silent, this is chosen:
- Sign: +delta, as in Algorithm 1; Eq. 13 has it negative. x_t is drawn with +delta, and Eq. 23 has g = -7.5 for
  "sexual" and 6.5 for "bikini": away from the one and towards the other only if it is added.
- Window: t from floor(0.35 T) to T, and no delta before a warm-up of 5, may count sampler steps, or Algorithm 1's tau,
  which is T at pure noise. Sampler steps: a warm-up counts from the start, a window from t_high to t_low opens at high
  noise, Semantic Guidance counts so, and the layout, which the first steps make, is to be kept.
- lambda: 5 in the main text, 1 in the supplement (where "cross attention or to_out" is trained), 0 for purification:
  presets `table1`, `supp`, `purify`. The text calls 1.5 too strong. Both terms are means here and sums there.
- Quantile: per channel, as in Semantic Guidance; the paper has no axis.
- Guidance 1 is purely conditional, as in Algorithm 1 (0 is in Eq. 6). Its loop never ends for t = T: x_t is pure noise.
- Implicit: scale 0 in all cross-attentions at all steps, the end token untouched; the paper does not mention it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from esd_jax.diffusion import rules, samplers
from esd_jax.erasing import contexts, galleries, replay, rounds, trajectories
from esd_jax.erasing import method as base
from esd_jax.erasing.concepts import Bank, Concept, make_bank, reader
from esd_jax.erasing.method import Models, Tools, choose, denoise, evaluate, project
from esd_jax.erasing.replay import Replaying
from esd_jax.erasing.round_settings import RoundsSettings
from esd_jax.erasing.trajectories import Draws, Trajectory
from esd_jax.models.attention import Attention
from esd_jax.params import Conditioning, Network, Params


@dataclass(frozen=True)
class AllButOne(RoundsSettings):
    """Settings; the defaults are the main text's (the `table1` preset).

    delta: "explicit" or "implicit".
    instructions: "sexual:-7.5 | bikini:6.5 | pants:6.5", the same for every concept. By default a concept's are its own
      text at `erase_scale` and each of its `replace_with` at `replace_scale`.
    erase_scale, replace_scale: of the instructions that a concept brings itself.
    gamma_1, gamma_2: guidance of the teacher, and the guidance at which the student is to draw the same.
    penalty: lambda. At 0 no gradient reaches the student's prediction for the empty prompt.
    sampling_steps: T, of the teacher's trajectory, by DDIM; along a rectified flow by Euler's method.
    delta_index: what the window counts: "step", or "tau" = T - step.
    window_start, window_end: of delta, as parts of T, both included. delta_warmup: no delta below this count.
    kappa: of |D|, what lies below this quantile is left out.
    quantile_of: whose quantile that is: a "channel"'s pixels, or the whole "example".
    token_scale: of the concept's tokens in the maps of the implicit delta.
    updates_per_trajectory, trajectory_buffer: 1 and 1 sample afresh in every update; else whole trajectories are drawn
      every so many updates, and the last few are kept with what the teacher predicted on them (see `replay`).
    contexts: of inversion rounds (no part of the paper): "a dog in {}: a dog | {} in ink style: {} in ink style",
      prompts with {} for the concept, in whose place adversaries stand, and what each becomes, with {} for its first
      `replace_with`, by default the empty prompt.

    A concept's strength multiplies the scales of its instructions below zero, and the suppression 1 - `token_scale`.
    """

    delta: str = "explicit"
    instructions: str | None = None
    erase_scale: float = -7.5
    replace_scale: float = 6.5
    gamma_1: float = 7.5
    gamma_2: float = 7.5
    penalty: float = 5.0
    sampling_steps: int = 35
    delta_index: str = "step"
    window_start: float = 0.35
    window_end: float = 1.0
    delta_warmup: int = 5
    kappa: float = 0.95
    quantile_of: str = "channel"
    token_scale: float = 0.0
    updates_per_trajectory: int = 1
    trajectory_buffer: int = 1
    contexts: str | None = None

    trained: ClassVar = True
    uses: ClassVar = frozenset({"replace_with", "strength"})
    several: ClassVar = True  # replacements of a concept all count
    ema: ClassVar = None
    CHOICES: ClassVar = {
        "delta": ("explicit", "implicit"),
        "delta_index": ("step", "tau"),
        "quantile_of": ("channel", "example"),
    }
    ADAMW: ClassVar = {"optimizer": "adamw", "learning_rate": 1e-5, "weight_decay": 1e-2, "steps": 200}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "table1": {"subset": "to_out", **ADAMW},
        "supp": {"penalty": 1.0, "subset": "xattn", **ADAMW},
        "purify": {"penalty": 0.0, "subset": "xattn", **ADAMW},
        "sd3": {**ADAMW, "sampling_steps": 28, "subset": "flow-text", "rank": 16, "learning_rate": 1e-4},
    }

    def __post_init__(self):
        choose(self, **self.CHOICES)
        replay.check(self)
        self.check_rounds()
        if contexts.parse(self.contexts) and not self.rounds_every:
            raise ValueError("contexts are what inversion rounds search in: give rounds_every, too")
        if not 0 <= self.kappa <= 1:
            raise ValueError(f"kappa={self.kappa} must be in 0..1")
        if self.penalty < 0:
            raise ValueError(f"penalty={self.penalty} must be at least 0")
        if self.gamma_2 == 0:
            raise ValueError("gamma_2=0 leaves nothing to train")
        if self.delta == "implicit" and self.instructions:
            raise ValueError("instructions mean nothing with delta='implicit'")
        if self.delta == "explicit" and self.sampling_steps > 0 and not active_steps(self).any():
            raise ValueError(
                f"window_start={self.window_start}, window_end={self.window_end} and delta_warmup={self.delta_warmup} "
                f"leave delta none of sampling_steps={self.sampling_steps}"
            )
        parse(self.instructions)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"classifier_free", *(["cross_attention"] if self.delta == "implicit" else [])})

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple[base.Method, Any]:
        """All but One over the concepts. Raises ValueError for images, and for what contradicts the settings."""
        if tools.images is not None:
            raise ValueError("method 'all_but_one' takes no images: it generates its own")
        orders = {c: instruct(self, c, reader(tools.tokens)) for c in concepts}
        roles = {"concept": lambda c: c.text, "instruction": lambda c: [text for text, _ in orders[c][1:]]}
        bank = make_bank(tools.encode, concepts, roles)
        most = max(map(len, orders.values()))
        rows = [[g for _, g in order] + [0.0] * (most - len(order)) for order in (orders[c] for c in concepts)]
        token_scale = None
        if self.delta == "implicit":
            kept = jnp.asarray([[1 - c.strength * (1 - self.token_scale)] for c in concepts])
            token_scale = jnp.where(concept_tokens(tools, [c.text for c in concepts]), kept, 1.0)
        becomes = {"student": lambda c: c.from_ or c.text, "anchor": lambda c: c.anchor}
        named = galleries.prompts_of(concepts, contexts.parse(self.contexts), becomes) if self.rounds_every else []
        trajectory = trajectories.on_grid(tools.schedule, samplers.plain(tools.schedule), self.sampling_steps)
        numbers = map(jnp.float32, (rows, self.gamma_1, self.gamma_2, self.penalty))
        method, kept = Method(self, tools.denoiser, trajectory), replay.of(self, trajectory, predictions=2)
        if kept is not None:
            method = Replaying(method, kept)
        inputs, sampling = Inputs(bank, *numbers, token_scale=token_scale), {"steps": self.sampling_steps}
        return rounds.adding(self, method, inputs, tools, named, {**sampling, "guidance_scale": self.gamma_1})


def active_steps(settings: AllButOne) -> Bool[np.ndarray, " step"]:
    """At which sampler steps the explicit delta acts (the paper's B_c and B_w)."""
    total = settings.sampling_steps
    step = np.arange(total)
    count = step if settings.delta_index == "step" else total - step
    # The small number keeps a product like 0.29 * 100 = 28.999... from losing a step.
    first, last = (math.floor(part * total + 1e-9) for part in (settings.window_start, settings.window_end))
    return (first <= count) & (count <= last) & (count >= settings.delta_warmup)


def parse(instructions: str | None) -> list[tuple[str, float]]:
    """(text, scale) of each instruction. Raises ValueError for what is not TEXT:SCALE."""
    parts = [part.rpartition(":") for part in instructions.split("|")] if instructions else []
    try:
        pairs = [(text.strip(), float(scale)) for text, _, scale in parts]
    except ValueError:
        pairs = [("", math.nan)]
    if not all(text and math.isfinite(scale) for text, scale in pairs):
        raise ValueError(f"instructions={instructions!r}: each is TEXT:SCALE, and several are separated by '|'")
    return pairs


def instruct(settings: AllButOne, concept: Concept, read: Callable[[str], tuple[int, ...]]) -> list[tuple[str, float]]:
    """(text, scale) of a concept's instructions, its own text first: at 0 if no instruction has it.

    read: prompt -> the ids of its words, by which texts are compared (`concepts.reader`).
    """
    instructions = parse(settings.instructions)
    if concept.replace_with and (instructions or settings.delta == "implicit"):
        raise ValueError("replace_with means nothing with delta='implicit', or where instructions are given")
    if not instructions and settings.delta == "explicit":
        instructions = [(concept.text, settings.erase_scale)]
        instructions += [(text, settings.replace_scale) for text in concept.replace_with]
    scaled = [(text, g * concept.strength if g < 0 else g) for text, g in instructions]
    own = read(concept.text)
    others = [(text, g) for text, g in scaled if read(text) != own]
    return [(concept.text, sum(g for text, g in scaled if read(text) == own)), *others]


def concept_tokens(tools: Tools, texts: Sequence[str]) -> Bool[np.ndarray, "texts tokens"]:
    """Where the words of a text stand among its tokens: all between the start and the first end token."""
    ids, end = np.asarray(tools.tokens(texts)), np.asarray(tools.tokens([""]))[0, 1]
    position = np.arange(ids.shape[1])
    return (position >= 1) & (position < np.argmax(ids == end, axis=1)[:, None])


class Batch(NamedTuple):
    """What the student is scored on. `student_null` is set where no gradient reaches it: without penalty."""

    x: Float[Array, "batch height width channel"]
    t: Float[Array, ""]
    concept: Conditioning
    null: Conditioning
    target: Float[Array, "batch height width channel"]
    teacher_null: Float[Array, "batch height width channel"]
    student_null: Float[Array, "batch height width channel"] | None
    gamma_2: Float[Array, ""]
    penalty: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What may change from run to run without compiling again.

    scales: g of the concept's own text, then of its other instructions. token_scale: of the implicit delta.
    """

    bank: Bank
    scales: Float[Array, "concepts instructions"]
    gamma_1: Float[Array, ""]
    gamma_2: Float[Array, ""]
    penalty: Float[Array, ""]
    token_scale: Float[Array, "concepts tokens"] | None = None


@dataclass(frozen=True, eq=False)
class Method(base.Method):
    """All but One over one denoiser and schedule, as the three functions that a training step is made of."""

    settings: AllButOne
    denoiser: Network
    trajectory: Trajectory

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        """The random choices of a step."""
        return self.trajectory.draw_batch(key, example_keys, shape, inputs.bank.num_concepts)

    def prepare(self, models: Models, draws: Draws, inputs: Inputs) -> Batch:
        """x_t and the guidance that led to it. Nothing here carries a gradient."""
        predict = self.predict(models, draws.concept, inputs)
        steered = lambda x, t, i, memory: (predict(x, t, i)[0], memory)  # noqa: E731
        x = self.trajectory.run(steered, draws.noise, draws.index, memory=())
        prompts = self.prompts(draws.concept, inputs)
        predictions = self.edited(models.base, prompts, draws.concept, inputs, x, draws.t, draws.index)
        return self.scored(models, x, draws.t, draws.concept, predictions, inputs)

    def predict(self, models: Models, concept: Int[Array, " batch"], inputs: Inputs) -> replay.Predict:
        """What samples trajectories, with the teacher's prediction for the empty prompt, and d."""

        prompts = [project(self.denoiser, models.base, prompt) for prompt in self.prompts(concept, inputs)]

        def steered(x: Array, t: Array, i: Array) -> tuple[Array, tuple[Array, ...]]:
            eps_null, d = self.edited(models.base, prompts, concept, inputs, x, t, i)
            return eps_null + d, (eps_null, d)

        return steered

    def scored(
        self,
        models: Models,
        x: Array,
        t: Array,
        index: Int[Array, " batch"],
        predictions: tuple[Array, ...],
        inputs: Inputs,
    ) -> Batch:
        """What the student is scored on. index: the examples' concepts; predictions: `edited`'s at x_t."""
        teacher_null, target = predictions
        null, concept = (inputs.bank.take(role, index) for role in ("null", "concept"))
        student_null = None if self.settings.penalty else denoise(self.denoiser, models.student, x, t, null)
        values = (x, t, concept, null, target, teacher_null, student_null, inputs.gamma_2, inputs.penalty)
        return Batch(*jax.lax.stop_gradient(values))

    def prompts(self, index: Int[Array, " batch"], inputs: Inputs) -> list[Conditioning]:
        """What the teacher is evaluated for: the empty prompt, the concept, its other instructions."""
        null, concept, texts = (inputs.bank.take(role, index) for role in ("null", "concept", "instruction"))
        count = 0 if inputs.token_scale is not None else inputs.scales.shape[1] - 1
        return [null, concept, *(jax.tree.map(lambda a, j=j: a[:, j], texts) for j in range(count))]

    def edited(
        self,
        teacher: Params,
        prompts: Sequence[Conditioning],
        index: Int[Array, " batch"],
        inputs: Inputs,
        x: Array,
        t: Array,
        i: Array,
    ) -> tuple[Array, Array]:
        """The teacher's prediction for the empty prompt, and d, at sampler step i. index: the examples' concepts."""
        null, concept, *others = prompts
        score = partial(evaluate, self.denoiser, teacher, x, t)
        if inputs.token_scale is not None:
            scale = inputs.token_scale[index]
            pairs = jnp.stack([jnp.ones_like(scale), scale], axis=1).reshape(-1, scale.shape[-1])
            eps_null, eps_c = score([null, concept], Attention(token_scale=pairs))
            return eps_null, inputs.gamma_1 * (eps_c - eps_null)

        active = jnp.asarray(active_steps(self.settings))[i]
        scales = jnp.where(active, inputs.scales[index], 0)[:, :, None, None, None]

        def with_others(others: Sequence[Conditioning]) -> tuple[Array, Array]:
            eps_null, *eps = score([null, concept, *others])
            directions = [e - eps_null for e in eps]
            kept = (rules.largest(d, self.settings.kappa, self.settings.quantile_of) for d in directions)
            delta = sum(scales[:, j] * d for j, d in enumerate(kept))
            return eps_null, inputs.gamma_1 * directions[0] + delta

        if not others:
            return with_others([])
        # Outside the window the instructions' predictions would be multiplied by zero.
        return jax.lax.cond(active, lambda: with_others(others), lambda: with_others([]))

    def led(self, inputs: Inputs) -> tuple[Array, Array]:
        """To the first instruction that is followed, not avoided, if one is; else to the empty prompt."""
        concept, texts = inputs.bank.roles["concept"], inputs.bank.roles["instruction"]
        if inputs.scales.shape[1] < 2:
            return concept, jnp.zeros_like(concept)
        followed = inputs.scales[:, 1:] > 0
        first = jnp.take_along_axis(texts, jnp.argmax(followed, axis=1)[:, None], axis=1)[:, 0]
        return concept, jnp.where(followed.any(axis=1), first, 0)

    def loss(self, student: Params, batch: Batch) -> Float[Array, ""]:
        """The concept's term and the penalty, each a mean over all elements, in float32 at least."""
        if batch.student_null is not None:
            v = denoise(self.denoiser, student, batch.x, batch.t, batch.concept)
            return jnp.mean((batch.gamma_2 * (v - batch.student_null) - batch.target) ** 2)
        v, u = evaluate(self.denoiser, student, batch.x, batch.t, [batch.concept, batch.null])
        error = batch.gamma_2 * (v - jax.lax.stop_gradient(u)) - batch.target
        return jnp.mean(error**2) + batch.penalty * jnp.mean((u - batch.teacher_null) ** 2)
