"""STEREO: *A Two-Stage Framework for Adversarially Robust Concept Erasing* (Srivatsan et al., CVPR 2025, 2408.16807).

Search thoroughly enough: K rounds, each of which erases a text v from the student as the rounds before left it,

    L = mean (e_theta(x_t, v) - e*(x_t, null))^2

and then learns one new token from images of the concept in this student (`textual_inversion`). v is v_0, the concept's
name, at first, and then what the round before learned. Robustly erase once: all of v_0 ... v_K, from the base's weights
again,

    target = e*(x_t, null) + (s - 1) d(a) - (s + 1) mean_i d(v_i),    d(y) = e*(x_t, y) - e*(x_t, null)
    L      = mean (e_theta(x_t, v) - target)^2

with v one of v_0 ... v_K and a, the anchor, one of several sentences without the concept. x_t is drawn by the student
from v. Both stages are one run, whose student and optimizer restart between them.

What the released code does otherwise:
- Its first target is e(v) - (g - 1) [e(v) - e(null)], which is e(null) with its g = 2; and this e is the model with
  which the round began, here the base.
- The texts and the anchors of the second stage are drawn so that all are drawn equally often.
- Its latents are drawn from what the VAE's encoder says, here they are its means; and t = 999 is never learned at.

Paper and code have one text encoder. With several (SDXL) a new token has an embedding in each, and a round learns all
of them at once, as inversion rounds and Concept Inversion do.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from esd_jax.diffusion import guidance, samplers
from esd_jax.erasing import contexts, textual_inversion, trajectories
from esd_jax.erasing import method as base
from esd_jax.erasing.concepts import Bank, Concept, make_bank
from esd_jax.erasing.galleries import own_params, text_of
from esd_jax.erasing.images import drawn
from esd_jax.erasing.method import Models, Scored, Tools, choose, denoise, evaluate, project, squared_error
from esd_jax.erasing.textual_inversion import NAME, Encoder, TextualInversion, each
from esd_jax.erasing.trajectories import Trajectory
from esd_jax.params import Conditioning, Network, Params, bare, shape_of

SEARCH = 2**30  # apart from the keys of updates, which are numbered from 0
CHOICE = 5  # of an example's key; fold_in(key, i) is split(key, n)[i], and the first two are the trajectory's
STYLE = (
    "a painting in the style of {concept}; a rendering in the style of {concept}; a picture in the style of {concept}; "
)
STYLE += "a close-up painting in the style of {concept}; a large painting in the style of {concept}"
OBJECT = "a photo of {concept}; a rendering of {concept}; a close-up photo of {concept}; a good photo of {concept}; "
OBJECT += "a photo of one {concept}"


@dataclass(frozen=True)
class STEREO:
    """Settings; the defaults are the released code's, for a style.

    A concept's anchors are its `replace_with` and the prompts of `contexts` without the concept; without any of these,
    the empty prompt. `strength` multiplies s + 1.

    search_rounds: K. With 2 rounds and `preserve` this is ReCARE, but that retained prompts are scored at x_t of their
      own, not at the method's.
    search_updates: of each of these; all updates after them are the second stage's.
    search_pace: the first stage's learning rate, as a part of `learning_rate`.
    scale: s, which leads to the anchor by s - 1 and away from the texts by s + 1.
    contexts: "a dog in {}: a dog | a car in {}: a car": prompts with {} for the concept, and the same without it, an
      anchor. Of the former nothing is used; in the released code a language model wrote the anchors.
    timestep_mode: which timestep x_t is scored at, as of ESD.
    sampling_steps, sampling_guidance: of the trajectory.
    inversion_steps, inversion_learning_rate: of each round's textual inversion, one image a step.
    inversion_tokens: what the new token starts from: a word that is one token, or "<rand-S>", which is S times Gaussian
      noise. Several tokens are separated by "|"; the paper has one. With several text encoders it starts so in each.
    template: the prompts of the images, "{concept}" in the place of the concept, separated by ";". A step of the
      inversion takes any of them.
    drawn_images: of each concept, drawn by the base in place of a gallery; each round learns from a part of its own.
    drawing_sampler, drawing_steps, drawing_guidance, drawing_seed: how they are drawn; without a sampler, by the
      checkpoint's own.
    """

    search_rounds: int = 4
    search_updates: int = 200
    search_pace: float = 0.25
    scale: float = 2.0
    contexts: str | None = None
    timestep_mode: str = "alt1000"
    sampling_steps: int = 50
    sampling_guidance: float = 3.0
    inversion_steps: int = 3000
    inversion_tokens: str = "art"
    inversion_learning_rate: float = 5e-3
    template: str = STYLE
    drawn_images: int = 20
    drawing_sampler: str | None = None
    drawing_steps: int = 50
    drawing_guidance: float = 7.5
    drawing_seed: int = 0

    trained: ClassVar = True
    uses: ClassVar = frozenset({"replace_with", "strength"})
    several: ClassVar = True  # replacements of a concept all count
    needs: ClassVar = frozenset({"variance_preserving", "soft_tokens"})  # its sampler is DDIM
    ema: ClassVar = None
    ADAMW: ClassVar = {"optimizer": "adamw", "learning_rate": 2e-5, "weight_decay": 1e-2, "steps": 1000}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "style": {"subset": "xattn", **ADAMW},
        "object": {"subset": "noxattn", "inversion_tokens": "object", "template": OBJECT, **ADAMW},
    }

    def __post_init__(self):
        choose(self, timestep_mode=trajectories.MODES)
        if self.drawing_sampler is not None:
            choose(self, drawing_sampler=samplers.SAMPLERS)
        if not all(NAME in template for template in self.templates):
            raise ValueError(f"template={self.template!r} must say where the concept stands: {NAME}")
        for name in ("search_rounds", "search_updates", "inversion_steps", "drawing_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("search_pace", "inversion_learning_rate"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.drawn_images < self.search_rounds:
            raise ValueError(f"drawn_images={self.drawn_images} must be at least search_rounds={self.search_rounds}")
        contexts.parse(self.contexts)

    @property
    def discarded(self) -> int:
        """Updates of the first stage."""
        return self.search_rounds * self.search_updates

    @property
    def templates(self) -> list[str]:
        """The prompts of the images."""
        return [template.strip() for template in self.template.split(";")]

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple["Method", "Inputs"]:
        """STEREO over the concepts. Raises ValueError for images, and for new tokens that do not fit a template."""
        if tools.images is not None:
            raise ValueError("method 'stereo' takes no images: it generates its own")
        text = text_of(tools)
        roles = {"concept": lambda c: c.text, "anchor": self.anchors}
        bank = make_bank(tools.encode, concepts, roles)
        start = text.initial(self.inversion_tokens, jax.random.key(self.drawing_seed))
        count = len(each(start)[0])
        ids = jax.tree.map(lambda *a: jnp.stack(a), *[text.place(one, count) for one in (NAME, *self.templates)])
        trajectory = trajectories.of_mode(tools.schedule, self.timestep_mode, "ddim", self.sampling_steps)
        row = jax.tree.map(lambda a: shape_of(a.shape[1:], a.dtype), bank.rows)
        search = TextualInversion(self.inversion_steps, self.inversion_learning_rate, weight_decay=1e-2, norm=None)
        invert = textual_inversion.inverter(search, tools.denoiser, text.encoder, tools.schedule)
        method = Method(self, tools.denoiser, trajectory, text.encoder, invert, row, len(concepts))
        anchors, erase = zip(*[(len(self.anchors(c)), c.strength * (self.scale + 1)) for c in concepts], strict=True)
        numbers = map(jnp.float32, (self.scale - 1, erase, self.sampling_guidance))
        gallery = self._gallery(tools, concepts)
        return method, Inputs(
            bank, jnp.int32(anchors), *numbers, text_encoder=own_params(tools), start=start, ids=ids, gallery=gallery
        )

    def anchors(self, concept: Concept) -> list[str]:
        """What a concept's target starts from."""
        return [*concept.replace_with, *(c.becomes(concept.anchor) for c in contexts.parse(self.contexts))] or [""]

    def _gallery(
        self, tools: Tools, concepts: Sequence[Concept]
    ) -> Float[Array, "rounds concepts images height width channel"]:
        """Latents of the concepts' images, of each round's part its own."""
        each = self.drawn_images // self.search_rounds
        shape = (self.search_rounds, len(concepts), each)
        number = np.arange(np.prod(shape)) % len(self.templates)
        names = [c.text for _ in range(self.search_rounds) for c in concepts for _ in range(each)]
        prompts = [self.templates[i].replace(NAME, text) for i, text in zip(number, names, strict=True)]
        latents = drawn(tools, prompts, self)[:, 0]
        return latents.reshape(*shape, *latents.shape[1:])


