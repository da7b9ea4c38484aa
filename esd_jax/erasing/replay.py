"""Trajectories that are drawn now and then, whole, and used in many updates.

A method that samples x_t afresh in every update spends nine tenths of its time on it, and throws away all of a
trajectory but its end. Here every point of it is kept:

    every u-th update:  x_0, x_1, ... from noise, by the student or the teacher, into a ring of the last B trajectories
    every update:       for each example a trajectory of the ring and a point on it, both uniform

Where the sampler's own predictions are what the loss needs at that point, they are kept, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from esd_jax.diffusion import samplers
from esd_jax.erasing.method import Models, Wrapping
from esd_jax.erasing.trajectories import Trajectory
from esd_jax.params import shape_of

# (x_t as the network takes it, t, sampler step) -> (the sampler's output, what is kept of the predictions)
Predict = Callable[[Array, Array, Array], tuple[Array, tuple[Array, ...]]]


class Draws(NamedTuple):
    """Everything random in one update, for each example: which point it takes; the trajectory that it may draw."""

    slot: Int[Array, " batch"]
    index: Int[Array, " batch"]
    t: Float[Array, " batch"]
    concept: Int[Array, " batch"]
    noise: Float[Array, "batch height width channel"]


class Memory(NamedTuple):
    """The ring. Each example of a batch has a ring of its own, so that nothing moves between devices.

    x: after 0, 1, ... sampler steps, as the network takes it. predictions: there, each shaped like x.
    concept: whose trajectory it is.
    """

    x: Float[Array, "batch buffer point height width channel"]
    predictions: tuple[Float[Array, "batch buffer point height width channel"], ...]
    concept: Int[Array, "batch buffer"]


class Points(NamedTuple):
    """What an update is made of."""

    x: Float[Array, "batch height width channel"]
    predictions: tuple[Float[Array, "batch height width channel"], ...]
    concept: Int[Array, " batch"]
    t: Float[Array, " batch"]


def check(settings: Any) -> None:
    """Raises ValueError for numbers of a method's settings that are out of range."""
    for name in ("updates_per_trajectory", "trajectory_buffer"):
        if (value := getattr(settings, name)) < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def wanted(settings: Any) -> bool:
    """Whether a method's settings ask for trajectories that are kept."""
    return (settings.updates_per_trajectory, settings.trajectory_buffer) != (1, 1)


