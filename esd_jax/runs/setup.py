"""All that a training step is made of, assembled once: for runs, plans, ahead-of-time compilation and benchmarks.

The source is a loaded base, or the shapes of one alone, of which nothing is known but its architecture.
"""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from esd_jax import families, lora, prompt_files, sharding
from esd_jax.diffusion import programs, samplers
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing import corpora
from esd_jax.erasing.concepts import Concept, check_concepts
from esd_jax.erasing.method import Method, Tools, with_guidance
from esd_jax.erasing.remaining import by_remainder
from esd_jax.erasing.retention import retaining
from esd_jax.families import Configs
from esd_jax.io.images import read_image, read_images
from esd_jax.params import Conditioning, Network, Params, num_scalars, partition, prefixed
from esd_jax.pipeline import Pipeline, image_size, network
from esd_jax.recipe import Recipe
from esd_jax.sampling import sample
from esd_jax.selection import select
from esd_jax.training.step import State, averaging, blank_memory, init_state, make_step, student, unchanged

SCORED_AT = 1.0  # a distilled network's guidance wherever methods compare outputs: that of the prompt alone
LARGE = 2_000_000_000  # scalars; SD 1 and 2 have 0.9e9, SDXL 2.6e9


class Unknown(ValueError):
    """A step cannot be determined from shapes alone, or not without a concept."""


@dataclass(frozen=True, eq=False)
class Shapes:
    """A base of which only the architecture is known."""

    configs: Configs
    schedule: Schedule


Source = Pipeline | Shapes
Make = Callable[[Tools, Sequence[Concept]], tuple[Any, Any]]


# The fields of recipes that may name files of prompts, and what reads them.
READERS: Mapping[str, Callable[[str], Any]] = {
    "retain": corpora.prompts,
    "anchor_prompts": partial(prompt_files.listed, name="anchor_prompts"),
}


def check_files(recipe: Recipe) -> None:
    """Raises OSError or ValueError for a file of images or prompts that a recipe names and that cannot be read."""
    for path in recipe.images or ():
        read_image(path)
    for field, read in READERS.items():
        if text := getattr(recipe.settings, field, None):
            read(text)


def files_of(recipe: Recipe) -> dict[str, Path]:
    """The files of prompts that a recipe names, by their fields. Raises FileNotFoundError for one that is not there."""
    texts = {field: getattr(recipe.settings, field, None) for field in READERS}
    named = {field: prompt_files.file_of(text, field) for field, text in texts.items() if text}
    return {field: file for field, file in named.items() if file}


@dataclass(frozen=True, eq=False)
class Setup:
    """A recipe over a source.

    component: the denoiser's name, the first part of its tensors' names in a run.
    names: the tensors that the recipe changes. shape: of one example's latents (height, width, channel).
    method, inputs: the erasing method, and what of it is traced. tx: the optimizer.
    step: the jitted update (`training.step.make_step`). mesh: what it is spread over.
    student: (theta, theta_0, frozen) -> all tensors of the model in training, in the compute dtype.
    """

    recipe: Recipe
    component: str
    names: tuple[str, ...]
    shape: tuple[int, int, int]
    method: Method
    inputs: Any
    tx: optax.GradientTransformation
    step: Callable[[State, Params, Params, Any], Any]
    mesh: Mesh
    student: Callable[[Params, Params, Params], Params]

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(theta_0, frozen) of the denoiser's tensors, which may be shapes."""
        changed, frozen = partition(params, self.names)
        return prefixed(changed, self.component), prefixed(frozen, self.component)

    def memory(self) -> Any:
        """What the method keeps from update to update, before the first."""
        training = self.recipe.training
        return blank_memory(self.method, self.shape, training.batch_size, training.accumulate)

    def begin(self, theta: Mapping[str, Array], memory: bool = True) -> State:
        """The state before the first update, on no particular device. theta: what is trained."""
        return init_state(theta, self.tx, self.recipe.training.seed, self.memory() if memory else ())


