"""The search for embeddings that make a fixed denoiser predict something: one optimiser, one compiled step.

    v <- after(v + optimiser(d loss / d s)),    s = point(v)

v is what is searched for, and s where the loss is taken. They are one and the same in textual inversion. An attack that
wants whole tokens takes the nearest ones for s, or draws some, and moves v by the gradient at s (straight-through:
Bengio et al. 2013, arXiv 1308.3432, sec. 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from esd_jax import progress

AHEAD = 8  # steps that are queued on the device, so that what is shown is what is done


class State(NamedTuple):
    """What a search goes on from: the value that is searched for, any pytree of arrays, and the optimizer's state."""

    value: Any
    opt: Any


@dataclass(frozen=True, eq=False)
class Search:
    """A search, whose step is compiled once for all calls of the same shapes.

    `fixed` are the weights and whatever else all cases have in common; `case` is a case's own: its images, its
    prompts' ids, the key of its draws.

    batch: (now, fixed, case) -> the random batch of a step. now: the step's part of `inputs`, as a rule its number.
    loss: (point, batch, fixed) -> a scalar.
    tx: the optimizer.
    point: (value, batch, fixed) -> where the loss is taken; by default the value itself.
    after: (value, fixed) -> the value after an update; by default as it is.
    several: whether several cases are searched at once, each as if it were alone. Then all arrays of the state and of
      `case` have a leading axis for them.
    """

    batch: Callable[[Any, Any, Any], Any]
    loss: Callable[[Any, Any, Any], Float[Array, ""]]
    tx: optax.GradientTransformation
    point: Callable[[Any, Any, Any], Any] = lambda value, batch, fixed: value
    after: Callable[[Any, Any], Any] = lambda value, fixed: value
    several: bool = False

    def begin(self, value: Any) -> State:
        """The state before the first step."""
        return State(value, (jax.vmap(self.tx.init) if self.several else self.tx.init)(value))

    def run(self, state: State, inputs: Any, fixed: Any, case: Any) -> tuple[State, Float[Array, "*cases steps"]]:
        """Makes a step for each row of `inputs`, which are numpy arrays. Returns the new state and the losses."""
        state, losses = self._steps(state, inputs, fixed, case)
        return state, jnp.moveaxis(losses, 0, -1)

    def rounds(
        self, state: State, inputs: Any, every: int, evaluate: Callable[[Any], Any], fixed: Any, case: Any
    ) -> tuple[Any, Float[Array, "cases rounds every"]]:
        """Makes the steps of several cases, and evaluates the value every `every` steps.

        evaluate: value -> arrays [cases, ...]. Returns these, stacked as [cases, rounds, ...], and the losses.
        """
        rounds = []
        for first in range(0, len(jax.tree.leaves(inputs)[0]), every):
            part = jax.tree.map(lambda a, first=first: a[first : first + every], inputs)
            state, losses = self.run(state, part, fixed, case)
            rounds.append((evaluate(state.value), losses))
        return jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *rounds)

    @cached_property
    def _steps(self) -> Callable[..., tuple[State, Array]]:
        return repeated(jax.vmap(self._step, in_axes=(0, None, None, 0)) if self.several else self._step)

    def _step(self, state: State, now: Any, fixed: Any, case: Any) -> tuple[State, Float[Array, ""]]:
        value, opt = state
        batch = self.batch(now, fixed, case)
        loss, grads = jax.value_and_grad(self.loss)(self.point(value, batch, fixed), batch, fixed)
        updates, opt = self.tx.update(grads, opt, value)
        return State(self.after(optax.apply_updates(value, updates), fixed), opt), loss


def repeated(step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """`lax.scan` as a loop of the host, for steps that take gradients.

    XLA on a CPU takes 2.3 times as long for a gradient of the embedded UNet in a scan's body as outside of one. On an
    accelerator steps are queued and nothing waits for the host.

    Args:
      step: (carry, input, *fixed) -> (carry, loss), compiled here, once for all calls of the same shapes.

    Returns a function (carry, inputs, *fixed) -> (carry, losses). The first axis of `inputs`, numpy arrays, is that of
    the steps, and so is that of `losses`.
    """
    compiled = jax.jit(step)

    def run(carry: Any, inputs: Any, *fixed: Any) -> tuple[Any, Any]:
        values, steps = [], len(jax.tree.leaves(inputs)[0])
        with progress.task("searching", steps, unit="steps") as task:
            for i in range(steps + AHEAD):
                if i < steps:
                    carry, value = compiled(carry, jax.tree.map(lambda a, i=i: a[i], inputs), *fixed)
                    values.append(value)
                if i >= AHEAD:
                    task.advance(note=f"loss {np.mean(values[i - AHEAD]):.4g}")  # waits for that step alone
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *values)

    return run