class Draws(NamedTuple):
    """Everything random in one step. `index` and `t` are shared by the batch, so that one loop serves all of it.

    text, anchor: 0 to 1, among the texts and the anchors of the second stage.
    """

    index: Int[Array, ""]
    t: Float[Array, ""]
    concept: Int[Array, " batch"]
    noise: Float[Array, "batch height width channel"]
    text: Float[Array, " batch"]
    anchor: Float[Array, " batch"]


class Recalled(NamedTuple):
    """texts: v_0 ... v_K of each example's concept, leaves [batch, K + 1, ...]. which: v. searching: stage one."""

    draws: Draws
    t: Float[Array, ""]
    texts: Conditioning
    which: Int[Array, " batch"]
    searching: Bool[Array, ""]


class Memory(NamedTuple):
    """What the rounds learned, encoded, leaves [batch, rounds, concepts, ...]; and how many were made."""

    texts: Conditioning
    rounds: Int[Array, "*batch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What may change from run to run without compiling again.

    anchors: how many each concept has. keep, erase: s - 1, and of each concept s + 1.
    text_encoder: its tensors. start: the embeddings that an inversion starts from.
    ids: of the new tokens alone, then of the templates. Of several text encoders, each of these is a tuple.
    gallery: the concepts' images, as latents.
    """

    bank: Bank
    anchors: Int[Array, " concepts"]
    keep: Float[Array, ""]
    erase: Float[Array, " concepts"]
    sampling_guidance: Float[Array, ""]
    text_encoder: Any
    start: PyTree[Float[Array, "new _"]]
    ids: PyTree[Int[Array, "prompts _"]]
    gallery: Float[Array, "rounds concepts images height width channel"]


@dataclass(frozen=True, eq=False)
class Method(base.Method):
    """STEREO over one denoiser. invert: `textual_inversion.inverter`'s. row: a prompt's shapes. count: of concepts."""

    settings: STEREO
    denoiser: Network
    trajectory: Trajectory
    text_encoder: Encoder
    invert: Callable[..., tuple[Any, Array]]
    row: Conditioning
    count: int

    def pace(self, step: Array) -> Array:
        return jnp.where(step < self.settings.discarded, self.settings.search_pace, 1.0)

    def memory(self, shape: tuple[int, ...]) -> Memory:
        each = self.settings.search_rounds, self.count
        return Memory(jax.tree.map(lambda s: shape_of((*each, *s.shape), s.dtype), self.row), shape_of((), jnp.int32))

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        """The random choices of a step: index and t from `key`, the rest of each example from its own key."""
        apart = lambda key: jax.random.uniform(jax.random.fold_in(key, CHOICE), (2,))  # noqa: E731
        text, anchor = jax.vmap(apart)(example_keys).T
        return Draws(*self.trajectory.draw_batch(key, example_keys, shape, self.count), text, anchor)

    def recall(
        self, models: Models, draws: Draws, memory: Memory, step: Array, inputs: Inputs
    ) -> tuple[Memory, Recalled]:
        """The texts of each example's concept, and which one is erased."""
        take = jax.vmap(lambda kept, concept: jax.tree.map(lambda a: a[:, concept], kept))
        name, learned = inputs.bank.take("concept", draws.concept), take(memory.texts, draws.concept)
        texts = jax.tree.map(lambda a, b: jnp.concatenate([a[:, None], b], axis=1), name, learned)
        count, number = 1 + self.settings.search_rounds, jnp.asarray(step) // self.settings.search_updates
        searching = number < self.settings.search_rounds
        any_of_them = jnp.minimum((draws.text * count).astype(jnp.int32), count - 1)
        return memory, Recalled(draws, draws.t, texts, jnp.where(searching, number, any_of_them), searching)

    def prepare(self, models: Models, recalled: Recalled, inputs: Inputs) -> Scored:
        """x_t, and the student's target. Nothing here carries a gradient."""
        draws, texts, bank = recalled.draws, recalled.texts, inputs.bank
        null = bank.take("null", draws.concept)
        text = jax.vmap(lambda rows, i: jax.tree.map(lambda a: a[i], rows))(texts, recalled.which)
        network, once = (partial(f, self.denoiser, models.student) for f in (denoise, project))
        guided = guidance.classifier_free(network, text, null, inputs.sampling_guidance, once)
        x = self.trajectory.run(guided, draws.noise, draws.index)

        def searched() -> Array:
            return denoise(self.denoiser, models.base, x, draws.t, null)

        def erased() -> Array:
            count = inputs.anchors[draws.concept]
            place = jnp.minimum((draws.anchor * count).astype(jnp.int32), count - 1)
            anchor = jax.tree.map(lambda a: a[bank.roles["anchor"][draws.concept, place]], bank.rows)
            negative = [jax.tree.map(lambda a, i=i: a[:, i], texts) for i in range(1 + self.settings.search_rounds)]
            e, at_anchor, *others = evaluate(self.denoiser, models.base, x, draws.t, [null, anchor, *negative])
            erase = inputs.erase[draws.concept][:, None, None, None]
            return e + inputs.keep * (at_anchor - e) - erase * (sum(others) / len(others) - e)

        target = jax.lax.cond(recalled.searching, searched, erased)
        return Scored(*jax.lax.stop_gradient((x, draws.t, text, target)))

    def loss(self, student: Params, batch: Scored) -> Float[Array, ""]:
        return squared_error(self.denoiser, student, batch)

    def between(self, session: base.Session, memory: Memory, inputs: Inputs) -> base.Interval | None:
        """A round's inversion, where it is time for one and it was not made yet."""
        number, rest = divmod(session.step, self.settings.search_updates)
        rounds = int(np.ravel(np.asarray(memory.rounds.addressable_data(0)))[0])  # each example has a copy
        if rest or not rounds < number <= self.settings.search_rounds:
            return None
        began, learned, losses = time.monotonic(), [], []
        student = bare(session.models().student)
        alone = jax.tree.map(lambda a: a[:1], inputs.ids)
        prompts = jax.tree.map(lambda a: a[1:], inputs.ids)
        count = len(self.settings.templates)
        for i, own in enumerate(inputs.gallery[number - 1]):
            key = session.place(jax.random.fold_in(jax.random.fold_in(session.key, SEARCH + session.step), i))
            images = jnp.repeat(own, count, axis=0)  # each with every prompt
            ids = jax.tree.map(lambda a: jnp.tile(a, (inputs.gallery.shape[2], 1)), prompts)
            new, values = self.invert(student, inputs.text_encoder, images, ids, inputs.start, key)
            learned.append(self._encode(inputs.text_encoder, alone, new))
            losses.append(float(np.asarray(values)[-(1 + len(values) // 10) :].mean()))
        record = {"round": number, "loss": float(np.mean(losses)), "seconds": round(time.monotonic() - began, 3)}
        texts = jax.tree.map(lambda *a: jnp.concatenate(a), *learned)
        last = number == self.settings.search_rounds
        memory = self._keep(memory, texts, jnp.int32(number - 1))
        return base.Interval(memory, record, False, restart="student" if last else "optimizer")

    @cached_property
    def _encode(self) -> Any:
        return jax.jit(partial(textual_inversion.encode, self.text_encoder))

    @cached_property
    def _keep(self) -> Any:
        """(memory, texts of all concepts, number of the round) -> the memory."""

        def keep(memory: Memory, texts: Conditioning, number: Array) -> Memory:
            put = lambda kept, new: kept.at[:, :, number].set(new.astype(kept.dtype))  # noqa: E731
            return Memory(jax.tree.map(put, memory.texts, texts), memory.rounds + 1)

        return jax.jit(keep)
