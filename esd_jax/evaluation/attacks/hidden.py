"""Destroyed or only hidden? What an erased model still knows, beyond what prompts can reach.

Resurgence: *Unstable Unlearning: The Hidden Risk of Concept Resurgence in Diffusion Models* (Suriyakumar et al.,
arXiv 2410.08074). The erased network is fine-tuned, with the plain loss, on images that have nothing to do with the
concept, and the concept may come back:

    min over theta of E || e_theta(x_t, t, c(p)) - eps ||^2,    (x_0, p) benign, theta from the erased values on

By default only what the erasure trained is trained here. Steps and learning rate are ours.

Completion: *When Are Concepts Erased From Diffusion Models?* (Lu et al., NeurIPS 2025, arXiv 2505.17013), "diffusion
completion". The network gets an image of the concept, under noise, and finishes it:

    x_t = alpha_t x_0 + sigma_t eps,    x_0 an image of the concept; then DDIM from t to 0

The released code (checked) breaks off the base's own sampling after 1 to 3 steps and lets the erased network go on with
the same prompt. Here a finished image is noised, and the prompts do not name the concept: "" without guidance, and the
neutral prompt. At small t the concept is in the picture already, so compare with what the base makes of the same.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from esd_jax import conditionings, lora, sampling
from esd_jax.diffusion import guidance, programs, samplers
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.images import in_batches, true_output
from esd_jax.erasing.textual_inversion import draw
from esd_jax.erasure import Erasure
from esd_jax.evaluation.attacks import adversary
from esd_jax.evaluation.attacks.adversary import BASE, BATCH, ERASED, PLACEBO, RANDOM, Goal
from esd_jax.evaluation.attacks.fine_tuning import Batch, Fixed, benign, changed, lacking_subset, tuner
from esd_jax.evaluation.attacks.probe import Unmeasurable
from esd_jax.evaluation.attacks.prompts import OwnPrompts
from esd_jax.evaluation.attacks.scoring import Scored, each, score
from esd_jax.evaluation.attacks.settings import check
from esd_jax.evaluation.drawing import of_family
from esd_jax.params import Conditioning, Network, Params, component, partition, prefixed
from esd_jax.pipeline import Pipeline, image_size
from esd_jax.selection import select
from esd_jax.training.step import unchanged


@dataclass(frozen=True)
class Resurgence:
    """Settings of the fine-tuning.

    subset: which tensors are trained, of the family's subsets; None: those that the erasure trained.
    rank: of a low-rank change of them (LoRA); 0 trains the tensors themselves.
    """

    NAME: ClassVar[str] = "benign fine-tuning"
    needs: ClassVar[frozenset[str]] = frozenset()
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "emoji": {"steps": 200, "learning_rate": 3e-4},
    }
    MODELS: ClassVar[frozenset[str]] = frozenset({ERASED, PLACEBO})
    REVISION: ClassVar[int] = 2  # the first one's images might show the concept

    steps: int = 1000
    learning_rate: float = 1e-5
    weight_decay: float = 1e-2
    batch_size: int = 4
    subset: str | None = None
    rank: int = 0

    def __post_init__(self):
        check(self)

    @property
    def row(self) -> str:
        """What its row is called."""
        return f"target prompts after {self.steps} benign steps" + (f" of rank {self.rank}" if self.rank else "")

    def lacks(self, base: Pipeline, goal: Goal | None) -> str:
        """A subset that the base's family has, and neutral prompts of the goal."""
        if self.subset is not None and (reason := lacking_subset(self.NAME, self.subset, base)):
            return reason
        if goal is None or any(goal.neutral):
            return ""
        return f"{self.NAME} needs prompts without {goal.concept!r}: its images are of the neutral prompts"

    def probe(
        self, base: Pipeline, victim: Pipeline, goal: Goal, seeds: Sequence[int], seed: int = 0, **drawing: Any
    ) -> tuple[Scored, ...]:
        """The goal's prompts after fine-tuning on images of the base; see `benign`.

        Of a victim without records of what its erasure trained, such as a folder, that is what differs from the base.

        Raises ValueError for a goal without neutral prompts; Unmeasurable for too few images, and, without a subset,
        for a victim whose denoiser is the base's.
        """
        if reason := self.lacks(base, goal):
            raise ValueError(reason)
        recorded = self.subset is not None or component(victim.edits, victim.denoiser)
        names = () if recorded else changed(base, victim)
        if not (recorded or names):
            raise Unmeasurable("nothing of the denoiser differs from the base's: give a subset")
        images, texts = benign(base, goal, **drawing)
        healed = resurge(victim, images, texts, self, seed, names).pipeline
        prompts = OwnPrompts().run(base, healed, goal, seed)
        return (replace(score(healed, prompts, goal, seeds, **drawing), name=self.row),)


