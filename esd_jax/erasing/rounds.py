"""Inversion rounds: erasure that searches what still reaches the concept, again and again, and erases that, too.

    L = L_method + weight E || e_theta(x_t, c(p; V_b)) - e*(x_t, c(n)) ||^2,    b from a bank of adversaries

Every few hundred updates a round searches a new adversary in the model as erased so far (`inversion`) and adds it to
the bank, from which the oldest leaves. In between, an update draws one of the bank and lets it search on for a few
steps, so that it follows the model. p and n are the method's prompts with the concept and without it, x_t noised images
that the base drew of p; half of t in [.85 T, T), half in [.3 T, T). Redirection asks the base at x'_t in place of x_t,
an image of n from the same noise, and carries its answer over (`images.carried`). A part of its examples
(`rounds_follow`) is asked at x'_t itself, t in [0, T): otherwise an adversary that is led to n by the early timesteps
paints the concept over that image in the late ones.

After STEREO (Srivatsan et al. 2025, arXiv 2408.16807), whose rounds alternate erasure and inversion in a model that is
thrown away, and which erases all that was learned in a second run. Here it is one run, the target is the prompt without
the concept in place of a multiple of negative guidance, and how far a round's adversary came is measured (`gauge`).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from esd_jax.diffusion.schedule import add_noise
from esd_jax.erasing import inversion
from esd_jax.erasing.embedding_search import State
from esd_jax.erasing.galleries import Prompts, make_gallery, placed, text_of
from esd_jax.erasing.images import carried
from esd_jax.erasing.inversion import Case, Gallery, Inversion, Member, Place
from esd_jax.erasing.method import Interval, Method, Models, Session, Tools
from esd_jax.erasing.retention import least_of
from esd_jax.erasing.round_settings import RoundsSettings
from esd_jax.erasing.terms import Point, Term, added
from esd_jax.families import NEEDS
from esd_jax.params import shape_of

GAUGED = 32  # places at which an adversary is measured, all at t >= .9 T
ROBUST = 0.9  # a gauge from which on a round counts for `rounds_stop`
WIDE = 0.3  # part of the schedule from which t is drawn in an update; half of the time from `retention.HIGH` on
SEARCH = 2**30  # apart from the keys of updates, which are numbered from 0


def adding(
    settings: RoundsSettings,
    method: Method,
    inputs: Any,
    tools: Tools,
    prompts: Sequence[Prompts],
    sampling: Mapping[str, Any] | None = None,
    images: Array | None = None,
    anchors: Array | None = None,
    low: float = WIDE,
) -> tuple[Method, Any]:
    """The method and its inputs with inversion rounds; unchanged if there are none.

    Args:
      prompts: of each concept, as many of one as of another.
      sampling: options of `Tools.sample` for images of the prompts with the concept.
      images: latents of the prompts with the concept, if the method has drawn them, in place of `sampling`.
        [concepts, rows, images, ...]
      anchors: of those without it, from the same noise, if adversaries are led to what the base sees in them.
      low: the part of the schedule from which an update draws its timesteps, half of them from `retention.HIGH` on.

    Raises ValueError as `check` does.
    """
    if not settings.rounds_every:
        return method, inputs
    check(settings, tools, prompts)
    total, text = tools.schedule.num_train_timesteps, text_of(tools)
    kinds = inversion.lengths(settings.rounds_tokens)
    gallery = make_gallery(settings, tools, text, kinds, prompts, images, sampling or {})
    search = Inversion(
        tools.denoiser,
        text.encoder,
        tools.schedule,
        kinds,
        jax.tree.map(lambda table: table.shape[1], text.encoder.table(text.params)),
        settings.rounds_rate,
        settings.rounds_start,
        settings.rounds_batch,
        settings.rounds_from_t,
    )
    key = jax.random.fold_in(jax.random.key(settings.rounds_seed), 1)
    gauged = inversion.places(gallery, GAUGED, key, int(0.9 * total), total)
    names, blank = tuple(one.named[0] for one in prompts), jax.eval_shape(lambda: search.blank(gallery))
    term = Rounds(settings, search, names, blank, low)
    own = Inputs(gallery, gauged, jnp.float32(settings.rounds_weight), anchors)
    return added(method, inputs, tools.denoiser, term, own)


def check(settings: RoundsSettings, tools: Tools, prompts: Sequence[Prompts]) -> None:
    """Raises ValueError for what inversion rounds, if there are any, do not go with, before anything is sampled.

    A family whose text encoders take no new tokens, images of the user's, a from_t that the schedule does not have, and
    new tokens that do not fit into a prompt.
    """
    if not settings.rounds_every:
        return
    what = f"rounds_every={settings.rounds_every}"
    if not tools.tables:
        raise ValueError(f"{what} needs {NEEDS['soft_tokens']}, which this model family does not have")
    if tools.images is not None:
        raise ValueError(f"{what} needs a concept that a text names, but images are given: leave one of them out")
    if settings.rounds_from_t >= (total := tools.schedule.num_train_timesteps):
        raise ValueError(f"rounds_from_t={settings.rounds_from_t} must be in 0..{total - 1}")
    placed(text_of(tools), inversion.lengths(settings.rounds_tokens), prompts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """gauged: the places at which adversaries are measured, always the same. anchors: see `adding`."""

    gallery: Gallery
    gauged: Place
    weight: Float[Array, ""]
    anchors: Float[Array, "concepts rows images height width channel"] | None = None


class Memory(NamedTuple):
    """The bank, of each example of a batch its own: the adversaries that examples draw search on apart.

    members: their searches' states. concept, kind: of each. added: how many were; the last is the newest.
    rounds: how many were made. robust: of those that added one, the last so many had a gauge of at least `ROBUST`.
    """

    members: State
    concept: Int[Array, "*batch bank"]
    kind: Int[Array, "*batch bank"]
    added: Int[Array, "*batch"]
    rounds: Int[Array, "*batch"]
    robust: Int[Array, "*batch"]


class Draws(NamedTuple):
    """fresh: whether the newest adversary is drawn; else the one at `pick` (0 to 1) of the bank.

    follow: whether it is asked at an image without the concept. warm: where it searches on, [batch, steps].
    """

    fresh: Bool[Array, " batch"]
    pick: Float[Array, " batch"]
    follow: Bool[Array, " batch"]
    at: Place
    warm: Place


class Recalled(NamedTuple):
    """An example's adversary, and where its loss is taken. filled: whether there is one."""

    follow: Bool[Array, " batch"]
    at: Place
    member: Member
    concept: Int[Array, " batch"]
    kind: Int[Array, " batch"]
    filled: Bool[Array, " batch"]


