"""A step and its arguments as shapes: nothing is allocated, and no weights are read."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esd_jax import sharding
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing.method import Method, Scored, squared_error
from esd_jax.families import Configs
from esd_jax.params import Conditioning, Network
from esd_jax.recipe import Recipe
from esd_jax.runs.setup import Shapes, assemble, denoiser_of, theta_shapes


@dataclass(frozen=True, eq=False)
class Student(Method):
    """What the step of every method has: the student's prediction of each example, and its gradient.

    prompt: a batch of one.
    """

    denoiser: Network
    prompt: Conditioning

    def draw(self, step: Any, key: Any, example_keys: Any, shape: tuple[int, ...], inputs: Any) -> Scored:
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(example_keys)
        prompts = jax.tree.map(lambda a: jnp.repeat(a, len(noise), axis=0), self.prompt)
        return Scored(noise, jnp.float32(0), prompts, noise)

    def prepare(self, models: Any, draws: Scored, inputs: Any) -> Scored:
        return draws

    def loss(self, student: Any, batch: Scored) -> Any:
        return squared_error(self.denoiser, student, batch)


def abstract(
    configs: Configs, schedule: Schedule, recipe: Recipe, mesh: Mesh, student_alone: bool = False
) -> tuple[Any, tuple]:
    """(the jitted step, its arguments as shapes placed on the mesh): `step.lower(*arguments)` traces it.

    The arguments are those of a run: the state, the first values of what is changed, the rest, and the method's inputs.

    student_alone: in place of the method, what the steps of all methods have.

    Raises ValueError for a method without steps, and `setup.Unknown` for one that reads a checkpoint before the
    first, or that needs a concept.
    """
    if not recipe.settings.trained:
        raise ValueError(f"method {recipe.method!r} solves for its result: there is no step to compile")
    make = (lambda tools, concepts: (Student(tools.denoiser, tools.encode([""])), ())) if student_alone else None
    setup = assemble(Shapes(configs, schedule), recipe, mesh, make)
    dtype = jnp.dtype(recipe.dtype)
    shapes = {name: jax.ShapeDtypeStruct(s.shape, dtype) for name, s in denoiser_of(configs).shapes.items()}
    state = jax.eval_shape(setup.begin, theta_shapes(recipe, configs))
    arguments = (state, *setup.split(shapes), setup.inputs)
    first, *others = sharding.placements(arguments, mesh)
    # What is kept of each example lies where the example does.
    spread = sharding.by_example(mesh)
    placed = (first._replace(memory=jax.tree.map(lambda _: spread, state.memory)), *others)
    return setup.step, jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), arguments, placed)
