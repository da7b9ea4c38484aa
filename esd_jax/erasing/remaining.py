"""Concepts drawn by what remains of each, so that updates go where a list is not erased yet; no paper's.

    d_i = e*(x_t, c_i) - e*(x_t, n_i),    r_i = max(0, <e_theta(x_t, c_i) - e*(x_t, n_i), d_i> / <d_i, d_i>)
    p_i = u / n + (1 - u) r_i / sum_j r_j

c_i is the prompt of concept i and n_i what it is led to. r is 1 of the base, and 0 where the student says of c_i what
the base says of n_i, or goes beyond. It needs no image: pure noise is taken for x_t at noisy timesteps, where a prompt
decides most. A concept in a context counts as one of its own. Where nothing remains, all are drawn alike.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing.method import Interval, Method, Models, Session, Tools, Wrapping, denoise
from esd_jax.params import Network, shape_of

UNIFORM = 0.2  # u
NOISES = 2  # x_t at each timestep
SCORED_AT = (0.8, 0.95)  # parts of the schedule
AT_ONCE = 8  # concepts scored
SALT = 7  # of the draws, apart from those of `terms`


class Draws(NamedTuple):
    """inner: the method's own. place: uniform, 0 to 1: which concept is drawn. scored: the key of the noise."""

    inner: Any
    t: Array
    place: Float[Array, " batch"]
    scored: Array


@dataclass(frozen=True, eq=False)
class ByRemainder(Wrapping):
    """A method that draws its concepts by what remains of them. Its memory is (r of each, the method's own).

    count: of the concepts, of which each in a context is one. shape: of one example's latents.
    """

    denoiser: Network
    every: int
    count: int
    shape: tuple[int, ...]
    schedule: Schedule

    def memory(self, shape: tuple[int, ...]) -> Any:
        return shape_of((self.count,), jnp.float32), self.method.memory(shape)

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Any) -> Draws:
        inner = self.method.draw(step, key, example_keys, shape, inputs)
        place = jax.vmap(lambda own: jax.random.uniform(jax.random.fold_in(own, SALT)))(example_keys)
        return Draws(inner, inner.t, place, jax.random.fold_in(key, SALT))

    def recall(self, models: Models, draws: Draws, memory: Any, step: Array, inputs: Any) -> tuple[Any, Any]:
        remainders, own = memory

        def scored() -> Array:
            return jnp.broadcast_to(self.remainders(models, draws.scored, inputs), remainders.shape)

        remainders = jax.lax.cond(step % self.every == 0, scored, lambda: remainders)
        inner = with_concept(draws.inner, drawn(remainders, draws.place))
        own, inner = self.method.recall(models, inner, own, step, inputs)
        return (remainders, own), inner

    def remainders(self, models: Models, key: Array, inputs: Any) -> Float[Array, " concepts"]:
        """r of each concept, under noise that is the same for all."""
        steps = jnp.asarray([int(part * self.schedule.num_train_timesteps) for part in SCORED_AT])
        times = jnp.repeat(self.schedule.timestep(steps), NOISES)
        x = jax.random.normal(key, (len(times), *self.shape))
        asked, led = self.method.led(inputs)

        def of(rows: tuple[Array, Array]) -> Float[Array, ""]:
            concept, instead = (
                jax.tree.map(lambda a, i=i: jnp.stack([a[i]] * len(times)), inputs.bank.rows) for i in rows
            )
            student = denoise(self.denoiser, models.student, x, times, concept)
            teacher = denoise(self.denoiser, models.base, x, times, concept)
            start = denoise(self.denoiser, models.base, x, times, instead)
            direction = teacher - start
            length = jnp.sum(direction**2)
            return jnp.maximum(jnp.sum((student - start) * direction), 0) / jnp.where(length > 0, length, 1)

        return jax.lax.map(of, (asked, led), batch_size=AT_ONCE)

    def between(self, session: Session, memory: Any, inputs: Any) -> Interval | None:
        remainders, own = memory
        interval = self.method.between(session, own, inputs)
        return interval and interval._replace(memory=(remainders, interval.memory))


def by_remainder(method: Method, inputs: Any, tools: Tools, every: int) -> Method:
    """The method with its concepts drawn by what remains of them, scored in every so many updates.

    Unchanged for one concept. Raises ValueError for a method that does not draw its concepts alike.
    """
    try:
        count = len(method.led(inputs)[0])
    except NotImplementedError as error:
        raise ValueError(f"remaining_every={every}: {error}") from None
    if count < 2:
        return method
    return ByRemainder(method, tools.denoiser, every, count, tools.shape, tools.schedule)


def drawn(remainders: Float[Array, "batch concepts"], place: Float[Array, " batch"]) -> Int[Array, " batch"]:
    """The concept of each example: p of the module's docstring, inverted at a place from 0 to 1."""
    count, total = remainders.shape[1], jnp.sum(remainders, axis=1, keepdims=True)
    parts = jnp.where(total > 0, remainders / jnp.where(total > 0, total, 1), 1 / count)
    ends = jnp.cumsum(UNIFORM / count + (1 - UNIFORM) * parts, axis=1)
    return jnp.minimum(jnp.sum(ends <= place[:, None], axis=1), count - 1).astype(jnp.int32)


def with_concept(draws: Any, concept: Int[Array, " batch"]) -> Any:
    """A method's draws, or those of one with terms, with other concepts."""
    if hasattr(draws, "concept"):
        return draws._replace(concept=concept)
    return draws._replace(inner=with_concept(draws.inner, concept))
