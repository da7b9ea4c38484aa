"""Several trainings that differ in values alone, in one compiled step: each has its own theta, optimizer and inputs.

    vmap over trainings of step(state_i, theta_0, frozen, inputs_i)

The teacher's weights, the timestep, the noise and whatever else is equal for all have no axis of trainings, so that
what follows from them alone is computed once. Each training makes the updates that it would make in a step of its own.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esd_jax.params import Params
from esd_jax.training.step import Metrics, State


class Unlike(ValueError):
    """Trainings that are not the same program."""


def stacked(states: Sequence[State]) -> State:
    """The states of several trainings at one step, as one: theta, optimizer and memory have a first axis of them."""
    first = states[0]
    whole = jax.tree.map(lambda *a: jnp.stack(a), *[(s.theta, s.opt, s.memory) for s in states])
    return State(whole[0], whole[1], first.step, first.key, whole[2])


def one_of(state: State, i: int) -> State:
    """One training's state among those of `stacked`."""
    theta, opt, memory = jax.tree.map(lambda a: a[i], (state.theta, state.opt, state.memory))
    return State(theta, opt, state.step, state.key, memory)


def shared(inputs: Sequence[Any]) -> tuple[Any, tuple[bool, ...]]:
    """The inputs of several trainings as one tree, and which of its leaves differ: these have a first axis of them.

    Raises Unlike as `check_shapes`.
    """
    for other in inputs[1:]:
        check_shapes(inputs[0], other)
    structure = jax.tree.structure(inputs[0])
    joined, differ = [], []
    for parts in zip(*map(jax.tree.leaves, inputs), strict=True):
        same = all(part is parts[0] or np.array_equal(part, parts[0]) for part in parts[1:])
        joined.append(parts[0] if same else jnp.stack(parts))
        differ.append(not same)
    return jax.tree.unflatten(structure, joined), tuple(differ)


def check_shapes(one: Any, other: Any) -> None:
    """Raises Unlike for inputs whose trees, shapes or dtypes differ."""
    kinds = [(jax.tree.structure(tree), [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]) for tree in (one, other)]
    if kinds[0] != kinds[1]:
        raise Unlike("what they are trained on differs in shape")


def check_alike(methods: Sequence[Any]) -> None:
    """Raises Unlike for methods that would be different programs: those that differ in what is not traced."""
    for other in methods[1:]:
        if name := _difference(methods[0], other):
            raise Unlike(f"their methods differ in {name}")


def _difference(one: Any, other: Any, name: str = "kind") -> str | None:
    """The name of the first field in which two values differ; None if they are the same."""
    if one is other:
        return None
    if type(one) is not type(other):
        return name
    if dataclasses.is_dataclass(one):
        fields = [f.name for f in dataclasses.fields(one)]
        parts = ((_difference(getattr(one, f), getattr(other, f), f)) for f in fields)
        return next(filter(None, parts), None)
    if isinstance(one, FunctionType):  # made anew by each method: the same code over the same values
        one, other = (_definition(inspect.unwrap(f)) for f in (one, other))
    if isinstance(one, partial):
        one, other = ((f.func, f.args, f.keywords) for f in (one, other))
    if isinstance(one, Mapping):
        one, other = (list(part.items()) for part in (one, other))
    if isinstance(one, list | tuple):
        same = len(one) == len(other) and not any(_difference(*pair) for pair in zip(one, other, strict=True))
        return None if same else name
    if isinstance(one, jax.Array | np.ndarray):
        return None if one.dtype == other.dtype and np.array_equal(one, other) else name
    return None if one == other else name


def _definition(function: FunctionType) -> tuple[Any, ...]:
    """What determines a function: its code, the values that it closes over, and its defaults."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return function.__code__, cells, function.__defaults__, function.__kwdefaults__


def make_step(
    step: Callable[..., tuple[State, Metrics]], differ: Sequence[bool], at_once: int | None = None
) -> Callable[[State, Params, Params, Any], tuple[State, Metrics, Metrics]]:
    """One jitted update of all trainings: (state, theta_0, frozen, inputs) -> (state, means, metrics of each).

    `state` is donated.

    Args:
      step: `training.step.make_step`'s.
      differ: which leaves of the inputs do, as `shared` gives it.
      at_once: how many trainings are computed together; by default all. Fewer need less memory, and take longer where
        the device has room.
    """

    def update(state: State, theta_0: Params, frozen: Params, inputs: Any) -> tuple[State, Metrics, Metrics]:
        leaves, structure = jax.tree.flatten(inputs)
        own = [leaf for leaf, varies in zip(leaves, differ, strict=True) if varies]

        def one(training: tuple[Any, Any, Any, list[Any]]) -> Any:
            theta, opt, memory, values = training
            rest = iter(values)
            whole = [next(rest) if varies else leaf for leaf, varies in zip(leaves, differ, strict=True)]
            before = State(theta, opt, state.step, state.key, memory)
            after, metrics = step(before, theta_0, frozen, jax.tree.unflatten(structure, whole))
            return (after.theta, after.opt, after.memory), metrics

        trainings = (state.theta, state.opt, state.memory, own)
        every = partial(jax.lax.map, one, batch_size=at_once) if at_once else jax.vmap(one)
        (theta, opt, memory), metrics = every(trainings)
        new = State(theta, opt, state.step + 1, state.key, memory)
        return new, jax.tree.map(jnp.mean, metrics), metrics

    return jax.jit(update, donate_argnums=0)
