"""Ablating Concepts: *Ablating Concepts in Text-to-Image Diffusion Models* (Kumari et al., ICCV 2023).

    x_t = sqrt(alpha_bar) x + sqrt(1 - alpha_bar) n,    x an image of the anchor, t ~ U{0..999}
    L   = || e_theta(x_t, c*) - sg[ e_theta(x_t, c) ] ||^2    (model-based)
    L   = || e_theta(x_t, c*) - n ||^2                        (noise-based)
    L  += w || e_theta(x'_t', c') - n' ||^2                   (regularisation: the anchor is kept)

c is the anchor's caption of the image ("a cat on a chair") and c* the same with the concept ("a grumpy cat on a
chair"). No sampling happens in training: the anchor's images are drawn before it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real, UInt8

from esd_jax.diffusion import guidance, samplers
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing import method as base
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.images import in_batches, true_output
from esd_jax.erasing.method import Models, Tools, choose, denoise
from esd_jax.methods import anchors
from esd_jax.models.attention import Attention
from esd_jax.params import Conditioning, Network, Params

AT_ONCE = 64  # captions encoded


@dataclass(frozen=True)
class Ablating:
    """Settings; the defaults are the paper's for a style. A concept's anchor is its `replace_with`.

    Images that the user gives are the anchor's; they are taken as they are, without views. Else the base draws them.
    Their latents are the means of what the VAE's encoder says; the released code draws from it.

    kind: how the concept's captions follow from the anchor's (`anchors.captions`).
      "style": "{p}, in the style of {s}", "{s} inspired painting, {p}", "in {s}'s style, {p}"; {s} twice half the time.
      "object": the anchor's name is replaced by the concept's.
      "memorised": the concept is the caption of the memorised image.
      "nudity": "{s}, {p}", "in {s} style, {p}", "{p}, {s}"; the concept is the negative prompt of the anchor's images.
    objective: "model" (what the paper recommends) or "noise".
    target_from: "student" or "base": whose prediction is the target of "model". The paper's is the student's current
      one, which may drift.
    prior_weight: w. All errors are means over what the mask shows, channels too. The released codes divide by the
      mask's area alone, which makes them 4 times that: the first code in both terms, with w = 0.2, as here; their
      diffusers code in the first term only, with w = 1, which is 0.25 here.
    detach_bos: no gradient through the keys and values of the first token, which every prompt has.
    resize: views that show the image smaller or larger, and captions that say so; a mask keeps the loss inside.
    flip: half of the views are mirrored.
    views: of each drawn image. The released code makes a new one whenever it takes an image.
    anchor_prompts: of the images, separated by ";", or a .txt file with one on each line; by default the anchor alone.
      "{anchor}" in them is each concept's anchor. They are taken in turn, also for images that the user gives. An
      object takes only those that name its anchor.
    drawn_images: how many are drawn; several concepts with the same prompts share them.
    drawing_sampler, drawing_steps, drawing_guidance, drawing_seed: how they are drawn.
    """

    kind: str = "style"
    objective: str = "model"
    target_from: str = "student"
    prior_weight: float = 0.0
    detach_bos: bool = True
    resize: bool = False
    flip: bool = True
    views: int = 4
    anchor_prompts: str | None = None
    drawn_images: int = 200
    drawing_sampler: str = "dpmpp_2m"
    drawing_steps: int = 25
    drawing_guidance: float = 6.0
    drawing_seed: int = 0

    trained: ClassVar = True
    uses: ClassVar = frozenset({"replace_with"})
    ema: ClassVar = None
    CHOICES: ClassVar = {
        "kind": anchors.KINDS,
        "objective": ("model", "noise"),
        "target_from": ("student", "base"),
        "drawing_sampler": samplers.SAMPLERS,
    }
    # Learning rates are the effective ones: the released codes multiply theirs by the batch and by the GPUs (two), and
    # the diffusers code by two again where the anchor is kept. It also clips a loss of 4 times the mean at norm 1.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "style": {
            "subset": "kv", "optimizer": "adamw", "weight_decay": 1e-2,
            "learning_rate": 1.6e-5, "steps": 100, "batch_size": 8,
        },
        "object": {
            "kind": "object", "resize": True, "prior_weight": 0.2,
            "subset": "kv", "optimizer": "adamw", "weight_decay": 1e-2,
            "learning_rate": 1.6e-5, "steps": 100, "batch_size": 8,
        },
        "memorised": {
            "kind": "memorised", "resize": True, "prior_weight": 0.2,
            "subset": "full", "optimizer": "adamw", "weight_decay": 1e-2,
            "learning_rate": 2e-6, "steps": 400, "batch_size": 4,
        },
        "nudity": {
            "kind": "nudity", "prior_weight": 0.25,
            "subset": "attn", "optimizer": "adamw", "weight_decay": 1e-2, "max_grad_norm": 0.25,
            "learning_rate": 6.4e-5, "steps": 400, "batch_size": 8,
        },
        "flow": {
            "detach_bos": False, "drawing_sampler": "flow_euler", "drawing_steps": 28, "drawing_guidance": 3.5,
            "subset": "flow-kv-text", "rank": 16, "optimizer": "adamw", "weight_decay": 1e-2,
            "learning_rate": 1e-4, "steps": 100, "batch_size": 8,
        },
    }  # fmt: skip

    def __post_init__(self):
        choose(self, **self.CHOICES)
        for field, least in (("views", 1), ("drawn_images", 1), ("drawing_steps", 1), ("prior_weight", 0)):
            if (value := getattr(self, field)) < least:
                raise ValueError(f"{field}={value} must be at least {least}")

    @property
    def needs(self) -> frozenset[str]:
        nudity, detached = self.kind == "nudity", self.detach_bos
        return frozenset([*(["classifier_free"] if nudity else []), *(["cross_attention"] if detached else [])])

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple["Method", "Inputs"]:
        """The method, with the anchor's images sampled (unless the user has some) and every caption encoded.

        Raises ValueError for a concept without one anchor, and for prompts that do not fit it.
        """
        if not concepts:
            raise ValueError("no concept to erase")
        listed = anchors.read_prompts(self.anchor_prompts)
        chosen = [anchors.prompts_of(concept, self.kind, listed) for concept in concepts]
        if tools.images is not None and self.resize:
            raise ValueError("resize=True augments generated images, but images is set: set resize=False")
        if tools.images is not None and any(len(prompts) < len(listed) for prompts in chosen):
            raise ValueError(
                "images are given, which take the anchor_prompts in turn: each prompt must name the anchor"
            )
        tools.encode([concept.text for concept in concepts])  # refuses what is too long before images are drawn

        pool = anchors.Pool(tools, self.draw_anchors(tools), self.views, self.resize, self.flip, self.drawing_seed)
        texts: dict[str, int] = {}
        row = lambda text: texts.setdefault(text, len(texts))  # noqa: E731
        image, anchor, target = [], [], []
        for concept, prompts in zip(concepts, chosen, strict=True):
            views = pool.views(prompts, concept.text if self.kind == "nudity" else None)
            captions = [(prompts[view.image % len(prompts)], view.prefix) for _, view in views]
            image.append([index for index, _ in views])
            anchor.append([row(prefix + prompt) for prompt, prefix in captions])
            target.append([list(map(row, anchors.captions(concept, self.kind, *both))) for both in captions])
        index = lambda rows: jnp.asarray(rows, jnp.int32)  # noqa: E731
        rows = in_batches(tools.encode, list(texts), AT_ONCE)
        latents, masks = pool.arrays()
        indices = map(index, (anchor, target, image))
        inputs = Inputs(rows, *indices, latents=latents, masks=masks, prior_weight=jnp.float32(self.prior_weight))
        return Method(self, tools.denoiser, tools.schedule, tools.vectors), inputs

    def draw_anchors(self, tools: Tools) -> Callable[[list[str], str | None], UInt8[np.ndarray, "images h w 3"]]:
        """(prompts, negative prompt) -> `drawn_images` images of the base, the prompts in turn."""

        def draw(prompts: list[str], negative: str | None) -> UInt8[np.ndarray, "images h w 3"]:
            return tools.sample(
                [prompts[i % len(prompts)] for i in range(self.drawn_images)],
                seed=self.drawing_seed,
                steps=self.drawing_steps,
                guidance_scale=self.drawing_guidance,
                sampler=self.drawing_sampler,
                negative_prompt=negative,
            )

        return draw


class Draws(NamedTuple):
    """Everything random in one step. image: a place in the concept's list. caption: which of the concept's captions.

    prior: (image, t, noise) of the examples on which the anchor is kept.
    """

    t: Real[Array, " batch"]
    concept: Int[Array, " batch"]
    image: Int[Array, " batch"]
    caption: Int[Array, " batch"]
    noise: Float[Array, "batch height width channel"]
    prior: tuple[Int[Array, " batch"], Real[Array, " batch"], Float[Array, "batch height width channel"]] | None


class Scored(NamedTuple):
    """What the student is scored on, and where."""

    x: Float[Array, "batch height width channel"]
    t: Real[Array, " batch"]
    conditioning: Conditioning
    target: Float[Array, "batch height width channel"]
    mask: Float[Array, "batch height width 1"]


class Batch(NamedTuple):
    ablated: Scored
    prior: Scored | None
    prior_weight: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What may change from run to run without compiling again.

    rows: every caption, encoded. anchor, target: of each concept's views, the row of the anchor's caption, and the
      rows of the concept's captions, all equally likely.
    image: where the view lies in latents and masks.
    """

    rows: Conditioning
    anchor: Int[Array, "concepts views"]
    target: Int[Array, "concepts views captions"]
    image: Int[Array, "concepts views"]
    latents: Float[Array, "images height width channel"]
    masks: Float[Array, "images height width 1"]
    prior_weight: Float[Array, ""]

    def caption(self, row: Int[Array, " batch"]) -> Conditioning:
        return jax.tree.map(lambda a: a[row], self.rows)


