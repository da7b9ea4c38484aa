"""Losses that hold the student to the base where nothing should change, beside any trained method; no paper's alone.

    weight mean (e_theta(x_t, r) - e*(x_t, r))^2,    x_t a noised image that the base drew of a preserved prompt r
    empty  mean (e_theta(x_t, "") - e*(x_t, ""))^2,  x_t such an image; without images, the method's own

With images the sum of both is taken at one image for each example, which is asked "" with probability
empty / (weight + empty), at half the cost. `preservation` samples x_t of the first along
trajectories instead, which costs more. The second is All but One's penalty (Hong et al. 2024), for any method. Prompts
whose predictions have drifted most may be drawn more often, as AGE (Bui et al. 2025, arXiv 2501.18950) chooses what to
preserve, here without a gradient:

    d(r) = mean (e_theta(x_t, r) - e*(x_t, r))^2,    half of the draws from the quarter of the prompts with the most
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.concepts import Bank, Concept, make_bank
from esd_jax.erasing.images import sampled
from esd_jax.erasing.method import Method, Models, Tools, denoise
from esd_jax.erasing.preservation import preserving
from esd_jax.erasing.terms import Point, Term, added
from esd_jax.params import Conditioning, Network, shape_of

AT_ONCE = 8  # prompts scored
STEPS, GUIDANCE = 20, 3.0  # of the images
HIGH = 0.85  # part of the schedule from which half of the timesteps are drawn: there a prompt decides most
SCORED_AT = (0.5, 0.9)  # parts of the schedule at which the drift is measured


@dataclass(frozen=True)
class Retention:
    """What is held to the base; the fields of a recipe that are called preserve_*.

    weight: of the preserved prompts. images: of each, drawn by the base; 0: trajectories in their place.
    empty: weight of the empty prompt. worst_every: updates from one scoring of the prompts to the next; 0: none.

    Raises ValueError for a number out of range.
    """

    weight: float = 1.0
    images: int = 0
    empty: float = 0.0
    worst_every: int = 0

    def __post_init__(self):
        for name in ("weight", "images", "empty", "worst_every"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"preserve_{name}={value} must be at least 0")
        if self.worst_every and not self.images:
            raise ValueError(
                f"preserve_worst_every={self.worst_every} scores prompts on images: give preserve_images of at least 1"
            )


def retaining(
    method: Method, inputs: Any, tools: Tools, concepts: Sequence[Concept], settings: Retention
) -> tuple[Method, Any]:
    """The method and its inputs with the losses that are asked for; unchanged if there are none.

    Raises ValueError for `preserve_images` or `preserve_worst_every` where no prompt is preserved.
    """
    prompts = list(dict.fromkeys(prompt for concept in concepts for prompt in concept.preserve))
    if settings.images and not prompts:
        raise ValueError(f"preserve_images={settings.images}: no prompt is preserved; name some, preserve='a | b'")
    weights = jnp.float32(settings.weight), jnp.float32(settings.empty)
    if settings.images:
        images = sampled(tools, prompts, settings.images, steps=STEPS, guidance_scale=GUIDANCE)
        bank = make_bank(tools.encode, prompts, {"kept": str})
        term = Imaged(tools.denoiser, tools.schedule, settings.worst_every, len(prompts), bool(settings.empty))
        return added(method, inputs, tools.denoiser, term, ImagedInputs(bank, tools.encode([""]), images, *weights))
    if settings.empty:
        method, inputs = added(method, inputs, tools.denoiser, Emptied(), EmptyInputs(tools.encode([""]), weights[1]))
    return preserving(method, inputs, tools, concepts, settings.weight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EmptyInputs:
    row: Conditioning
    weight: Float[Array, ""]


class Noised(NamedTuple):
    """An image, by its prompt and number, and how it is noised. t: uniform, half of them from `HIGH` on."""

    t: Real[Array, "*batch"]
    prompt: Int[Array, "*batch"]
    image: Int[Array, "*batch"]
    noise: Float[Array, "*batch height width channel"]

    def of(self, schedule: Schedule, images: Float[Array, "prompts images height width channel"]) -> Array:
        """x_t."""
        return add_noise(schedule, images[self.prompt, self.image], self.noise, self.t)


def mostly_early(schedule: Schedule, key: Array, high: Array, low: float = 0.0) -> Real[Array, ""]:
    """A timestep, uniform from a part of the schedule on; half of them from `HIGH` on. high: the key of which half."""
    total = schedule.num_train_timesteps
    return schedule.timestep(jax.random.randint(key, (), least_of(total, high, low), total))


def least_of(total: int, high: Array, low: float) -> Int[Array, ""]:
    """The first of the timesteps from which `mostly_early` draws one."""
    return jnp.where(jax.random.bernoulli(high), int(max(HIGH, low) * total), int(low * total))


def noised(key: Array, images: Array, schedule: Schedule) -> Noised:
    """The draw of one example."""
    t, prompt, image, noise, high = jax.random.split(key, 5)
    return Noised(
        mostly_early(schedule, t, high),
        jax.random.randint(prompt, (), 0, images.shape[0]),
        jax.random.randint(image, (), 0, images.shape[1]),
        jax.random.normal(noise, images.shape[2:]),
    )


@dataclass(frozen=True, eq=False)
class Emptied(Term):
    """The empty prompt, held to the base at the method's own x_t."""

    salt = 2

    def point(self, models: Models, draws: Any, inputs: EmptyInputs, own: tuple[Array, Array]) -> Point:
        row = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(own[0]), *a.shape[1:])), inputs.row)
        return Point(*own, row, row, inputs.weight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ImagedInputs:
    """bank: of the prompts, as if each were a concept. images: latents, those of each prompt.

    empty: the empty prompt. weight, empty_weight: of the prompts, and of the empty one.
    """

    bank: Bank
    empty: Conditioning
    images: Float[Array, "prompts images height width channel"]
    weight: Float[Array, ""]
    empty_weight: Float[Array, ""]


class ImagedDraws(NamedTuple):
    """worst: whether one of the worst prompts takes the place of at's, `place` (0 to 1) among them.

    scored: the key of the noise under which all prompts are scored. empty: whether "" is asked at that image.
    """

    at: Noised
    worst: Bool[Array, " batch"]
    place: Float[Array, " batch"]
    scored: Array
    empty: Bool[Array, " batch"]


@dataclass(frozen=True, eq=False)
class Imaged(Term):
    """Preserved prompts on noised images. count: of the prompts. emptied: whether the empty prompt is held, too.

    Its memory, where they are scored, is their order by drift, the largest first.
    """

    denoiser: Network
    schedule: Schedule
    worst_every: int
    count: int
    emptied: bool = False

    salt = 3

    def memory(self, shape: tuple[int, ...]) -> Any:
        return shape_of((self.count,), jnp.int32) if self.worst_every else ()

    def draw(
        self, step: Array, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: ImagedInputs
    ) -> ImagedDraws:
        def example(own: Array) -> ImagedDraws:
            at, worst, place, empty = jax.random.split(own, 4)
            at = noised(at, inputs.images, self.schedule)
            part = inputs.empty_weight / (inputs.weight + inputs.empty_weight) if self.emptied else 0.0
            empty = jax.random.bernoulli(empty, part)
            return ImagedDraws(at, jax.random.bernoulli(worst), jax.random.uniform(place), key, empty)

        return jax.vmap(example)(example_keys)._replace(scored=key)  # the same for all

    def recall(
        self, models: Models, draws: ImagedDraws, memory: Any, step: Array, inputs: ImagedInputs
    ) -> tuple[Any, ImagedDraws]:
        if not self.worst_every:
            return memory, draws

        def scored() -> Array:
            order = jnp.argsort(-self.drift(models, draws.scored, inputs)).astype(jnp.int32)
            return jnp.broadcast_to(order, memory.shape)

        memory = jax.lax.cond(step % self.worst_every == 0, scored, lambda: memory)
        quarter = -(-self.count // 4)
        place = jnp.minimum((draws.place * quarter).astype(jnp.int32), quarter - 1)
        worst = jnp.take_along_axis(memory, place[:, None], axis=1)[:, 0]
        return memory, draws._replace(at=draws.at._replace(prompt=jnp.where(draws.worst, worst, draws.at.prompt)))

    def drift(self, models: Models, key: Array, inputs: ImagedInputs) -> Float[Array, " prompts"]:
        """d of each prompt: of its first image at the times of `SCORED_AT`, under noise that is the same for all."""
        total = self.schedule.num_train_timesteps
        times = self.schedule.timestep(jnp.asarray([int(part * total) for part in SCORED_AT]))
        noise = jax.random.normal(key, (len(times), *inputs.images.shape[2:]))
        rows = inputs.bank.take("kept", jnp.arange(self.count))

        def of(prompt: tuple[Array, Conditioning]) -> Float[Array, ""]:
            image, row = (jax.tree.map(lambda a: jnp.stack([a] * len(times)), part) for part in prompt)
            x = add_noise(self.schedule, image, noise, times)
            student, teacher = (denoise(self.denoiser, params, x, times, row) for params in models[:2])
            return jnp.mean((student - teacher) ** 2)

        return jax.lax.map(of, (inputs.images[:, 0], rows), batch_size=AT_ONCE)

    def point(self, models: Models, draws: ImagedDraws, inputs: ImagedInputs, own: tuple[Array, Array]) -> Point:
        row = inputs.bank.take("kept", draws.at.prompt)
        if self.emptied:
            row = jax.tree.map(
                lambda a, b: jnp.where(draws.empty.reshape(-1, *[1] * (a.ndim - 1)), b.astype(a.dtype), a),
                row,
                inputs.empty,
            )
        weight = inputs.weight + inputs.empty_weight
        return Point(draws.at.of(self.schedule, inputs.images), draws.at.t, row, row, weight)
