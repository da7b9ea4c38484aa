"""Redirection: images of a concept are denoised into images of its anchor, whatever the prompt says; no paper's.

    x_t  = alpha_t z + sigma_t eps,    x'_t = alpha_t z' + sigma_t eps,    t in [from T, T)
    L    = mean (e_theta(x_t, v) - (x_t - alpha_t x0*(x'_t, n)) / sigma_t)^2

z is an image that the base drew of a prompt p with the concept, z' the one that it drew of the same prompt without it,
n, from the same noise; x0* is the clean image that the base predicts. The target is what the network outputs at x_t if
that image is in it, here for a network that predicts eps. v is drawn anew for each example: c(p), c(n), or

    v = a c(p) + (1 - a) c(r) + s std(c) xi,    a ~ U(-.5, 1.5), s ~ U(0, redirect_spread), xi ~ N(0, 1)

of another prompt r; std is over all other prompts. So the network leaves the concept by what it sees, where other
methods teach what to answer to a name. Some examples are asked c(r), and their target is what the base says of r at
x_t: other prompts keep their meaning also where an image resembles the concept. Some are asked c(p) or c(n) at x'_t, t
in [0, T), where a prompt with the concept leads once it is erased; their target is what the base says there of n.

Sampling also passes between z and z'. A concept that hardly differs from its anchor (a style on a plain ground) returns
from there. With `redirect_between`, the examples of c(p) at x'_t are asked at the noised l z + (1 - l) z' instead,

    l      ~ U(0, redirect_between min(1, t / (redirect_from T)))
    target = e_theta(x_t, null) + (G - e_theta(x_t, null)) / g

where G is the output at x_t that means the clean image of the base's guided output at x'_t, of n against the empty
prompt at scale g. So with guidance g the student's output there is G.

At early timesteps an image shows too little to be left, and a search over prompts still finds the concept there. So
adversaries of inversion rounds (`rounds_every`; `erasing.rounds`) may take the place of v in a loss of their own, which
has the same x_t and target.

Since all that is trained depends on the image, most of the network should be trained (`subset`), and other prompts,
above all similar ones, be preserved on images of their own (`preserve_images`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from esd_jax import wording
from esd_jax.diffusion import samplers
from esd_jax.diffusion.guidance import cfg
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing import contexts, corpora, rounds
from esd_jax.erasing import method as base
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.galleries import Prompts
from esd_jax.erasing.images import carried, drawn, in_batches
from esd_jax.erasing.method import Models, Scored, Tools, choose, denoise, squared_error
from esd_jax.erasing.retention import mostly_early
from esd_jax.erasing.round_settings import DEFAULTS, RoundsSettings
from esd_jax.erasing.textual_inversion import NAME
from esd_jax.params import Conditioning, Network, Params

AT_ONCE = 8  # prompts encoded
OTHERS = 512  # prompts of a corpus
# What an example's v is. FOLLOWED, LEFT: c(p) and c(n), at x'_t.
OTHER, NAMED, ANCHOR, MIXED, FOLLOWED, LEFT = range(6)
SHARES = (0.15, 0.25, 0.05, 0.25, 0.2, 0.1)  # of the examples
MIX = (-0.5, 1.5)  # the range of a


@dataclass(frozen=True)
class Redirect(RoundsSettings):
    """Settings. A concept's anchor is its `replace_with`, else the empty prompt; in a context, the prompt without it.

    An anchor that does not name the replacement may show the concept ("a dog" has no style of its own), so its images
    are drawn with all concepts that have such an anchor as negative prompt.

    The other prompts are those of `retain` and those that are preserved; without any, the anchors. Inversion rounds
    take the same images, so `rounds_images` is refused.

    contexts: "a dog in {}: a dog | a car in {}: a car": prompts with {} for the concept, from which it is erased too,
      and the same without it, where {} stands for the anchor ("{} in ink style: {} in ink style").
    retain: "emoji" or "general", a corpus of the package, or a .txt or .csv file of prompts: `OTHERS` of those that do
      not name the concept are other prompts, drawn by their weights. The more they differ, the more of what a search
      may find is trained on.
    redirect_from: the part of the schedule from which timesteps are drawn; half of them are at .85 and more. Below it,
      an image shows so much that leaving the concept means another image.
    redirect_spread: the largest s.
    redirect_between: the largest part of the concept's image in the images at which prompts with the concept follow the
      anchor, 0 (none) to 1. Above 0, an update takes two more evaluations, and is for images that are sampled with a
      guidance of `drawing_guidance`.
    drawn_images: of each prompt with and without the concept.
    drawing_sampler, drawing_steps, drawing_guidance, drawing_seed: how they are drawn; without a sampler, by the
      checkpoint's own.
    rounds_skip: an adversary whose gauge in the base is above this is not added. By default none is left out: it counts
      what the student makes of it, whatever it means to the base.
    """

    contexts: str | None = None
    retain: str | None = None
    redirect_from: float = 0.6
    redirect_spread: float = 2.0
    redirect_between: float = 0.0
    drawn_images: int = 4
    drawing_sampler: str | None = None
    drawing_steps: int = 50
    drawing_guidance: float = 7.5
    drawing_seed: int = 0
    rounds_skip: float = 100.0

    has_anchors: ClassVar = True
    trained: ClassVar = True
    uses: ClassVar = frozenset({"replace_with"})
    needs: ClassVar = frozenset({"classifier_free"})
    ema: ClassVar = None
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "full": {
            "subset": "full", "optimizer": "adam", "learning_rate": 1e-5, "steps": 1000, "batch_size": 4,
            "max_grad_norm": 1.0,
        },
    }  # fmt: skip

    def __post_init__(self):
        self.check_rounds()
        if self.rounds_images != DEFAULTS["rounds_images"]:
            raise ValueError(f"rounds_images={self.rounds_images}: rounds take redirection's own, see drawn_images")
        if self.drawing_sampler is not None:
            choose(self, drawing_sampler=samplers.SAMPLERS)
        if not 0 <= self.redirect_from < 1:
            raise ValueError(f"redirect_from={self.redirect_from} must be at least 0 and below 1")
        if not 0 <= self.redirect_between <= 1:
            raise ValueError(f"redirect_between={self.redirect_between} must be from 0 to 1")
        if self.redirect_between and self.drawing_guidance < 1:
            what = f"drawing_guidance={self.drawing_guidance}"
            raise ValueError(f"{what}: redirect_between={self.redirect_between} takes 1 or more")
        for field, least in (("drawn_images", 1), ("drawing_steps", 1), ("redirect_spread", 0)):
            if (value := getattr(self, field)) < least:
                raise ValueError(f"{field}={value} must be at least {least}")
        contexts.parse(self.contexts)

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple[base.Method, Any]:
        """Redirection of the concepts.

        Raises ValueError for images of the user's, several replacements of a concept, unguided images of an anchor
        that does not name one, and as `rounds.check` does.
        """
        if tools.images is not None:
            raise ValueError("method 'redirect' takes no images: it generates its own")
        for concept in concepts:
            if len(concept.replace_with) > 1:
                raise ValueError(f"method 'redirect' takes one replacement of {concept.text!r}, not several")
        away = ", ".join(concept.text for concept in concepts if any(self.may_show(concept)))
        if away and self.drawing_guidance <= 1:
            what = f"drawing_guidance={self.drawing_guidance}"
            raise ValueError(
                f"{what}: anchors that do not name a replace_with are drawn away from {away!r}, which takes more than 1"
            )
        searched = [self.searched(concept) for concept in concepts]
        rounds.check(self, tools, searched)
        pairs = [pair for concept in concepts for pair in self.prompts(concept)]
        named, anchors = zip(*pairs, strict=True)
        kept = self.others(concepts, tools) or list(anchors)
        encoded, replaced, others = (stacked(tools, prompts) for prompts in (named, anchors, kept))
        spread = jax.tree.map(lambda a: self.redirect_spread * jnp.std(a.astype(jnp.float32), axis=0), others)
        each = [self._drawn(tools, concept, away) for concept in concepts]
        images, without = map(jnp.concatenate, zip(*each, strict=True))
        empty = stacked(tools, [""]) if self.redirect_between else None
        inputs = Inputs(encoded, replaced, others, spread, empty, images, without)
        method = Method(self, tools.denoiser, tools.schedule)
        shown, anchored = (a.reshape(len(concepts), -1, *a.shape[1:]) for a in (images, without))
        low = self.redirect_from
        return rounds.adding(self, method, inputs, tools, searched, images=shown, anchors=anchored, low=low)

    def prompts(self, concept: Concept) -> list[tuple[str, str]]:
        """What is erased of a concept, and what each becomes."""
        sentences = contexts.parse(self.contexts)
        return [(concept.text, concept.anchor), *contexts.pairs(sentences, concept.text, concept.anchor)]

    def may_show(self, concept: Concept) -> list[bool]:
        """Whether each anchor of `prompts` may show the concept: it does not name what replaces it."""
        anchors = [anchor for _, anchor in self.prompts(concept)]
        return [not any(wording.names(guide, anchor) for guide in concept.replace_with) for anchor in anchors]

    def searched(self, concept: Concept) -> Prompts:
        """`prompts` for inversion rounds."""
        named, anchors = zip(*self.prompts(concept), strict=True)
        return Prompts([template for template, _ in self.prompts(replace(concept, text=NAME))], named, anchors)

    def others(self, concepts: Sequence[Concept], tools: Tools) -> list[str]:
        """The other prompts. Raises ValueError, or OSError, as `corpora.prompts` does."""
        kept = list(dict.fromkeys(text for concept in concepts for text in concept.preserve))
        if self.retain is None:
            return kept
        rng = np.random.default_rng(self.drawing_seed)
        return [*kept, *corpora.drawn(corpora.retained(self.retain, concepts, tokens=tools.tokens), OTHERS, rng)]

    def _drawn(
        self, tools: Tools, concept: Concept, away: str
    ) -> list[Float[Array, "prompts images height width channel"]]:
        """Latents of a concept's images, and of its anchors', from the same noise.

        away: the negative prompt of anchors that may show a concept.
        """
        named, anchors = zip(*self.prompts(concept), strict=True)
        shown = self.may_show(concept)
        some = [away if may else None for may in shown] if any(shown) else None
        negative = away if all(shown) else some
        return [
            drawn(tools, named, self, self.drawn_images),
            drawn(tools, anchors, self, self.drawn_images, negative),
        ]


class Draws(NamedTuple):
    """Everything random in one step. row: the prompt with the concept. other: r. kind: what v is. mix, scale: a, s.

    between: l as a part of its largest. key: of xi.
    """

    t: Real[Array, " batch"]
    row: Int[Array, " batch"]
    image: Int[Array, " batch"]
    noise: Float[Array, "batch height width channel"]
    other: Int[Array, " batch"]
    kind: Int[Array, " batch"]
    mix: Float[Array, " batch"]
    scale: Float[Array, " batch"]
    between: Float[Array, " batch"]
    key: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What may change from run to run without compiling again.

    named, anchor: prompts with the concept, and what each becomes, leaves [rows, ...]. others: the other prompts.
    spread: the largest s times their standard deviation. empty: no prompt, leaves [1, ...], where it is needed. images,
    anchors: latents of what the base drew of the rows.
    """

    named: Conditioning
    anchor: Conditioning
    others: Conditioning
    spread: Conditioning
    empty: Conditioning | None
    images: Float[Array, "rows images height width channel"]
    anchors: Float[Array, "rows images height width channel"]