@dataclass(frozen=True)
class ResurgenceLoRA(Resurgence):
    """The same by LoRA on all attention, whatever the erasure trained: what users merge into models every day."""

    NAME: ClassVar[str] = "benign LoRA"

    subset: str | None = "attn"
    rank: int = 8


@dataclass(frozen=True, eq=False)
class Healed:
    """An erased model after benign fine-tuning. losses: of each step."""

    pipeline: Pipeline
    losses: Float[np.ndarray, " steps"]
    seconds: float


def resurge(
    victim: Pipeline,
    images: UInt8[np.ndarray, "n height width 3"],
    prompts: Sequence[str],
    settings: Resurgence = Resurgence(),
    seed: int = 0,
    names: Sequence[str] = (),
) -> Healed:
    """Fine-tunes what an erasure trained, or the settings' subset, on benign images.

    Args:
      victim: an erased pipeline.
      images, prompts: benign, a prompt for each image.
      names: of the denoiser's tensors, in place of those that the records say the erasure trained.

    Raises Unmeasurable if the pipeline was not erased, and ValueError for another number of prompts than images.
    """
    started, unet = time.monotonic(), victim.denoiser
    names = sorted(names or component(victim.edits, unet))
    if settings.subset is not None:
        names = sorted(select(settings.subset, victim.network(unet).layouts, victim.family.subsets))
    if not names:
        raise Unmeasurable(
            "this pipeline has no trained tensors of the denoiser to heal: give an erased one, or a subset"
        )
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images")
    network, weights = adversary.denoiser(victim)
    exact = {name: victim.edits.get(f"{unet}/{name}", weights[name]) for name in names}
    if settings.rank:
        exact = {name: exact[name] for name in lora.adaptable(names, exact)}
    first = {name: jnp.asarray(value, jnp.float32) for name, value in exact.items()}
    _, frozen = partition(weights, first)
    conditioning = in_batches(victim.encode_prompts, prompts, BATCH)
    theta, key = first, jax.random.key(seed)
    if settings.rank:
        key, start = jax.random.split(key)
        theta = lora.initial(first, settings.rank, start)
    latents = adversary.latents(victim, images)
    run = healer(settings, network, adversary.schedule_of(victim, latents), jnp.dtype(victim.dtype).name)
    theta, losses = run(theta, Fixed(frozen, first), latents, conditioning, key)
    how = {"steps": settings.steps, "learning_rate": settings.learning_rate, "images": len(images)}
    how |= {"subset": settings.subset, "rank": settings.rank} if settings.subset or settings.rank else {}
    losses = np.asarray(losses)  # waits for the training
    trained = lora.weights(theta, first) if settings.rank else theta
    healed = victim.with_edits(prefixed(trained, unet), Erasure(healed=how))
    return Healed(healed, losses, time.monotonic() - started)


@lru_cache(maxsize=8)
def healer(settings: Resurgence, unet: Network, schedule: Schedule, dtype: str) -> Callable[..., Any]:
    """(theta, fixed, latents, the prompts' conditioning, key) -> (theta, losses); step i uses fold_in(key, i)."""

    def batch(i: Array, fixed: Fixed, case: tuple[Array, Conditioning, Array]) -> Batch:
        latents, conditioning, key = case
        image, t, noise = draw(jax.random.fold_in(key, i), settings.batch_size, schedule, latents)
        x0, conditioning, t = latents[image], jax.tree.map(lambda a: a[image], conditioning), schedule.timestep(t)
        return Batch(add_noise(schedule, x0, noise, t), t, conditioning, true_output(schedule, x0, noise, t))

    tx = optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay)
    return tuner(unet, batch, tx, settings.steps, lora.weights if settings.rank else unchanged, dtype)


@dataclass(frozen=True)
class Completion:
    """Settings.

    times: noise levels, timesteps of the schedule; along a rectified flow 1,000 sigma.
    num_steps: of DDIM, or there of Euler's method, from pure noise to the image. It and guidance_scale: None: those
      of the model's family.
    """

    NAME: ClassVar[str] = "diffusion completion"
    needs: ClassVar[frozenset[str]] = frozenset({"classifier_free"})
    MODELS: ClassVar[frozenset[str]] = frozenset({BASE, ERASED, PLACEBO, RANDOM})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "emoji": {"times": (500, 700, 900), "num_steps": 20, "guidance_scale": 3.0},
    }

    times: tuple[int, ...] = (300, 500, 700)
    num_steps: int | None = None
    guidance_scale: float | None = None

    def __post_init__(self):
        check(self)

    def fitted(self, base: Pipeline) -> "Completion":
        return of_family(self, base)

    def lacks(self, base: Pipeline, goal: Goal | None) -> str:
        """A step at or below each of the times."""
        try:
            size = image_size(base.configs)
        except ValueError:  # not known before there are images
            return ""
        return _below(_grid(base, self, size)[1], min(self.times))

    def probe(
        self, base: Pipeline, victim: Pipeline, goal: Goal, seeds: Sequence[int], seed: int = 0, **drawing: Any
    ) -> tuple[Scored, ...]:
        """The goal's images, finished by the victim; see `completions`."""
        return completions(victim, goal, self, seed)


