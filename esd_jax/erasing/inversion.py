"""The search of what still reaches an erased concept: soft tokens, or vectors beside the text encoder's output.

    V = argmin over V of E || e_theta(x_t, c(p; V)) - e*(x_t, c(p)) ||^2,    t in [from_t, T)

p is a prompt that names the concept, in c(p; V) new tokens V stand in its place, and x_t is a noised image that the
base drew of p. This is Concept Inversion (Pham et al. 2024, arXiv 2308.01508; see `evaluation.attacks`) with
the base's prediction as target in place of the noise: the optimum is the same, the variance far smaller. Vectors delta
take

    c(n) + delta,    |delta| <= radius E |c(p) - c(n)|

of what the prompt decides in c (of SDXL, not the image's size); n is the prompt without the concept. This needs no
gradient of the text encoder (after RACE, Kim et al. 2024, arXiv 2405.16341, whose ball has another norm and centre).
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, Real

from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.embedding_search import Search, State
from esd_jax.erasing.gauge import error, relative
from esd_jax.erasing.method import Models, denoise
from esd_jax.erasing.textual_inversion import Encoder, encode
from esd_jax.params import Conditioning, Network, Params

AT_ONCE = 8  # examples of a gauge in one call


class Member(NamedTuple):
    """An adversary, of which one part is used and the other stays zero.

    tokens: of several text encoders, a tuple. offset: () where no adversary uses it.
    """

    tokens: PyTree[Float[Array, "*batch new _"]]
    offset: Conditioning


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gallery:
    """What is known of the concepts, each with as many rows: prompts that name it, and the same without it.

    images: latents that the base drew of each prompt. ids: of the prompts with so many new tokens in the concept's
      place as each kind of adversary has; of the last kind, vectors, without meaning.
    named, neutral: c(p) and c(n), leaves [concepts, rows, ...]. text_encoder: its tensors. Of several text encoders,
      ids and tensors are tuples (`textual_inversion.each`).
    radius: of the vectors, [concepts].
    """

    images: Float[Array, "concepts rows images height width channel"]
    ids: PyTree[Int[Array, "kinds concepts rows _"]]
    named: Conditioning
    neutral: Conditioning
    text_encoder: Any
    radius: Float[Array, " concepts"]


class Place(NamedTuple):
    """Where a prediction is asked for: which prompt, which of its images, and how it is noised.

    t: a training timestep, which `Schedule.timestep` makes the network's input of.
    """

    row: Int[Array, "*batch"]
    image: Int[Array, "*batch"]
    t: Int[Array, "*batch"]
    noise: Float[Array, "*batch height width channel"]


def drawn(key: Array, gallery: Gallery, low: Array | int, high: int) -> Place:
    """A place with low <= t < high, all uniform."""
    row, image, t, noise = jax.random.split(key, 4)
    _, rows, images, *shape = gallery.images.shape
    return Place(
        jax.random.randint(row, (), 0, rows),
        jax.random.randint(image, (), 0, images),
        jax.random.randint(t, (), low, high),
        jax.random.normal(noise, shape),
    )


class Fixed(NamedTuple):
    """What a search leaves as it is. radius: of its vectors."""

    models: Models
    gallery: Gallery
    radius: Float[Array, ""]


class Case(NamedTuple):
    """One search: of which concept, with which kind of adversary, and the key of its draws."""

    concept: Int[Array, ""]
    kind: Int[Array, ""]
    key: Array


class Asked(NamedTuple):
    """A batch of a search."""

    concept: Int[Array, " batch"]
    kind: Int[Array, " batch"]
    row: Int[Array, " batch"]
    x: Float[Array, "batch height width channel"]
    t: Real[Array, " batch"]
    target: Float[Array, "batch height width channel"]


@dataclass(frozen=True, eq=False)
class Inversion:
    """The search over one denoiser and text encoder, each step compiled once.

    kinds: how many new tokens each kind of adversary has; 0: vectors. width: of a token's embedding; of several text
      encoders, a tuple.
    start: standard deviation of the noise that tokens start from. batch, from_t: of a step, see above.
    """

    denoiser: Network
    text_encoder: Encoder
    schedule: Schedule
    kinds: tuple[int, ...]
    width: int | tuple[int, ...]
    learning_rate: float
    start: float
    batch: int
    from_t: int

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        """As of Concept Inversion. Adam is elementwise: what is not used of a member stays zero."""
        return optax.adamw(self.learning_rate, weight_decay=1e-2)

    def blank(self, gallery: Gallery) -> Member:
        """A member of zeros."""
        tokens = jax.tree.map(lambda width: jnp.zeros((max(1, *self.kinds), width)), self.width)
        return Member(
            tokens, jax.tree.map(lambda a: jnp.zeros(a.shape[2:]), gallery.neutral) if 0 in self.kinds else ()
        )

    def initial(self, gallery: Gallery, kind: int, key: Array) -> Member:
        """What a search of a kind starts from. Vectors start from zero, where the student says what it says of n."""
        blank = self.blank(gallery)
        if not (count := self.kinds[kind]):
            return blank
        several = isinstance(blank.tokens, tuple)
        keys = tuple(jax.random.split(key, len(blank.tokens))) if several else key

        def started(tokens: Array, key: Array) -> Array:
            noise = self.start * jax.random.normal(key, tokens.shape)
            return jnp.where(jnp.arange(len(noise))[:, None] < count, noise, 0)

        return blank._replace(tokens=jax.tree.map(started, blank.tokens, keys))

    def begin(self, gallery: Gallery, kind: int, key: Array) -> State:
        """The state before the first step of a search."""
        member = self.initial(gallery, kind, key)
        return State(member, self.tx.init(member))

    def conditioning(
        self,
        gallery: Gallery,
        member: Member,
        kind: Int[Array, " batch"],
        concept: Int[Array, " batch"],
        row: Int[Array, " batch"],
        vectors: bool | None = None,
    ) -> Conditioning:
        """What the student is asked by each example's member, leaves [batch, ...].

        vectors: whether all members are vectors, or none is; None: `kind` decides.
        """
        vectors = (None if 0 in self.kinds else False) if vectors is None else vectors
        free = named = None
        if vectors is not False:
            moved = lambda p, n, d: n[concept, row].astype(d.dtype) + jnp.any(p != n) * d  # noqa: E731
            free = jax.tree.map(moved, gallery.named, gallery.neutral, member.offset)
        if vectors is not True:
            ids = jax.tree.map(lambda a: a[kind, concept, row], gallery.ids)
            named = encode(self.text_encoder, gallery.text_encoder, ids, member.tokens)
        if free is None or named is None:
            return named if free is None else free
        of_vectors = jnp.asarray(self.kinds)[kind] == 0
        choose = lambda a, b: jnp.where(of_vectors.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
        return jax.tree.map(choose, free, named)

    def asked(self, models: Models, gallery: Gallery, concept: Array, kind: Array, at: Place) -> Asked:
        """x_t at places, and the target: what the base says of p there."""
        t = self.schedule.timestep(at.t)
        x = add_noise(self.schedule, gallery.images[concept, at.row, at.image], at.noise, t)
        named = jax.tree.map(lambda a: a[concept, at.row], gallery.named)
        target = denoise(self.denoiser, models.base, x, t, named)
        return jax.lax.stop_gradient(Asked(concept, kind, at.row, x, t, target))

    def errors(
        self, student: Params, gallery: Gallery, member: Member, asked: Asked, vectors: bool | None = None
    ) -> Float[Array, " batch"]:
        """Mean squared error of each example, whose member has the leading axis of the batch."""
        conditioning = self.conditioning(gallery, member, asked.kind, asked.concept, asked.row, vectors)
        e = denoise(self.denoiser, student, asked.x, asked.t, conditioning)
        return error(e, asked.target, axis=(1, 2, 3))

    def bounded(self, member: Member, radius: Float[Array, ""]) -> Member:
        """The member with its vectors no longer than the radius."""
        if 0 not in self.kinds:
            return member
        factor = jnp.minimum(1, radius / jnp.maximum(optax.tree.norm(member.offset), 1e-12))
        return member._replace(offset=jax.tree.map(lambda a: a * factor, member.offset))

    def search(
        self, models: Models, gallery: Gallery, case: Case, state: State, steps: int
    ) -> tuple[State, Float[Array, " steps"]]:
        """Makes so many steps of a search. Returns its state and the loss of each."""
        search = self._searches[self.kinds[int(case.kind)] == 0]
        return search.run(state, np.arange(steps), Fixed(models, gallery, gallery.radius[case.concept]), case)

    @cached_property
    def _searches(self) -> dict[bool, Search]:
        """Of soft tokens (False), and of vectors (True)."""

        def batch(i: Array, fixed: Fixed, case: Case) -> Asked:
            total = self.schedule.num_train_timesteps
            keys = jax.random.split(jax.random.fold_in(case.key, i), self.batch)
            at = jax.vmap(lambda key: drawn(key, fixed.gallery, self.from_t, total))(keys)
            concept, kind = (jnp.broadcast_to(a, (self.batch,)) for a in (case.concept, case.kind))
            return self.asked(fixed.models, fixed.gallery, concept, kind, at)

        def loss(vectors: bool, member: Member, asked: Asked, fixed: Fixed) -> Array:
            many = jax.tree.map(lambda a: jnp.broadcast_to(a, (self.batch, *a.shape)), member)
            return jnp.mean(self.errors(fixed.models.student, fixed.gallery, many, asked, vectors))

        def after(member: Member, fixed: Fixed) -> Member:
            return self.bounded(member, fixed.radius)

        return {v: Search(batch, partial(loss, v), self.tx, after=after) for v in (False, True)}

    def warmed(
        self,
        models: Models,
        gallery: Gallery,
        state: State,
        concept: Int[Array, " batch"],
        kind: Int[Array, " batch"],
        at: Place,
    ) -> State:
        """One further step of each example's own search, each at one place."""
        asked = self.asked(models, gallery, concept, kind, at)

        def loss(member: Member) -> Array:
            return jnp.sum(self.errors(models.student, gallery, member, asked))

        updates, opt = jax.vmap(self.tx.update)(jax.grad(loss)(state.value), state.opt, state.value)
        member: Any = optax.apply_updates(state.value, updates)
        return State(jax.vmap(self.bounded)(member, gallery.radius[concept]), opt)

    @cached_property
    def _gauge(self) -> Any:
        def gauge(models: Models, gallery: Gallery, member: Member, concept: Array, kind: Array, at: Place) -> Any:
            def part(at: Place) -> tuple[Array, Array, Array]:
                n = len(at.t)
                concepts, kinds = (jnp.broadcast_to(a, (n,)) for a in (concept, kind))
                asked = self.asked(models, gallery, concepts, kinds, at)
                many = jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *a.shape)), member)
                neutral = jax.tree.map(lambda a: a[concepts, at.row], gallery.neutral)
                known = denoise(self.denoiser, models.base, asked.x, asked.t, neutral)
                return (
                    jnp.mean(self.errors(models.student, gallery, many, asked)),
                    jnp.mean(self.errors(models.base, gallery, many, asked)),
                    error(known, asked.target),
                )

            parts = jax.tree.map(lambda a: a.reshape(-1, AT_ONCE, *a.shape[1:]), at)
            student, base, neutral = (jnp.mean(sums) for sums in jax.lax.map(part, parts))
            return relative(student, neutral), relative(base, neutral)

        return jax.jit(gauge)

    def gauge(
        self, models: Models, gallery: Gallery, member: Member, concept: int, kind: int, at: Place
    ) -> tuple[float, float]:
        """How far an adversary is from the concept, in the student and in the base: g of `erasing.gauge`.

        0: the concept is fully there; 1: no more of it than in the prompt without it. at: a multiple of `AT_ONCE`
        places.
        """
        student, base = self._gauge(models, gallery, member, jnp.int32(concept), jnp.int32(kind), at)
        return float(student), float(base)


def lengths(text: str) -> tuple[int, ...]:
    """The kinds of "1|4|16|output": numbers of soft tokens, and 0 for vectors. Raises ValueError for others."""
    kinds = []
    for part in map(str.strip, text.split("|")):
        if part != "output" and (not part.isdecimal() or int(part) < 1):
            raise ValueError(
                f"rounds_tokens={text!r}: each part is a number of tokens, or 'output'; as '16' or '1|4|16'"
            )
        kinds.append(0 if part == "output" else int(part))
    return tuple(kinds)


def places(gallery: Gallery, count: int, key: Array, low: int, high: int) -> Place:
    """So many fixed places, of the prompts in turn."""
    at = jax.vmap(lambda key: drawn(key, gallery, low, high))(jax.random.split(key, count))
    return at._replace(row=jnp.arange(count) % gallery.images.shape[1])


def mean_distance(named: Conditioning, neutral: Conditioning) -> Float[Array, " concepts"]:
    """E |c(p) - c(n)| over each concept's prompts, of leaves [concepts, rows, ...]."""

    def distance(one: Any, other: Any) -> Array:
        difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), one, other)
        return optax.tree.norm(difference)

    return jnp.mean(jax.vmap(jax.vmap(distance))(named, neutral), axis=1)