@dataclass(frozen=True, eq=False)
class Method(base.Method):
    """Redirection over one denoiser and schedule."""

    settings: Redirect
    denoiser: Network
    schedule: Schedule

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        """The random choices of a step, each example's from its own key."""
        rows, images = inputs.images.shape[:2]

        def example(key: Array) -> Draws:
            t, high, row, image, noise, other, kind, mix, scale, own, between = jax.random.split(key, 11)
            kind = jax.random.choice(kind, len(SHARES), p=jnp.asarray(SHARES))
            early, any_t = (mostly_early(self.schedule, t, high, low) for low in (self.settings.redirect_from, 0.0))
            return Draws(
                jnp.where(kind >= FOLLOWED, any_t, early),
                jax.random.randint(row, (), 0, rows),
                jax.random.randint(image, (), 0, images),
                jax.random.normal(noise, shape),
                jax.random.randint(other, (), 0, len(jax.tree.leaves(inputs.others)[0])),
                kind,
                jax.random.uniform(mix, minval=MIX[0], maxval=MIX[1]),
                jax.random.uniform(scale),
                jax.random.uniform(between),
                own,
            )

        return jax.vmap(example)(example_keys)

    def prepare(self, models: Models, draws: Draws, inputs: Inputs) -> Scored:
        """x_t, v, and the student's target. Nothing here carries a gradient."""
        named, anchor, other = (
            jax.tree.map(lambda a, where=where: a[where], rows)
            for rows, where in ((inputs.named, draws.row), (inputs.anchor, draws.row), (inputs.others, draws.other))
        )
        mixed = jax.vmap(mixture, (0, 0, 0, 0, 0, None))(draws.key, draws.mix, draws.scale, named, other, inputs.spread)
        asked = chosen(draws.kind, other, named, anchor, mixed, named, anchor)
        shown, anchors = (images[draws.row, draws.image] for images in (inputs.images, inputs.anchors))
        as_base, follows = (draws.kind == kind for kind in (OTHER, FOLLOWED))
        part = jnp.where(draws.kind == LEFT, 0.0, jnp.where(follows, self.part(draws), 1.0))[:, None, None, None]
        image = part * shown + (1 - part) * anchors
        x, anchored = (add_noise(self.schedule, images, draws.noise, draws.t) for images in (image, anchors))
        anchored = jnp.where(as_base[:, None, None, None], x, anchored)
        prompt = chosen(as_base.astype(jnp.int32), anchor, other)
        output = denoise(self.denoiser, models.base, anchored, draws.t, prompt)
        redirected = carried(self.schedule, output, anchored, x, draws.t)
        target = jnp.where(as_base[:, None, None, None], output, redirected)
        if self.settings.redirect_between:
            scale = self.settings.drawing_guidance
            empty = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(x), *a.shape[1:])), inputs.empty)
            unguided = denoise(self.denoiser, models.base, anchored, draws.t, empty)
            guided = carried(self.schedule, cfg(unguided, output, scale), anchored, x, draws.t)
            own = denoise(self.denoiser, models.student, x, draws.t, empty)
            target = jnp.where(follows[:, None, None, None], own + (guided - own) / scale, target)
        return Scored(*jax.lax.stop_gradient((x, draws.t, asked, target)))

    def part(self, draws: Draws) -> Float[Array, " batch"]:
        """l, of z in the image between."""
        start = max(1, self.settings.redirect_from * self.schedule.num_train_timesteps)
        return self.settings.redirect_between * jnp.minimum(1, draws.t / start) * draws.between

    def loss(self, student: Params, batch: Scored) -> Float[Array, ""]:
        return squared_error(self.denoiser, student, batch)


def stacked(tools: Tools, prompts: Sequence[str]) -> Conditioning:
    """Prompts, encoded; refused before images are drawn if they are too long."""
    return in_batches(tools.encode, list(prompts), AT_ONCE)


def mixture(
    key: Array, mix: Array, scale: Array, named: Conditioning, other: Conditioning, spread: Conditioning
) -> Conditioning:
    """v = a c(p) + (1 - a) c(r) + s std(c) xi of one example, from a and s as a part of the largest."""
    leaves, tree = jax.tree.flatten(named)
    keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))

    def mixed(key: Array, named: Array, other: Array, spread: Array) -> Array:
        noise = scale * spread * jax.random.normal(key, named.shape)
        return (mix * named + (1 - mix) * other + noise).astype(named.dtype)

    return jax.tree.map(mixed, keys, named, other, spread)


def chosen(kind: Int[Array, " batch"], *choices: Conditioning) -> Conditioning:
    """Each example's of several conditionings."""
    return jax.tree.map(lambda *a: jnp.stack(a)[kind, jnp.arange(len(kind))], *choices)