@dataclass(frozen=True, eq=False)
class Method(base.Method):
    """Ablating Concepts over one denoiser and schedule."""

    settings: Ablating
    denoiser: Network
    schedule: Schedule
    vectors: Callable[[Conditioning], Array]

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        """The random choices of a step, each example's from its own key."""
        concepts, views, captions = inputs.target.shape

        def noised(key: Array) -> tuple[Array, Array, Array]:
            image, t, noise = jax.random.split(key, 3)
            return (
                jax.random.randint(image, (), 0, views),
                self.schedule.timestep(jax.random.randint(t, (), 0, self.schedule.num_train_timesteps)),
                jax.random.normal(noise, shape),
            )

        def example(key: Array) -> Draws:
            concept, caption, ablated, prior = jax.random.split(key, 4)
            image, t, noise = noised(ablated)
            concept = jax.random.randint(concept, (), 0, concepts)
            caption = jax.random.randint(caption, (), 0, captions)
            return Draws(t, concept, image, caption, noise, noised(prior) if self.settings.prior_weight else None)

        return jax.vmap(example)(example_keys)

    def prepare(self, models: Models, draws: Draws, inputs: Inputs) -> Batch:
        """x_t, and the student's target. Nothing here carries a gradient."""
        concept, image = draws.concept, draws.image
        where = inputs.image[concept, image]
        latents = inputs.latents[where]
        x = add_noise(self.schedule, latents, draws.noise, draws.t)
        if self.settings.objective == "model":
            params = models.student if self.settings.target_from == "student" else models.base
            anchor = inputs.caption(inputs.anchor[concept, image])
            target = denoise(self.denoiser, params, x, draws.t, anchor)
        else:
            target = true_output(self.schedule, latents, draws.noise, draws.t)
        caption = inputs.caption(inputs.target[concept, image, draws.caption])
        ablated = Scored(x, draws.t, caption, target, inputs.masks[where])
        prior = None if draws.prior is None else self._prior(concept, *draws.prior, inputs)
        return jax.lax.stop_gradient(Batch(ablated, prior, inputs.prior_weight))

    def _prior(self, concept: Array, image: Array, t: Array, noise: Array, inputs: Inputs) -> Scored:
        where = inputs.image[concept, image]
        latents = inputs.latents[where]
        x = add_noise(self.schedule, latents, noise, t)
        target = true_output(self.schedule, latents, noise, t)
        return Scored(x, t, inputs.caption(inputs.anchor[concept, image]), target, inputs.masks[where])

    def points(self, batch: Batch) -> tuple[Array, Array]:
        return batch.ablated.x, batch.ablated.t

    def loss(self, student: Params, batch: Batch) -> Float[Array, ""]:
        """Mean squared error over what the masks show, each example alike; in float32 at least."""
        if batch.prior is None:
            return jnp.mean(self._errors(student, batch.ablated))
        both = self._errors(student, jax.tree.map(guidance.interleave, batch.ablated, batch.prior))
        ablated, prior = guidance.split_pair(both)
        return jnp.mean(ablated) + batch.prior_weight * jnp.mean(prior)

    def _errors(self, student: Params, s: Scored) -> Float[Array, " batch"]:
        attention = None
        if self.settings.detach_bos:
            shape = self.vectors(s.conditioning).shape[:2]
            attention = Attention(detach=jnp.broadcast_to(jnp.arange(shape[1]) == 0, shape))
        e = denoise(self.denoiser, student, s.x, s.t, s.conditioning, attention)
        squares = jnp.sum(s.mask * (e - s.target) ** 2, axis=(1, 2, 3))
        return squares / (e.shape[-1] * jnp.sum(s.mask, axis=(1, 2, 3)))
