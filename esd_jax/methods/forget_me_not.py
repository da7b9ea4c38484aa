"""Forget-Me-Not: *Learning to Forget in Text-to-Image Diffusion Models* (Zhang et al., 2023, arXiv 2303.17591).

    L = || concat_l A_l[:, :, M] ||_F = sqrt( sum over layers, heads, pixels and j in M of A_l^2 )

A_l are the softmaxed maps of the l-th cross-attention at x_t, a noised image of the concept under a prompt that names
it, t ~ U{0..999}; M are the positions of the concept's tokens. The network's prediction is not used, so whatever
comes after the last map gets no gradient. Before this stage the paper learns tokens that fit the images better than
the concept's name (`textual_inversion`); they then take the name's place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from esd_jax.diffusion import samplers
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing import method as base
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.concepts import Bank, Concept, make_bank
from esd_jax.erasing.images import drawn
from esd_jax.erasing.method import Models, Tools, choose
from esd_jax.erasing.textual_inversion import NAME, Encoder, TextualInversion, Tokens, place, words
from esd_jax.models.attention import Attention
from esd_jax.params import Conditioning, Network, Params, bare

QUERY = ".attn2.to_q.weight"  # what every cross-attention has


@dataclass(frozen=True)
class ForgetMeNot:
    """Settings; the defaults are the paper's for an object.

    Images that the user gives show the concept (each of them, if there are several); else the base draws them. Their
    latents are the means of what the VAE's encoder says; the released code draws from it.

    template: the prompt; "{concept}" is where the concept stands. Several are separated by ";" and taken in turn for
      the concept's images; the paper has one.
    eos_positions: "first", "all" or "none" of the prompt's end tokens belong to M. The released code takes all; SD 2
      has one, but SD 1 pads with end tokens, and then nearly all of M would be padding.
    no_images: learn from noise alone: x_t = sqrt(1 - alpha_bar) n.
    drawn_images: of each concept, with its prompts; at least one with each.
    drawing_sampler, drawing_steps, drawing_guidance, drawing_seed: how they are drawn; without a sampler, by the
      checkpoint's own.
    inversion_steps: of the first stage, which learns new tokens from each concept's images; they stand in its place in
      the second. 0 keeps its name; the paper has 500. For checkpoints with one text encoder.
    inversion_tokens: what the new tokens start from, separated by "|": a word that is one token, or "<rand-S>", which
      is S times Gaussian noise ("elon|musk|<rand-1>|<rand-1>"). Once for all concepts, or for each, separated by ";".
    inversion_learning_rate: of the first stage. Its draws, too, are those of drawing_seed.

    AdamW's decay also moves the tensors without gradient, by learning rate times weight decay (2e-8) of their value a
    step; the released code leaves them alone.
    """

    template: str = "a photo of {concept}"
    eos_positions: str = "first"
    no_images: bool = False
    drawn_images: int = 10
    drawing_sampler: str | None = None
    drawing_steps: int = 50
    drawing_guidance: float = 7.5
    drawing_seed: int = 0
    inversion_steps: int = 0
    inversion_tokens: str = "<rand-1>|<rand-1>|<rand-1>|<rand-1>"
    inversion_learning_rate: float = 1e-3

    trained: ClassVar = True
    uses: ClassVar = frozenset()
    ema: ClassVar = None
    CHOICES: ClassVar = {"eos_positions": ("first", "all", "none")}
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "object": {
            "subset": "full", "optimizer": "adamw", "weight_decay": 0.01, "max_grad_norm": 1.0,
            "learning_rate": 2e-6, "steps": 35,
        },
        "style": {
            "template": "a photo in the style of {concept}",
            "subset": "full", "optimizer": "adamw", "weight_decay": 0.01, "max_grad_norm": 1.0,
            "learning_rate": 2e-6, "steps": 35,
        },
    }  # fmt: skip

    def __post_init__(self):
        choose(self, **self.CHOICES)
        if self.drawing_sampler is not None:
            choose(self, drawing_sampler=samplers.SAMPLERS)
        if not all(NAME in template for template in self.template.split(";")):
            raise ValueError(f"template={self.template!r} must say where the concept stands: {NAME}")
        for field, least in (("drawn_images", 1), ("drawing_steps", 1), ("inversion_steps", 0)):
            if (value := getattr(self, field)) < least:
                raise ValueError(f"{field}={value} must be at least {least}")
        if self.inversion_learning_rate <= 0:
            raise ValueError(f"inversion_learning_rate={self.inversion_learning_rate} must be positive")
        if self.inversion_steps and self.no_images:
            raise ValueError(f"inversion_steps={self.inversion_steps} learns from images, but no_images=True has none")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention_names", "cross_attention"})  # and one text encoder, where new tokens are learned

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple["Method", "Inputs"]:
        """The method, with the concepts' images sampled, if the user has none but wants some, and new tokens learned.

        Raises ValueError where a prompt does not contain its concept's tokens, and for what cannot be inverted.
        """
        if self.no_images and tools.images is not None:
            raise ValueError("no_images=True learns from noise alone, but images are given: give up one of them")
        layers = tuple(name.removesuffix(".to_q.weight") for name in tools.denoiser.layouts if name.endswith(QUERY))
        if not layers:
            raise ValueError("this denoiser has no cross-attention, so it has no maps to resteer")
        bank = make_bank(tools.encode, concepts, {"concept": self.prompts})
        if self.inversion_steps:
            starts, ids, columns = self.new_tokens(tools, concepts)
        else:
            columns = np.stack(
                [[resteered(tools.tokens, p, c.text, self.eos_positions) for p in self.prompts(c)] for c in concepts]
            )
        images = self._images(tools, concepts)  # after all that may be refused
        if self.inversion_steps:
            bank = self._learned(tools, starts, ids, images)
        return Method(tools.denoiser, tools.schedule, layers), Inputs(bank, jnp.asarray(columns), images)

    def prompts(self, concept: Concept) -> list[str]:
        """The prompts that name a concept."""
        return [template.strip().replace(NAME, concept.text) for template in self.template.split(";")]

    def new_tokens(
        self, tools: Tools, concepts: Sequence[Concept]
    ) -> tuple[list[Float[Array, "new width"]], Int[np.ndarray, "concepts prompts tokens"], Bool[np.ndarray, "..."]]:
        """The embeddings with which each concept's new tokens start, the ids of the prompts in which they stand, and M.

        Raises ValueError for a checkpoint with several text encoders, and for `inversion_tokens` that do not fit.
        """
        if (number := len(tools.text_encoders)) != 1:
            raise ValueError(
                f"inversion_steps={self.inversion_steps}: textual inversion is for checkpoints with one text encoder, "
                f"but this one has {number} (as SDXL has): set inversion_steps=0"
            )
        groups = [part.strip() for part in self.inversion_tokens.split(";")]
        if len(groups) not in (1, len(concepts)):
            raise ValueError(
                f"inversion_tokens={self.inversion_tokens!r} has {len(groups)} parts for {len(concepts)} concepts: "
                "give one, or one for each"
            )
        (name,), starts, ids = tools.text_encoders, [], []
        params = tools.params[name]
        known = textual_inversion.vocabulary(params)
        for i, start in enumerate(groups * (len(concepts) // len(groups))):
            starts.append(textual_inversion.initial(tools.tokens, params, start, self._key(i, 0)))
            new = range(known, known + len(starts[i]))
            ids.append([place(tools.tokens, template.strip(), new) for template in self.template.split(";")])
        ids = np.asarray(ids)
        return starts, ids, (ids >= known) | [[ends(tools.tokens, i, self.eos_positions) for i in rows] for rows in ids]

    def _images(
        self, tools: Tools, concepts: Sequence[Concept]
    ) -> Float[Array, "concepts images height width channel"]:
        """Latents, at least as many of each concept as it has prompts."""
        prompts, least = [self.prompts(concept) for concept in concepts], self.template.count(";") + 1
        if self.no_images or tools.images is not None:
            selected = jnp.zeros((1, *tools.shape)) if tools.images is None or self.no_images else tools.images
            selected = selected[jnp.arange(max(least, len(selected))) % len(selected)]
            return jnp.broadcast_to(selected, (len(concepts), *selected.shape))
        number = max(least, self.drawn_images)
        latents = drawn(tools, [own[i % least] for own in prompts for i in range(number)], self)[:, 0]
        return latents.reshape(len(concepts), number, *latents.shape[1:])

    def _learned(self, tools: Tools, starts: list[Array], ids: np.ndarray, images: Array) -> Bank:
        """The prompts with the new tokens, learned from each concept's images. Each image goes with its own prompt."""
        settings = TextualInversion(self.inversion_steps, self.inversion_learning_rate)
        ((name, network),) = tools.text_encoders.items()
        params, weights = tools.params[name], tools.params[tools.component]
        encoder = Encoder(network, tools.condition)
        run = textual_inversion.inverter(settings, tools.denoiser, encoder, tools.schedule)
        encode = jax.jit(partial(textual_inversion.encode, encoder))
        concepts, prompts = ids.shape[:2]
        rows = [tools.encode([""])]
        for i in range(concepts):
            own = ids[i][np.arange(images.shape[1]) % prompts]
            new, _ = run(weights, params, images[i], own, starts[i], self._key(i, 1))
            rows.append(encode(params, ids[i], new))
        roles = {"concept": 1 + jnp.arange(concepts * prompts).reshape(concepts, prompts)}
        return Bank(jax.tree.map(lambda *a: jnp.concatenate(a), *rows), roles)

    def _key(self, concept: int, use: int) -> Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(self.drawing_seed), concept))[use]


