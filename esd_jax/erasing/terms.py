"""Losses beside a method's own, each of which leads the student's prediction for a prompt to the base's for another.

    L = L_method + sum_i w_i mean (e_theta(x_i, t_i, c_i) - e*(x_i, t_i, k_i))^2

A term i says what x, t, c and k are: what is preserved has k = c, an adversary the prompt without the concept. All
terms are evaluated in one call of the network, which costs less than one call for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esd_jax.erasing import method as base
from esd_jax.erasing.method import Interval, Method, Models, Session, denoise
from esd_jax.params import Conditioning, Network, Params


class Point(NamedTuple):
    """Where the student is asked `asked`, and should say what the base says of `target`. t: one, or one for each.

    source: where the base is asked, if it is not x; see `Term.answer`.
    """

    x: Float[Array, "batch height width channel"]
    t: Array
    asked: Conditioning
    target: Conditioning
    weight: Float[Array, ""]
    source: Float[Array, "batch height width channel"] | None = None


class Term:
    """One such loss, in the functions of a `Method`.

    salt: a number of its own, from which its draws follow: with or without other terms they are the same.
    """

    salt: int

    def memory(self, shape: tuple[int, ...]) -> Any:
        return ()

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Any) -> Any:
        return ()

    def recall(self, models: Models, draws: Any, memory: Any, step: Array, inputs: Any) -> tuple[Any, Any]:
        return memory, draws

    def point(self, models: Models, draws: Any, inputs: Any, own: tuple[Array, Array]) -> Point:
        """own: the method's (x_t, t)."""
        raise NotImplementedError

    def answer(self, point: Point, output: Array) -> Float[Array, "batch height width channel"]:
        """What the student should say, from what the base said; nothing here carries a gradient."""
        return output

    def between(self, session: Session, memory: Any, inputs: Any) -> Interval | None:
        return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    inner: Any
    terms: tuple[Any, ...]

    @property
    def bank(self) -> Any:
        """The method's own."""
        return self.inner.bank


class Draws(NamedTuple):
    """The method's own, and those of each term."""

    inner: Any
    t: Array
    terms: tuple[Any, ...]


class Batch(NamedTuple):
    """x, t, asked, target: of all examples of all terms, one term after the other. weights: of the terms."""

    inner: Any
    x: Float[Array, "examples height width channel"]
    t: Float[Array, " examples"]
    asked: Conditioning
    target: Float[Array, "examples height width channel"]
    weights: Float[Array, " terms"]


@dataclass(frozen=True, eq=False)
class Terms(base.Wrapping):
    """A method with terms added. Its memory is (the method's, each term's), or () if nothing is kept."""

    denoiser: Network
    terms: tuple[Term, ...]

    def own_inputs(self, inputs: Inputs) -> Any:
        return inputs.inner

    def own_batch(self, batch: Batch) -> Any:
        return batch.inner

    def memory(self, shape: tuple[int, ...]) -> Any:
        return self._packed(self.method.memory(shape), [term.memory(shape) for term in self.terms])

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        inner, parts = self.method.draw(step, key, example_keys, shape, inputs.inner), []
        for term, own in zip(self.terms, inputs.terms, strict=True):
            keys = jax.vmap(lambda key, salt=term.salt: jax.random.fold_in(key, salt))(example_keys)
            parts.append(term.draw(step, jax.random.fold_in(key, term.salt), keys, shape, own))
        return Draws(inner, inner.t, tuple(parts))

    def recall(self, models: Models, draws: Draws, memory: Any, step: Array, inputs: Inputs) -> tuple[Any, Draws]:
        inner, parts = self._unpacked(memory)
        inner, own = self.method.recall(models, draws.inner, inner, step, inputs.inner)
        recalled = [
            term.recall(models, drawn, kept, step, its)
            for term, drawn, kept, its in zip(self.terms, draws.terms, parts, inputs.terms, strict=True)
        ]
        memory = self._packed(inner, [kept for kept, _ in recalled])
        return memory, Draws(own, draws.t, tuple(drawn for _, drawn in recalled))

    def prepare(self, models: Models, draws: Draws, inputs: Inputs) -> Batch:
        inner = self.method.prepare(models, draws.inner, inputs.inner)
        own = self.method.points(inner)
        points = [
            term.point(models, drawn, its, own)
            for term, drawn, its in zip(self.terms, draws.terms, inputs.terms, strict=True)
        ]
        x, asked, target = (_joined([getattr(point, name) for point in points]) for name in ("x", "asked", "target"))
        t = jnp.concatenate([jnp.broadcast_to(jnp.asarray(p.t, jnp.float32), p.x.shape[:1]) for p in points])
        source = jnp.concatenate([p.x if p.source is None else p.source for p in points])
        outputs = jnp.split(denoise(self.denoiser, models.base, source, t, target), len(points))
        answers = [term.answer(p, output) for term, p, output in zip(self.terms, points, outputs, strict=True)]
        batch = (x, t, asked, jnp.concatenate(answers), jnp.stack([p.weight for p in points]))
        return Batch(inner, *jax.lax.stop_gradient(batch))

    def loss(self, student: Params, batch: Batch) -> Float[Array, ""]:
        squares = (denoise(self.denoiser, student, batch.x, batch.t, batch.asked) - batch.target) ** 2
        means = jnp.mean(squares.reshape(len(self.terms), -1), axis=1)
        return self.method.loss(student, batch.inner) + jnp.sum(batch.weights * means)

    def between(self, session: Session, memory: Any, inputs: Inputs) -> Interval | None:
        inner, parts = self._unpacked(memory)
        if (interval := self.method.between(session, inner, inputs.inner)) is not None:
            return interval._replace(memory=self._packed(interval.memory, parts))
        for i, (term, its) in enumerate(zip(self.terms, inputs.terms, strict=True)):
            if (interval := term.between(session, parts[i], its)) is not None:
                parts[i] = interval.memory
                return interval._replace(memory=self._packed(inner, parts))
        return None

    def _packed(self, inner: Any, parts: Sequence[Any]) -> Any:
        # A checkpoint without arrays in its memory has none, whatever its structure.
        return (inner, tuple(parts)) if jax.tree.leaves((inner, parts)) else ()

    def _unpacked(self, memory: Any) -> tuple[Any, list[Any]]:
        inner, parts = memory or ((), ((),) * len(self.terms))
        return inner, list(parts)


def added(method: Method, inputs: Any, denoiser: Network, term: Term, own: Any) -> tuple[Terms, Inputs]:
    """The method and its inputs with a term, and the term's inputs, added."""
    if isinstance(method, Terms):
        return replace(method, terms=(*method.terms, term)), Inputs(inputs.inner, (*inputs.terms, own))
    return Terms(method, denoiser, (term,)), Inputs(inputs, (own,))


def _joined(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)
