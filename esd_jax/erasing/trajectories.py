"""x_t that a model samples itself: how many sampler steps lead to it, and at which timestep it is scored."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from esd_jax.diffusion import samplers
from esd_jax.diffusion.samplers import Sampler
from esd_jax.diffusion.schedule import Schedule


class Draws(NamedTuple):
    """Everything random in one step. `index` and `t` are shared by the batch, so that one loop serves all of it."""

    index: Int[Array, ""]
    t: Float[Array, ""]
    concept: Int[Array, " batch"]
    noise: Float[Array, "batch height width channel"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """How x_t and its scoring timestep follow from one drawn index, as tables over the index (0 .. S-1).

    support: the indices that are drawn, uniformly.
    num_updates: sampler steps that lead to x_t.
    t_low, t_high: the scoring timestep is uniform in this range, both ends included.
    """

    sampler: Sampler
    support: Int[np.ndarray, " drawn"]
    num_updates: Int[np.ndarray, " index"]
    t_low: Real[np.ndarray, " index"]
    t_high: Real[np.ndarray, " index"]

    def draw(self, key: Array) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """An index and its timestep."""
        index_key, t_key = jax.random.split(key)
        index = jnp.asarray(self.support)[jax.random.randint(index_key, (), 0, len(self.support))]
        low, high = jnp.asarray(self.t_low)[index], jnp.asarray(self.t_high)[index]
        return index, low + jnp.floor(jax.random.uniform(t_key) * (high - low + 1))

    def draw_batch(self, key: Array, example_keys: Array, shape: tuple[int, ...], concepts: int) -> Draws:
        """Index and timestep from `key`; one of so many concepts, and noise of a shape, from each example's own key."""

        def example(key: Array) -> tuple[Array, Array]:
            concept, noise = jax.random.split(key)
            return jax.random.randint(concept, (), 0, concepts), jax.random.normal(noise, shape)

        return Draws(*self.draw(key), *jax.vmap(example)(example_keys))

    def run(
        self,
        denoise: Callable[..., Any],
        noise: Float[Array, "batch height width channel"],
        index: Int[Array, ""],
        memory: Any = None,
        scale: bool = True,
    ) -> Float[Array, "batch height width channel"]:
        """x_t from unit Gaussian noise: as the network takes it, or, without `scale`, as the sampler keeps it.

        `denoise` and `memory`: as in `samplers.run`.
        """
        sampler, updates = self.sampler, jnp.asarray(self.num_updates)[index]
        x = samplers.run(sampler, denoise, noise * sampler.initial_scale, stop=updates, memory=memory)
        return self.scaled(x, updates) if scale else x

    def scaled(self, x: Array, updates: Array | int) -> Array:
        """x after so many sampler steps, as the network takes it."""
        # Euler and LMS keep x at unit signal; the network is scored on what it was trained on, unit variance. Only
        # DDIM's trajectories run to the end of the table, and its scale is 1 throughout.
        last = len(self.sampler.input_scale) - 1
        return x * jnp.asarray(self.sampler.input_scale, x.dtype)[jnp.minimum(updates, last)]

    def first(self, window: float, steps: int) -> "Trajectory":
        """This trajectory, of which only points after fewer updates than that part of so many steps are drawn.

        Raises ValueError where none is left.
        """
        kept = self.num_updates[self.support] < window * steps
        if not kept.any():
            raise ValueError(f"window={window} leaves none of {steps} sampler steps to learn from")
        return replace(self, support=self.support[kept])

    @property
    def mean_updates(self) -> float:
        """Sampler steps, on average over what is drawn."""
        return float(np.mean(self.num_updates[self.support]))

    @property
    def most_updates(self) -> int:
        """Sampler steps to the last x_t that may be drawn."""
        return int(np.max(self.num_updates[self.support]))

    @property
    def scored_where_sampled(self) -> bool:
        """Whether every x_t is scored at the timestep at which the sampler evaluates it."""
        low, high, updates = (table[self.support] for table in (self.t_low, self.t_high, self.num_updates))
        timesteps = np.asarray(self.sampler.timesteps)
        return bool(np.all(low == high) and np.max(updates) < len(timesteps) and np.all(timesteps[updates] == low))


MODES = ("compvis", "grid", "alt1000")  # see ESD's `timestep_mode`


def of_mode(schedule: Schedule, mode: str, sampler: str, steps: int) -> Trajectory:
    """The whole trajectory of one of `MODES`. Raises ValueError where it does not go with the sampler or its steps."""
    if mode == "grid":
        return on_grid(schedule, sampler, steps)
    solver, index, total = deterministic(schedule, sampler, steps), np.arange(steps), schedule.num_train_timesteps
    if sampler != "ddim" or total % steps:
        raise ValueError(
            f"timestep_mode={mode!r} needs sampler='ddim' and a sampling_steps that divides {total}, "
            f"not {sampler!r} and {steps}; timestep_mode='grid' takes any"
        )
    if steps < (least := {"compvis": 2, "alt1000": 3}[mode]):
        raise ValueError(f"sampling_steps={steps} is too few for timestep_mode={mode!r}: it needs at least {least}")
    stride = total // steps
    if mode == "compvis":
        # Its sampler drops the noisiest entry of the grid, and its "stop after k" test never fires for k = 0.
        updates = np.minimum(steps - index, steps - 1)
        return Trajectory(samplers.drop_first(solver), index, updates, stride * index, stride * (index + 1) - 1)
    # alt1000 reads the grid of a 1000-step schedule; its indices 0 and S - 1 are never drawn.
    t = total - stride * index
    return Trajectory(solver, index[1:-1], index, t, t)


def on_grid(schedule: Schedule, sampler: str, steps: int) -> Trajectory:
    """x_t after 0 .. steps - 1 updates of any deterministic sampler, scored at its own timestep.

    Raises ValueError for a sampler that draws noise at every step.
    """
    solver = deterministic(schedule, sampler, steps)
    index, t = np.arange(steps), np.asarray(solver.timesteps[:steps])
    return Trajectory(solver, index, index, t, t)


def deterministic(schedule: Schedule, name: str, steps: int) -> Sampler:
    """A sampler of `samplers.SAMPLERS`. Raises ValueError for one with noise, or several calls, at every step."""
    try:
        result = samplers.make_sampler(schedule, name, steps, spacing=_spacing(schedule, name))
    except ValueError as error:
        raise ValueError(str(error).replace("num_steps", "sampling_steps")) from error
    if result.stochastic:
        raise ValueError(f"sampler {result.name!r} draws noise at every step, which is not implemented; use 'ddim'")
    if result.name == "heun":  # half of its x are no samples, but what a step tries first
        raise ValueError(
            f"sampler {result.name!r} calls the network twice a step, which is not implemented; use 'ddim'"
        )
    return result


def _spacing(schedule: Schedule, name: str) -> str | None:
    """The spacing of a trajectory's timesteps, where it is not the config's.

    A checkpoint that was saved with Euler, LMS or DPM-Solver++ carries their class default, "linspace", along. Methods
    train on DDIM's and PNDM's own grids: the update is the same, whichever scheduler a checkpoint was saved with.
    """
    own, of_class = samplers.own_sampler(schedule), schedule.config["_class_name"]
    linspace = own not in (*samplers.LEADING, "lcm") and of_class != "TCDScheduler"  # the class default
    carried = linspace and schedule.option("timestep_spacing", "leading") == "linspace"
    return "leading" if carried and name in ("plms", *samplers.LEADING) else None