def resteered(tokens: Tokens, prompt: str, concept: str, eos_positions: str) -> Bool[np.ndarray, " tokens"]:
    """M: wherever the concept's tokens stand in the prompt, one after another, and the end tokens that are asked for.

    tokens: prompts -> ids, padded.

    Raises ValueError if the prompt does not contain the concept.
    """
    (ids,), name = np.asarray(tokens([prompt])), np.asarray(words(tokens, concept))
    chosen = ends(tokens, ids, eos_positions)
    starts = [i for i in range(len(ids) - len(name) + 1) if np.array_equal(ids[i : i + len(name)], name)]
    if not starts:
        raise ValueError(
            f"the tokens of {concept!r} are not found in {prompt!r}: give a template where the concept stands as a word"
        )
    for start in starts:
        chosen[start : start + len(name)] = True
    return chosen


def ends(tokens: Tokens, ids: Int[np.ndarray, " tokens"], eos_positions: str) -> Bool[np.ndarray, " tokens"]:
    """The end tokens, of a prompt's ids, that belong to M."""
    (empty,) = np.asarray(tokens([""]))
    where = np.flatnonzero(ids == empty[1])
    chosen = np.zeros(len(ids), bool)
    chosen[{"first": where[:1], "all": where, "none": []}[eos_positions]] = True
    return chosen


