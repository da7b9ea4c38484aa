"""A run as shapes, without memory: what it changes and trains, and its step with everything that the step is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from esd_jax import lora, sharding
from esd_jax.methods.concepts import Concept
from esd_jax.methods.method import Scored, Tools, squared_error
from esd_jax.methods.preservation import preserving
from esd_jax.models.unet import Conditioning
from esd_jax.models.unet_config import UNetConfig
from esd_jax.params import Network, Params, num_scalars, partition, prefixed
from esd_jax.pipeline import NetworkConfig, image_size, network
from esd_jax.selection import select
from esd_jax.training.step import averaging, blank_memory, init_state, make_step, unchanged

LARGE = 2_000_000_000  # scalars; SD 1 and 2 have 0.9e9, SDXL 2.6e9


class Unknown(ValueError):
    """A step cannot be told from shapes alone, or not without a concept."""


@dataclass(frozen=True, eq=False)
class Student:
    """What the step of every method has: the student's prediction of each example, and its gradient.

    said: the prompt, a batch of one.
    """

    unet: Network
    said: Conditioning

    def draw(self, step: Any, key: Any, example_keys: Any, shape: tuple[int, ...], inputs: Any) -> Scored:
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(example_keys)
        said = jax.tree.map(lambda a: jnp.repeat(a, len(noise), axis=0), self.said)
        return Scored(noise, jnp.float32(0), said, noise)

    def prepare(self, models: Any, draws: Scored, inputs: Any) -> Scored:
        return draws

    def loss(self, student: Any, batch: Scored) -> Any:
        return squared_error(self.unet, student, batch)


def recomputes(recipe: Any, unet: UNetConfig) -> bool:
    """Whether the backward pass recomputes activations: where the recipe says so, and for a UNet of SDXL's size."""
    # At 1024 px in bfloat16 the activations would take 12 GiB, and everything else 11; recomputing costs one forward
    # pass, of about 50 in a step of ESD.
    return recipe.remat or num_scalars(network(unet, "float32").shapes) >= LARGE


def changed_names(recipe: Any, net: Network) -> tuple[str, ...]:
    """The tensors that a recipe changes."""
    names = select(recipe.subset, net.layouts)
    return lora.adaptable(names, net.shapes) if recipe.rank else names


def theta_shapes(recipe: Any, net: Network) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What a recipe trains, "unet/NAME": the tensors that it changes, or the factors of their change."""
    changed = prefixed({name: net.shapes[name] for name in changed_names(recipe, net)}, "unet")
    if not recipe.rank:
        return changed
    return jax.eval_shape(lambda: lora.initial(changed, recipe.rank, jax.random.key(0)))


def conditioning(configs: Mapping[str, NetworkConfig], batch: int, dtype: Any = jnp.float32) -> Conditioning:
    """The shapes of so many encoded prompts."""
    unet, length = configs["unet"], configs["text_encoder"].max_position_embeddings
    embeddings = jax.ShapeDtypeStruct((batch, length, max(unet.contexts)), dtype)
    if not unet.addition_embed_type:
        return Conditioning(embeddings)
    pooled = jax.ShapeDtypeStruct((batch, configs["text_encoder_2"].projection_dim), dtype)
    return Conditioning(embeddings, pooled, jax.ShapeDtypeStruct((batch, 6), jnp.float32))


def abstract(
    configs: Mapping[str, NetworkConfig], schedule: Any, recipe: Any, mesh: Mesh, student_alone: bool = False
) -> tuple[Any, tuple]:
    """(the jitted step, its arguments as shapes placed on the mesh): `step.lower(*arguments)` traces it.

    The arguments are those of a run: the state, the first values of what is changed, the rest, and the method's inputs.

    student_alone: in place of the method, what the steps of all methods have.

    Raises ValueError for a method without steps, and Unknown for one that looks at a checkpoint before the first, or
    that needs to be given a concept.
    """
    settings, unet, dtype = recipe.settings, configs["unet"], jnp.dtype(recipe.dtype)
    if not settings.trained:
        raise ValueError(f"method {recipe.method!r} solves for its result: there is no step to compile")
    net = network(unet, dtype.name, recomputes(recipe, unet))
    names, theta = changed_names(recipe, net), theta_shapes(recipe, net)
    params = {name: jax.ShapeDtypeStruct(s.shape, dtype) for name, s in net.shapes.items()}
    theta_0, frozen = (prefixed(part, "unet") for part in partition(params, names))

    tools = _tools(configs, schedule, recipe, names, mesh)
    concepts = recipe.concepts or (Concept("concept"),)
    if student_alone:
        method, inputs = Student(tools.unet, tools.encode([""])), ()
    else:
        try:
            method, inputs = settings.make(tools, concepts)
        except ValueError as error:
            if recipe.concepts:
                raise
            raise Unknown(f"{error} (no concept is given)") from error
    method, inputs = preserving(method, inputs, tools, concepts, recipe.preserve_weight)
    tx = averaging(recipe.optimizer.transformation(), settings.ema)
    step = make_step(
        method,
        tx,
        compute_dtype=dtype,
        shape=tools.shape,
        batch_size=recipe.training.batch_size,
        accumulate=recipe.training.accumulate,
        mesh=mesh,
        weights=lora.weights if recipe.rank else unchanged,
    )
    theta = {name: jax.ShapeDtypeStruct(s.shape, jnp.float32) for name, s in theta.items()}
    batch, accumulate = recipe.training.batch_size, recipe.training.accumulate

    def begin(theta: Params) -> Any:
        return init_state(theta, tx, recipe.training.seed, blank_memory(method, tools.shape, batch, accumulate))

    state = jax.eval_shape(begin, theta)
    arguments = (state, theta_0, frozen, inputs)
    first, *others = sharding.placements(arguments, mesh)
    # What is kept of each example lies where the example does.
    spread = NamedSharding(mesh, PartitionSpec(sharding.AXES))
    placed = (first._replace(memory=jax.tree.map(lambda _: spread, state.memory)), *others)
    return step, jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), arguments, placed)


def _tools(configs: Mapping[str, NetworkConfig], schedule: Any, recipe: Any, names: Sequence[str], mesh: Mesh) -> Tools:
    """What `runs.prepare` gives a method, with zeros for all that would take weights."""
    unet, factor = configs["unet"], configs["vae"].factor
    size = image_size(configs, recipe.height, recipe.width)
    shape = (size[0] // factor, size[1] // factor, unet.in_channels)
    length = configs["text_encoder"].max_position_embeddings

    def encode(prompts: Sequence[str]) -> Conditioning:
        said = conditioning(configs, len(prompts), jnp.dtype(recipe.dtype))
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), said)

    def absent(*_: Any, **__: Any) -> Any:
        what = f"method {recipe.method!r} uses a checkpoint's weights before its first step"
        raise Unknown(f"{what}, so that its step is not known from shapes alone")

    class Absent(Mapping):
        __getitem__ = __iter__ = __len__ = absent

    images = None if recipe.images is None else jnp.zeros((len(recipe.images), *shape))
    return Tools(
        unet=sharding.gathering(network(unet, recipe.dtype, recomputes(recipe, unet)), mesh),
        schedule=schedule,
        shape=shape,
        subset=tuple(names),
        encode=encode,
        tokens=lambda prompts, **_: np.zeros((len(prompts), length), np.int32),
        sample=absent,
        to_latents=absent,
        images=images,
        params=Absent(),
        text_encoders=Absent(),
    )