def assemble(
    source: Source,
    recipe: Recipe,
    mesh: Mesh | None = None,
    make: Make | None = None,
    tools: Tools | None = None,
) -> Setup:
    """Assembles a recipe over a source.

    Args:
      source: a base, or shapes.
      recipe: of shapes, its base is not read, and its concept may be empty.
      mesh: where the tensors will lie; by default as many of the devices here as share the batch.
      make: in place of the method's own `make`. tools: in place of `make_tools`'.

    Raises:
      ValueError: a family that does not meet the method's needs, a concept that is too long, ...
      Unknown: of shapes, a method that reads a checkpoint before the first update, or needs a concept.
    """
    family, training = families.of(source.configs), recipe.training
    mesh = sharding.make_mesh(training.batch_size, fsdp=recipe.fsdp) if mesh is None else mesh
    family.require(recipe.settings.needs, f"method {recipe.method!r}")
    tools = tools or make_tools(source, recipe, mesh)
    if recipe.images is None:
        check_drawing(recipe.settings, tools.schedule)
    concepts = recipe.concepts if recipe.concepts or isinstance(source, Pipeline) else (Concept("concept"),)
    if isinstance(source, Pipeline):
        check_concepts(tools.tokens, concepts)
    try:
        method, inputs = (make or recipe.settings.make)(tools, concepts)
    except ValueError as error:
        if recipe.concepts:
            raise
        raise Unknown(f"{error} (no concept is given)") from error
    if recipe.settings.trained:
        if recipe.remaining_every:
            method = by_remainder(method, inputs, tools, recipe.remaining_every)
        method, inputs = retaining(method, inputs, tools, concepts, recipe.retention)
    tx = transformation(recipe)
    compute = compute_dtype(source, recipe)
    batches = {"batch_size": training.batch_size, "accumulate": training.accumulate}
    weights = lora.factored if recipe.rank else unchanged
    step = make_step(method, tx, shape=tools.shape, mesh=mesh, compute_dtype=compute, weights=weights, **batches)
    names = changed_names(recipe, source.configs)
    whole = jax.jit(partial(student, compute_dtype=compute, weights=lora.weights if recipe.rank else unchanged))
    return Setup(recipe, family.denoiser, names, tools.shape, method, inputs, tx, step, mesh, whole)


def check_drawing(settings: Any, schedule: Schedule) -> None:
    """Raises ValueError, naming the field, if a method that draws images cannot draw them along a schedule."""
    if (name := getattr(settings, "drawing_sampler", None)) is None:
        return
    try:
        samplers.make_sampler(schedule, name, num_steps=settings.drawing_steps)
    except ValueError as error:
        message = str(error).replace(f"sampler {name!r}", f"drawing_sampler={name!r}")
        raise ValueError(message.replace("num_steps", "drawing_steps")) from error


def compute_dtype(source: Source, recipe: Recipe) -> jnp.dtype:
    """The dtype of a base's networks; of shapes, the recipe's."""
    return jnp.dtype(source.dtype if isinstance(source, Pipeline) else recipe.dtype)


def make_tools(source: Source, recipe: Recipe, mesh: Mesh) -> Tools:
    """What a method may use of a source; of shapes, zeros in place of encoded prompts and images, and no weights."""
    family, configs = families.of(source.configs), source.configs
    size, config = image_size(configs, recipe.height, recipe.width), configs[family.denoiser]
    shape = family.latents(configs, size)
    net = network(config, compute_dtype(source, recipe).name, recomputes(recipe, config))
    scored = partial(with_guidance, guide=family.guide, scale=getattr(recipe.settings, "train_guidance", SCORED_AT))
    if isinstance(source, Pipeline):
        own = _of_base(source, recipe, size, scored)
    else:
        own = _of_shapes(source, recipe, shape)
    return Tools(
        denoiser=sharding.gathering(net, mesh),
        component=family.denoiser,
        schedule=family.at_size(configs, source.schedule, size),
        shape=shape,
        subset=select(recipe.subset, net.layouts, family.subsets),
        condition=lambda outputs: scored(family.encode(configs, outputs, size)),
        null=family.null,
        vectors=family.vectors,
        guide=family.guide,
        readings=family.readings,
        tables=family.tables,
        **own,
    )


def _of_base(
    base: Pipeline, recipe: Recipe, size: tuple[int, int], scored: Callable[[Conditioning], Conditioning]
) -> dict[str, Any]:
    to_latents = programs.encoder(base.network("vae"), base.configs["vae"])

    def encode(prompts: Sequence[str]) -> Conditioning:
        encoded = scored(base.encode_prompts(prompts, size=size, strict=True))
        return encoded if recipe.null == "empty" else base.family.null(encoded, np.asarray([not p for p in prompts]))

    def draw(prompts: Sequence[str], *, sampler: str | None = None, **options: Any) -> np.ndarray:
        return sample(base, prompts, height=size[0], width=size[1], sampler=sampler or "auto", **options)

    return {
        "encode": encode,
        "tokens": base.tokenizers[0],
        "sample": draw,
        "to_latents": lambda images: to_latents(base.params["vae"], images),
        "images": None if recipe.images is None else base.encode(read_images(recipe.images, size)),
        "params": base.params,
        "text_encoders": {name: base.network(name) for name in base.text_encoders},
        "tokenizers": dict(zip(base.text_encoders, base.tokenizers, strict=True)),
        "cache": True,
    }