@dataclass(frozen=True, eq=False)
class Rounds(Term):
    """concepts: their texts; adversaries of each are searched in turn. blank: a member's shapes. low: see `adding`."""

    settings: RoundsSettings
    inversion: Inversion
    concepts: tuple[str, ...]
    blank: Member
    low: float = WIDE

    salt = 4

    def memory(self, shape: tuple[int, ...]) -> Memory:
        bank = self.settings.rounds_bank
        state = jax.eval_shape(lambda blank: State(blank, self.inversion.tx.init(blank)), self.blank)
        members = jax.tree.map(lambda s: shape_of((bank, *s.shape), s.dtype), state)
        which, number = shape_of((bank,), jnp.int32), shape_of((), jnp.int32)
        return Memory(members, which, which, number, number, number)

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        total = self.inversion.schedule.num_train_timesteps
        place = partial(inversion.drawn, gallery=inputs.gallery, high=total)

        def example(key: Array) -> Draws:
            fresh, pick, high, at, warm = jax.random.split(key, 5)
            # A key of its own, so that without it the other draws are what they were.
            follow = jax.random.bernoulli(jax.random.fold_in(key, 5), self.settings.rounds_follow)
            low = jnp.where(follow, least_of(total, high, 0.0), least_of(total, high, self.low))
            return Draws(
                jax.random.bernoulli(fresh, self.settings.rounds_fresh),
                jax.random.uniform(pick),
                follow,
                place(at, low=low),
                jax.vmap(lambda key: place(key, low=self.settings.rounds_from_t))(
                    jax.random.split(warm, self.settings.rounds_warm)
                ),
            )

        return jax.vmap(example)(example_keys)

    def recall(
        self, models: Models, draws: Draws, memory: Memory, step: Array, inputs: Inputs
    ) -> tuple[Memory, Recalled]:
        bank = self.settings.rounds_bank
        filled = jnp.minimum(memory.added, bank)
        any_of_them = jnp.minimum((draws.pick * filled).astype(jnp.int32), filled - 1)
        slot = jnp.maximum(0, jnp.where(draws.fresh, (memory.added - 1) % bank, any_of_them))
        take = jax.vmap(lambda ring, slot: ring[slot])
        state = jax.tree.map(lambda ring: take(ring, slot), memory.members)
        concept, kind = take(memory.concept, slot), take(memory.kind, slot)
        for i in range(self.settings.rounds_warm):  # not a scan, in which gradients take twice as long on a CPU
            at = jax.tree.map(lambda a, i=i: a[:, i], draws.warm)
            state = self.inversion.warmed(models, inputs.gallery, state, concept, kind, at)
        put = jax.vmap(lambda ring, slot, value: ring.at[slot].set(value))
        members = jax.tree.map(lambda ring, value: put(ring, slot, value), memory.members, state)
        recalled = Recalled(draws.follow, draws.at, state.value, concept, kind, filled > 0)
        return memory._replace(members=members), recalled

    def point(self, models: Models, draws: Recalled, inputs: Inputs, own: tuple[Array, Array]) -> Point:
        gallery, at, concept = inputs.gallery, draws.at, draws.concept
        t = self.inversion.schedule.timestep(at.t)

        def noised(images: Array) -> Array:
            return add_noise(self.inversion.schedule, images[concept, at.row, at.image], at.noise, t)

        x, source = noised(gallery.images), None
        if inputs.anchors is not None:
            source = noised(inputs.anchors)
            x = jnp.where(draws.follow[:, None, None, None], source, x)
        asked = self.inversion.conditioning(gallery, draws.member, draws.kind, concept, at.row)
        neutral = jax.tree.map(lambda a, b: a[concept, at.row].astype(b.dtype), gallery.neutral, asked)
        weight = inputs.weight * jnp.mean(draws.filled.astype(jnp.float32))
        return Point(x, t, asked, neutral, weight, source)

    def answer(self, point: Point, output: Array) -> Array:
        if point.source is None:
            return output
        return carried(self.inversion.schedule, output, point.source, point.x, point.t)

    def between(self, session: Session, memory: Memory, inputs: Inputs) -> Interval | None:
        """A round, where it is time for one and it was not made yet."""
        number, rest = divmod(session.step, self.settings.rounds_every)
        if rest:
            return None
        if _first(memory.rounds) > number:
            return Interval(memory, None, self._over(memory))
        began, settings = time.monotonic(), self.settings
        concept = number % len(self.concepts)
        kind = number // len(self.concepts) % len(self.inversion.kinds)
        start, draws = jax.random.split(jax.random.fold_in(session.key, SEARCH + session.step))
        models, gallery = session.models(), inputs.gallery
        state = self.inversion.begin(gallery, kind, start)
        case, state = session.place((Case(jnp.int32(concept), jnp.int32(kind), draws), state))
        state, losses = self.inversion.search(models, gallery, case, state, settings.rounds_search)
        student, base = self.inversion.gauge(models, gallery, state.value, concept, kind, inputs.gauged)
        skipped, robust = base > settings.rounds_skip, student >= ROBUST
        memory = self._append(memory, state, jnp.int32(concept), jnp.int32(kind), not skipped, robust)
        tail = np.asarray(losses)[-(1 + len(losses) // 10) :]
        record = {
            "gauge": student,
            "gauge_base": base,
            "tokens": self.inversion.kinds[kind] or "output",
            "concept": self.concepts[concept],
            "loss": float(tail.mean()),
            "skipped": skipped,
            "seconds": round(time.monotonic() - began, 3),
        }
        return Interval(memory, record, self._over(memory))

    def _over(self, memory: Memory) -> bool:
        turns = len(self.concepts) * len(self.inversion.kinds)
        return 0 < self.settings.rounds_stop * turns <= _first(memory.robust)

    @cached_property
    def _append(self) -> Any:
        """(memory, a search's state, concept, kind, whether it is added, whether its gauge counts) -> the memory."""
        bank = self.settings.rounds_bank

        def append(memory: Memory, state: State, concept: Array, kind: Array, keep: Array, robust: Array) -> Memory:
            def one(memory: Memory) -> Memory:
                slot = memory.added % bank

                def put(ring: Array, value: Array) -> Array:
                    return ring.at[slot].set(jnp.where(keep, value, ring[slot]).astype(ring.dtype))

                return Memory(
                    jax.tree.map(put, memory.members, state),
                    put(memory.concept, concept),
                    put(memory.kind, kind),
                    memory.added + keep,
                    memory.rounds + 1,
                    jnp.where(keep, jnp.where(robust, memory.robust + 1, 0), memory.robust),
                )

            return jax.vmap(jax.vmap(one))(memory)

        return jax.jit(append)


def _first(numbers: Array) -> int:
    """A number of which each example has a copy."""
    return int(np.ravel(np.asarray(numbers.addressable_data(0)))[0])