def complete(
    victim: Pipeline,
    images: UInt8[np.ndarray, "n height width 3"],
    prompts: Sequence[str],
    t: int,
    settings: Completion = Completion(),
    seed: int = 0,
) -> UInt8[np.ndarray, "n height width 3"]:
    """Noises images to the step of DDIM's grid at or below t, and denoises them; an empty prompt is not guided.

    Noise depends on the seed and the image's place alone, so that all models finish the same pictures.

    Raises ValueError for a t below the grid, and for prompts of which some are empty.
    """
    if len({bool(prompt) for prompt in prompts}) > 1 or len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images: one for each, all empty or none")
    settings = settings.fitted(victim)
    schedule, sampler = _grid(victim, settings, images.shape[1:3])
    if reason := _below(sampler, t):
        raise ValueError(reason)
    start = int(np.flatnonzero(np.asarray(sampler.timesteps) <= t)[0])
    noise = sampling.initial_noise(victim, sampling.example_keys(seed, len(images)), images.shape[1:3])
    latents = adversary.latents(victim, images)
    noised = add_noise(schedule, latents, noise, sampler.timesteps[start].item())
    run = _completer(victim.network(victim.denoiser), sampler, bool(prompts[0]))
    scale = jnp.float32(settings.guidance_scale)
    parts = []
    for first in range(0, len(images), BATCH):
        index = np.minimum(np.arange(first, first + min(BATCH, len(images))), len(images) - 1)
        texts, size = [prompts[int(i)] for i in index], images.shape[1:3]
        encoded = victim.encode_prompts(texts, size=size)
        null = conditionings.null_conditioning(victim, [None] * len(index), size) if texts[0] else encoded
        drawn = run(victim.params[victim.denoiser], noised[index], (null, encoded), scale, start)
        parts.append(sampling.decoded(victim, victim.params["vae"], drawn, index, prompts, settings.guidance_scale))
    return np.concatenate(parts)[: len(images)]


def completions(
    victim: Pipeline,
    goal: Goal,
    settings: Completion = Completion(),
    seed: int = 0,
) -> tuple[Scored, ...]:
    """The goal's images, finished from each noise level, with the empty prompt and, where there are some, the neutral
    prompts."""
    neutral = [goal.neutral[i % len(goal.neutral)] for i in range(len(goal.images))]
    kinds = [("no prompt", [""] * len(neutral)), ("neutral prompt", neutral)][: 2 if all(neutral) else 1]
    scores = []
    for t in settings.times:
        for kind, prompts in kinds:
            drawn = complete(victim, goal.images, prompts, t, settings, seed)
            scores.append(each(f"completed from t = {t}, {kind}", goal, drawn))
    return tuple(scores)


def _grid(victim: Pipeline, settings: Completion, size: tuple[int, int]) -> tuple[Schedule, samplers.Sampler]:
    """For images [height, width]."""
    schedule = victim.schedule_at(size)
    return schedule, programs.sampler(schedule, samplers.plain(schedule), settings.fitted(victim).num_steps, 0.0)


def _below(sampler: samplers.Sampler, t: int) -> str:
    """That no step is at or below t, as a sentence; empty if one is."""
    last, name = np.asarray(sampler.timesteps)[-1], {"ddim": "DDIM"}.get(sampler.name, sampler.name)
    return "" if last <= t else f"t={t} is below the last of {name}'s {len(sampler.timesteps)} steps, {last:g}"


@lru_cache(maxsize=8)
def _completer(unet: Network, sampler: samplers.Sampler, guided: bool) -> Callable[..., Array]:
    def run(
        params: Params, x: Array, conditionings: tuple[Conditioning, Conditioning], scale: Array, start: Array
    ) -> Array:
        def denoise(x: Array, t: Array, conditioning: Conditioning) -> Array:
            return unet.apply(params, x, t, conditioning).astype(jnp.float32)

        null, prompt = conditionings
        once = partial(unet.project, params)
        if guided:
            denoiser = guidance.classifier_free(denoise, prompt, null, scale, once)
        else:
            denoiser = partial(denoise, conditioning=once(null))
        return samplers.run(sampler, denoiser, x, start=start)

    return jax.jit(run)
