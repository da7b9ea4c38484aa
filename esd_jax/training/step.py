"""The training step, one for every method.

    student = {**frozen, **theta}        teacher = {**frozen, **theta_0}

share all frozen buffers; only the trained leaves exist twice (thrice where a method keeps the student's average). theta
and its optimizer keep full precision and are cast to the compute dtype once per step, outside the sampling loop.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from esd_jax import sharding
from esd_jax.erasing.method import Method, Models
from esd_jax.models import attention
from esd_jax.params import Params, cast, combine
from esd_jax.training.holding import holding


class State(NamedTuple):
    """All that changes in training; what a checkpoint holds. The keys of theta are "DENOISER/NAME".

    memory: what a method keeps from update to update, arrays of [batch, accumulate, ...]; () if it keeps nothing.
    """

    theta: dict[str, Array]
    opt: Any
    step: Int[Array, ""]
    key: Array
    memory: Any = ()


class Metrics(NamedTuple):
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    t: Float[Array, ""]


@dataclass(frozen=True)
class Optimizer:
    """An optax optimizer by name, with constant learning rate after an optional linear warm-up, unless it decays.

    optimizer: "adam", "adamw" or "sgd".
    learning_rate: constant after the warm-up, or what the decay starts from.
    b1, b2, eps: of Adam and AdamW.
    weight_decay: of AdamW.
    warmup_steps: updates over which the learning rate grows linearly from zero.
    max_grad_norm: gradients are scaled down to this global norm; without one, never.
    decay_steps: updates after the warm-up over which the learning rate falls; 0: it stays.
    decay_to: the part of the learning rate that is left after these.
    decay: "cosine" or "linear".
    hold: where a gradient leads further away from the base's weights, how much of that part is taken out, 0 (nothing)
      to 1 (all of it); AEGIS adapts it, here it is fixed (`training.holding`).

    Raises ValueError for an unknown optimizer, or a number that does not go with it.
    """

    optimizer: str = "adam"
    learning_rate: float = 1e-5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    decay_steps: int = 0
    decay_to: float = 0.1
    decay: str = "cosine"
    hold: float = 0.0

    def __post_init__(self):
        if self.optimizer not in ("adam", "adamw", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r} is unknown; choose one of adam, adamw, sgd")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(f"weight_decay={self.weight_decay} needs optimizer='adamw'")
        if self.decay_steps < 0 or not 0 <= self.decay_to <= 1:
            raise ValueError(f"decay_steps={self.decay_steps} must be at least 0, and decay_to={self.decay_to} in 0..1")
        if self.decay not in ("cosine", "linear"):
            raise ValueError(f"decay={self.decay!r} is unknown; choose cosine or linear")
        for name in ("b1", "b2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")
        for name in ("weight_decay", "warmup_steps"):
            if not (value := getattr(self, name)) >= 0:  # nor NaN
                raise ValueError(f"{name}={value} must be at least 0")
        if not self.eps > 0:
            raise ValueError(f"eps={self.eps} must be positive")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be positive; leave it out for none")
        if not 0 <= self.hold <= 1:
            raise ValueError(f"hold={self.hold} must be in 0..1")

    def rate(self) -> Any:
        """The learning rate: a number, or a function of how many updates were made."""
        rate: Any = self.learning_rate
        if self.decay_steps and self.decay == "cosine":
            rate = optax.cosine_decay_schedule(rate, self.decay_steps, self.decay_to)
        elif self.decay_steps:
            rate = optax.linear_schedule(rate, rate * self.decay_to, self.decay_steps)
        if not self.warmup_steps:
            return rate
        growing = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([growing, rate], [self.warmup_steps]) if self.decay_steps else growing

    def transformation(self) -> optax.GradientTransformation:
        """The optax transformation."""
        rate = self.rate()
        moments: dict[str, Any] = {"b1": self.b1, "b2": self.b2, "eps": self.eps}
        tx = {
            "adam": lambda: optax.adam(rate, **moments),
            "adamw": lambda: optax.adamw(rate, **moments, weight_decay=self.weight_decay),
            "sgd": lambda: optax.sgd(rate),
        }[self.optimizer]()
        if self.max_grad_norm is not None:
            tx = optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)
        return holding(tx, self.hold)


class Averaged(NamedTuple):
    """An optimizer's state, and the moving average of what it trains."""

    inner: Any
    average: Params


def averaging(tx: optax.GradientTransformation, decay: float | None) -> optax.GradientTransformation:
    """`tx`, keeping an exponential moving average of the weights after each update; `tx` itself if `decay` is None."""
    if decay is None:
        return tx

    def init(params: Any) -> Averaged:
        return Averaged(tx.init(params), jax.tree.map(jnp.copy, params))  # its own buffers, since a step donates both

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Averaged]:
        updates, inner = tx.update(updates, state.inner, params)
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, new)
        return updates, Averaged(inner, average)

    return optax.GradientTransformation(init, update)


def result(state: State) -> Params:
    """A run's result so far: the average where one is kept, else theta."""
    return state.opt.average if isinstance(state.opt, Averaged) else state.theta


def init_state(theta: Mapping[str, Array], tx: optax.GradientTransformation, seed: int, memory: Any = ()) -> State:
    """Step 0. theta is copied, since the step donates it. memory: `blank_memory`'s."""
    theta = {name: jnp.array(value) for name, value in theta.items()}
    return State(theta, tx.init(theta), jnp.zeros((), jnp.int32), jax.random.key(seed), memory)