class Draws(NamedTuple):
    """Everything random in one step. image: one of the concept's; its prompt goes with it."""

    t: Int[Array, " batch"]
    concept: Int[Array, " batch"]
    image: Int[Array, " batch"]
    noise: Float[Array, "batch height width channel"]


class Batch(NamedTuple):
    """The student's inputs, and the columns of its maps that should vanish."""

    x: Float[Array, "batch height width channel"]
    t: Int[Array, " batch"]
    conditioning: Conditioning
    columns: Bool[Array, "batch tokens"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What may change from run to run without compiling again.

    columns: M of each prompt of the concepts. images: the i-th was drawn, or goes, with prompt i modulo their number.
    """

    bank: Bank
    columns: Bool[Array, "concepts prompts tokens"]
    images: Float[Array, "concepts images height width channel"]


@dataclass(frozen=True, eq=False)
class Method(base.Method):
    """Forget-Me-Not's second stage over one denoiser and schedule. layers: its cross-attentions."""

    denoiser: Network
    schedule: Schedule
    layers: tuple[str, ...]

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        """The random choices of a step, each example's from its own key."""
        concepts, images = inputs.images.shape[:2]

        def example(key: Array) -> Draws:
            t, concept, image, noise = jax.random.split(key, 4)
            return Draws(
                jax.random.randint(t, (), 0, self.schedule.num_train_timesteps),
                jax.random.randint(concept, (), 0, concepts),
                jax.random.randint(image, (), 0, images),
                jax.random.normal(noise, shape),
            )

        return jax.vmap(example)(example_keys)

    def prepare(self, models: Models, draws: Draws, inputs: Inputs) -> Batch:
        """x_t and its prompt. Nothing here carries a gradient, or asks a network."""
        x = add_noise(self.schedule, inputs.images[draws.concept, draws.image], draws.noise, draws.t)
        which = draws.concept, draws.image % inputs.columns.shape[1]
        row = inputs.bank.roles["concept"][which]
        conditioning = jax.tree.map(lambda a: a[row], inputs.bank.rows)
        return jax.lax.stop_gradient(Batch(x, draws.t, conditioning, inputs.columns[which]))

    def loss(self, student: Params, batch: Batch) -> Float[Array, ""]:
        """The norm of each example's columns over all layers at once; its mean over the batch.

        Of one example it is the paper's. The norm over a whole batch would grow with its root, and each example's
        gradient would depend on the others.
        """
        attention = Attention(capture=self.layers)
        _, maps = self.denoiser.apply(bare(student), batch.x, batch.t, batch.conditioning, attention)
        columns = batch.columns[:, None, None, :]
        squares = sum(jnp.sum(jnp.where(columns, maps[layer], 0) ** 2, axis=(1, 2, 3)) for layer in self.layers)
        return jnp.mean(jnp.sqrt(squares))