def _of_shapes(source: Shapes, recipe: Recipe, shape: tuple[int, int, int]) -> dict[str, Any]:
    family, configs = families.of(source.configs), source.configs
    tokenizers = {name: partial(_ids, length=n) for name, n in family.lengths(configs).items() if name in configs}

    def encode(prompts: Sequence[str]) -> Conditioning:
        encoded = family.encoded(configs, len(prompts), jnp.dtype(recipe.dtype))
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), encoded)

    def draw(prompts: Sequence[str], **_: Any) -> np.ndarray:
        return np.zeros((len(prompts), *shape[:2], 3), np.uint8)  # a pixel a latent: of true size they take seconds

    def absent(*_: Any, **__: Any) -> Any:
        what = f"method {recipe.method!r} uses a checkpoint's weights before its first step"
        raise Unknown(f"{what}, so that its step is not known from shapes alone")

    class Absent(Mapping):
        __getitem__ = __iter__ = __len__ = absent

    return {
        "encode": encode,
        "tokens": tokenizers[family.text_encoders[0]],
        "sample": draw,
        "to_latents": lambda images: jnp.zeros((len(images), *shape)),
        "images": None if recipe.images is None else jnp.zeros((len(recipe.images), *shape)),
        "params": Absent(),
        "text_encoders": Absent(),
        "tokenizers": tokenizers,
    }


def _ids(prompts: Sequence[str], length: int, **_: Any) -> np.ndarray:
    """Ids in place of a tokenizer's, [prompts, length], the same for the same words; 0 starts, 1 ends and pads."""
    ids = np.ones((len(prompts), length), np.int32)
    ids[:, 0] = 0
    for row, prompt in zip(ids, prompts, strict=True):
        words = re.findall(r"\w+|[^\w\s]", prompt.lower())[: length - 2]
        row[1 : 1 + len(words)] = [2 + zlib.crc32(word.encode()) % 1_000_000 for word in words]
    return ids


def transformation(recipe: Recipe) -> optax.GradientTransformation:
    """The optimizer of a recipe, averaging if its method wants that; of a closed form, one without state."""
    if not recipe.settings.trained:
        return optax.identity()
    return averaging(recipe.optimizer.transformation(), recipe.settings.ema)


def recomputes(recipe: Recipe, denoiser: Any) -> bool:
    """Whether the backward pass recomputes activations: if the recipe asks for it, and for a network of SDXL's size."""
    # At 1024 px in bfloat16 the activations would take 12 GiB, and everything else 11; recomputing costs one forward
    # pass, of about 50 in a step of ESD.
    return recipe.remat or num_scalars(network(denoiser, "float32").shapes) >= LARGE


def denoiser_of(configs: Configs, dtype: str = "float32") -> Network:
    """The network that a recipe trains, as a function."""
    return network(configs[families.of(configs).denoiser], dtype)


def changed_names(recipe: Recipe, configs: Configs) -> tuple[str, ...]:
    """The tensors of the denoiser that a recipe changes."""
    net = denoiser_of(configs)
    names = select(recipe.subset, net.layouts, families.of(configs).subsets)
    return lora.adaptable(names, net.shapes) if recipe.rank else names


def theta_shapes(recipe: Recipe, configs: Configs) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What a recipe trains, float32: the tensors that it changes, or the factors of their change."""
    net, component = denoiser_of(configs), families.of(configs).denoiser
    changed = prefixed({name: net.shapes[name] for name in changed_names(recipe, configs)}, component)
    if recipe.rank:
        changed = jax.eval_shape(lambda: lora.initial(changed, recipe.rank, jax.random.key(0)))
    return {name: jax.ShapeDtypeStruct(s.shape, jnp.float32) for name, s in changed.items()}


def saved_state(recipe: Recipe, configs: Configs) -> State:
    """What a checkpoint of a run holds, as shapes, without what the method keeps from update to update."""
    tx, seed = transformation(recipe), recipe.training.seed
    return jax.eval_shape(lambda theta: init_state(theta, tx, seed), theta_shapes(recipe, configs))