def blank_memory(method: Method, shape: tuple[int, int, int], batch_size: int, accumulate: int = 1) -> Any:
    """What a method keeps from update to update, before the first; () for a method that keeps nothing."""
    one = method.memory(shape)
    return jax.tree.map(lambda spec: jnp.zeros((batch_size, accumulate, *spec.shape), spec.dtype), one)


def unchanged(theta: Params, theta_0: Params) -> Params:
    """The student's tensors where they themselves are trained."""
    return theta


def student(
    theta: Params,
    theta_0: Params,
    frozen: Params,
    *,
    compute_dtype: Any,
    weights: Callable[[Params, Params], Params] = unchanged,
) -> Params:
    """All tensors of the model in training, in the compute dtype; see `make_step`."""
    return combine(frozen, cast(weights(theta, theta_0), compute_dtype))


def make_step(
    method: Method,
    tx: optax.GradientTransformation,
    *,
    compute_dtype: Any,
    shape: tuple[int, int, int],
    batch_size: int = 1,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    weights: Callable[[Params, Params], Params] = unchanged,
) -> Callable[[State, Params, Params, Any], tuple[State, Metrics]]:
    """One jitted update: step(state, theta_0, frozen, inputs) -> (state, metrics). `state` is donated.

    Every draw is a function of (state.key, state.step, global example index), so the numbers are the same at any
    device count, and a resumed run repeats them. The step is compiled once: the timestep, the concepts, the seed, the
    guidance and the strength are all traced.

    Args:
      method: the functions of an erasing method.
      tx: the optimizer; `averaging`'s, if the method needs the average.
      compute_dtype: of the networks; theta is cast to it for each step.
      shape: of one example's latents (height, width, channel).
      batch_size: examples per evaluation; they share one timestep, so that one loop serves them all.
      accumulate: batches whose gradients are averaged before the update, each with its own timestep.
      mesh: what the batch is spread over, and the weights by `sharding.placement`.
      weights: (theta, theta_0) -> the student's tensors; by default they are what is trained.
    """

    # Attention is computed as is best where the step will run, which need not be this process's default device.
    traced_for = contextlib.nullcontext if mesh is None else partial(attention.on, mesh.devices.flat[0])

    view = partial(student, compute_dtype=compute_dtype, weights=weights)

    def gradients(state: State, theta_0: Params, frozen: Params, inputs: Any, index: Array, memory: Any) -> Any:
        # Draws of the micro-batch `index`; its examples have the global indices [index, index + 1) * batch_size.
        step_key = jax.random.fold_in(state.key, state.step)
        shared_key, examples_key = jax.random.split(step_key)
        keys = sharding.per_example_keys(examples_key, index * batch_size + jnp.arange(batch_size))
        draws = method.draw(state.step, jax.random.fold_in(shared_key, index), keys, shape, inputs)
        draws = sharding.split_batch(draws, mesh)
        average = view(state.opt.average, theta_0, frozen) if isinstance(state.opt, Averaged) else None
        models = Models(view(state.theta, theta_0, frozen), combine(frozen, theta_0), average)
        memory, draws = method.recall(models, draws, memory, state.step, inputs)
        batch = method.prepare(models, draws, inputs)
        if mesh is not None and not sharding.on_cpu(mesh):
            # Else XLA multiplies the teacher's and the student's activations with their common weights at once, and
            # holds those of both: 1 GiB more of SD 1.4. On CPUs it does not.
            batch = jax.lax.optimization_barrier(batch)

        def loss(theta: Params) -> Array:
            return method.loss(view(theta, theta_0, frozen), batch)

        value, grads = jax.value_and_grad(loss)(state.theta)
        return (value, grads, jnp.mean(draws.t)), memory

    def averaged(state: State, theta_0: Params, frozen: Params, inputs: Any) -> Any:
        if accumulate == 1:
            own = jax.tree.map(lambda a: a[:, 0], state.memory)
            gradient, own = gradients(state, theta_0, frozen, inputs, jnp.int32(0), own)
            return gradient, jax.tree.map(lambda a: a[:, None], own)
        memory = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), state.memory)
        first = jax.tree.map(lambda a: a[0], memory)
        zero, _ = jax.eval_shape(lambda: gradients(state, theta_0, frozen, inputs, jnp.int32(0), first))
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), zero)

        def add(total: Any, micro: tuple[Array, Any]) -> tuple[Any, Any]:
            gradient, own = gradients(state, theta_0, frozen, inputs, *micro)
            return jax.tree.map(jnp.add, total, gradient), own

        total, memory = jax.lax.scan(add, zero, (jnp.arange(accumulate), memory))
        return jax.tree.map(lambda a: a / accumulate, total), jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), memory)

    def step(state: State, theta_0: Params, frozen: Params, inputs: Any) -> tuple[State, Metrics]:
        with traced_for():
            (loss, grads, t), memory = averaged(state, theta_0, frozen, inputs)
        updates, opt = tx.update(grads, state.opt, state.theta)
        if (pace := method.pace(state.step)) is not None:
            updates = jax.tree.map(lambda a: (pace * a).astype(a.dtype), updates)
        theta: Any = optax.apply_updates(state.theta, updates)
        new = sharding.constrained(State(theta, opt, state.step + 1, state.key), mesh)
        new = new._replace(memory=sharding.split_batch(memory, mesh))
        return new, Metrics(loss, optax.tree.norm(grads), t)

    return jax.jit(step, donate_argnums=0)