@dataclass(frozen=True, eq=False)
class Replay:
    """When trajectories are drawn and how many are kept.

    every: updates from one drawing to the next (u).
    buffer: trajectories that are kept for each example of a batch (B).
    predictions: how many predictions are kept at each point; 0 if the loss evaluates anew.
    """

    trajectory: Trajectory
    every: int
    buffer: int
    predictions: int = 0

    @property
    def calls(self) -> int:
        """Guided sampler steps of one trajectory. The predictions at its last point cost one more."""
        return self.trajectory.most_updates + bool(self.predictions)

    def memory(self, shape: tuple[int, ...]) -> Memory:
        """The shapes of one example's ring."""
        points = shape_of((self.buffer, self.trajectory.most_updates + 1, *shape), jnp.float32)
        return Memory(points, (points,) * self.predictions, shape_of((self.buffer,), jnp.int32))

    def draw(self, step: Array, example_keys: Array, shape: tuple[int, ...], concepts: int) -> Draws:
        """The random choices of an update, each example's from its own key; a slot only among those that are filled."""
        filled = jnp.minimum(step // self.every + 1, self.buffer)

        def example(key: Array) -> Draws:
            slot, point, concept, noise = jax.random.split(key, 4)
            return Draws(
                jax.random.randint(slot, (), 0, filled),
                *self.trajectory.draw(point),
                jax.random.randint(concept, (), 0, concepts),
                jax.random.normal(noise, shape),
            )

        return jax.vmap(example)(example_keys)

    def recall(
        self, memory: Memory, draws: Draws, step: Array, predict: Callable[[Array], Predict]
    ) -> tuple[Memory, Points]:
        """The ring, with new trajectories if it is time, and the points that were drawn from it.

        predict: the examples' concepts -> what samples their trajectories.
        """

        def renewed() -> Memory:
            fresh = self.record(predict(draws.concept), draws.noise, draws.concept)
            slot = (step // self.every) % self.buffer
            return jax.tree.map(lambda old, new: old.at[:, slot].set(new.astype(old.dtype)), memory, fresh)

        memory = jax.lax.cond(step % self.every == 0, renewed, lambda: memory)
        at = jnp.asarray(self.trajectory.num_updates)[draws.index]
        take = jax.vmap(lambda rings, slot, point: rings[slot, point])
        x, *predictions = (take(rings, draws.slot, at) for rings in (memory.x, *memory.predictions))
        concept = jax.vmap(lambda rings, slot: rings[slot])(memory.concept, draws.slot)
        return memory, Points(x, tuple(predictions), concept, draws.t)

    def record(
        self, predict: Predict, noise: Float[Array, "batch height width channel"], concept: Int[Array, " batch"]
    ) -> Memory:
        """One whole trajectory for each example, without the axis of the ring."""
        sampler, last = self.trajectory.sampler, self.trajectory.most_updates
        blank = jnp.zeros((noise.shape[0], last + 1, *noise.shape[1:]), jnp.promote_types(noise.dtype, jnp.float32))

        def recording(x: Array, t: Array, i: Array, kept: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
            output, predictions = predict(x, t, i)
            values = (x, *predictions[: self.predictions])
            return output, tuple(k.at[:, i].set(v) for k, v in zip(kept, values, strict=True))

        x, kept = samplers.run_with_memory(
            sampler,
            recording,
            noise * sampler.initial_scale,
            stop=self.calls,
            memory=(blank,) * (1 + self.predictions),
        )
        points, *predictions = kept
        if not self.predictions:  # nothing was evaluated at the last point
            points = points.at[:, last].set(self.trajectory.scaled(x, last))
        return Memory(points, tuple(predictions), concept)


def of(settings: Any, trajectory: Trajectory, predictions: int = 0) -> Replay | None:
    """What a method's settings ask for; None: that every update samples afresh."""
    if not wanted(settings):
        return None
    return Replay(trajectory, settings.updates_per_trajectory, settings.trajectory_buffer, predictions)


@dataclass(frozen=True, eq=False)
class Replaying(Wrapping):
    """A method over kept trajectories.

    method: has `scored(models, x, t, concepts, predictions, inputs)`, what an update is scored on at points x_t;
      `predict(models, concepts, inputs)`, which samples; and a `loss`.
    order: where a trajectory serves any concept, (step, drawn concepts, their number) -> the concepts of an update.
    """

    method: Any
    replay: Replay
    order: Callable[[Array, Array, int], Array] | None = None

    def memory(self, shape: tuple[int, ...]) -> Memory:
        """The shapes of what is kept for each example from update to update."""
        return self.replay.memory(shape)

    def draw(self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Any) -> Draws:
        """The random choices of a step; the examples share none, except under an order."""
        draws = self.replay.draw(step, example_keys, shape, inputs.bank.num_concepts)
        if self.order is None:
            return draws
        return draws._replace(concept=self.order(step, draws.concept, inputs.bank.num_concepts))

    def recall(self, models: Models, draws: Draws, memory: Memory, step: Array, inputs: Any) -> tuple[Memory, Points]:
        """The memory after this step's drawing, and the points that the step is made of."""
        predict = lambda concept: self.method.predict(models, concept, inputs)  # noqa: E731
        memory, points = self.replay.recall(memory, draws, step, predict)
        return memory, points if self.order is None else points._replace(concept=draws.concept)

    def prepare(self, models: Models, points: Points, inputs: Any) -> Any:
        """What the student is scored on at the points. Nothing here carries a gradient."""
        return self.method.scored(models, points.x, points.t, points.concept, points.predictions, inputs)
