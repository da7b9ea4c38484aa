"""ESD: *Erasing Concepts from Diffusion Models* (Gandikota et al., ICCV 2023).

    target = e*(x_t, anchor) - eta [ e*(x_t, c) - e*(x_t, null) ]          (teacher, no gradient)
    L      = mean (e_theta(x_t, c) - target)^2                             (Eq. 6-7: anchor = null)

with x_t drawn by the model itself from the concept. Three published variants differ in how x_t, its timestep and the
anchor are chosen; `PRESETS` reproduces each with its off-by-ones, as switches of one implementation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esd_jax.diffusion import guidance, samplers
from esd_jax.diffusion.samplers import Sampler
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.methods.concepts import Bank, Concept
from esd_jax.models.unet import Conditioning
from esd_jax.params import Network, Params, component


@dataclass(frozen=True)
class ESD:
    """Settings; the defaults are the paper's (the `paper` preset).

    sample_with: "student" (2023) or "teacher" (2025): whose trajectories x_t is taken from.
    sampler: any of `samplers.SAMPLERS`.
    timestep_mode: which timestep x_t is scored at, after `num_updates` sampler steps (see `make_trajectory`).
      "compvis": the released 2023 code. It starts one grid entry late and scores x_t at t ~ U[20k, 20k + 19], 39 to 58
        training steps noisier than x_t is; k = 0 and k = 1 share one x_t.
      "grid": x_t is scored at its own timestep.
      "alt1000": the 2024 demo code. x_t after i steps is scored at t = 1000 - 20 i, 19 steps noisier than it is.
    anchor: what the target starts from. "null": the empty prompt; "from": `from_`, or the concept itself where
      `from_` is absent; "auto": `from_` where it is given and is not the concept itself, else the empty prompt.
    sample_prompt: "concept" or "from": what the trajectory is conditioned on.
    eta: strength. With `anchor="from"` and no `from_`, it is the paper's eta + 1 (the anchor is eps_c, not eps_null).
    sampling_steps, sampling_guidance: of the trajectory.
    """

    sample_with: str = "student"
    sampler: str = "ddim"
    timestep_mode: str = "compvis"
    anchor: str = "auto"
    sample_prompt: str = "concept"
    eta: float = 1.0
    sampling_steps: int = 50
    sampling_guidance: float = 3.0

    def __post_init__(self):
        for field, choices in CHOICES.items():
            if (value := getattr(self, field)) not in choices:
                raise ValueError(f"{field}={value!r} is unknown; choose one of {', '.join(choices)}")

    def roles(self) -> Mapping[str, Any]:
        """Which prompt a concept has in each role of the equation."""
        anchors = {
            "null": lambda c: "",
            "from": lambda c: c.from_ or c.text,
            "auto": lambda c: "" if c.from_ in (None, c.text) else c.from_,
        }
        return {
            "concept": lambda c: c.text,
            "student": lambda c: c.from_ or c.text,
            "anchor": anchors[self.anchor],
            "sample": lambda c: c.text if self.sample_prompt == "concept" else c.from_ or c.text,
        }


CHOICES = {
    "sample_with": ("student", "teacher"),
    "sampler": samplers.SAMPLERS,
    "timestep_mode": ("compvis", "grid", "alt1000"),
    "anchor": ("null", "from", "auto"),
    "sample_prompt": ("concept", "from"),
}

PRESETS = {
    "paper": ESD(),
    "esd2025": ESD(
        sample_with="teacher", sampler="pndm", timestep_mode="grid", anchor="from", sample_prompt="from", eta=2.0
    ),
    "alt": ESD(timestep_mode="alt1000", eta=2.0),
}


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
    t_low: Int[np.ndarray, " index"]
    t_high: Int[np.ndarray, " index"]


def make_trajectory(settings: ESD, schedule: Schedule) -> Trajectory:
    """The tables of a timestep mode. Raises ValueError where a mode and a sampler do not go together."""
    mode, steps = settings.timestep_mode, settings.sampling_steps
    sampler = samplers.make_sampler(schedule, settings.sampler, steps)
    if sampler.stochastic:
        raise ValueError(f"sampler {sampler.name!r} draws noise at every step, which is not implemented; use 'ddim'")
    index = np.arange(steps)
    if mode == "grid":
        t = np.asarray(sampler.timesteps[:steps])
        return Trajectory(sampler, index, index, t, t)
    total = schedule.num_train_timesteps
    if settings.sampler != "ddim" or total % steps:
        raise ValueError(
            f"timestep_mode={mode!r} needs sampler='ddim' and a sampling_steps that divides {total}, "
            f"not {settings.sampler!r} and {steps}; timestep_mode='grid' takes any"
        )
    if steps < (least := {"compvis": 2, "alt1000": 3}[mode]):
        raise ValueError(f"sampling_steps={steps} is too few for timestep_mode={mode!r}: it needs at least {least}")
    stride = total // steps
    if mode == "compvis":
        # Its sampler drops the noisiest entry of the grid, and its "stop after k" test never fires for k = 0.
        updates = np.minimum(steps - index, steps - 1)
        return Trajectory(samplers.drop_first(sampler), index, updates, stride * index, stride * (index + 1) - 1)
    # alt1000 reads the grid of a 1000-step schedule; its indices 0 and S - 1 are never drawn.
    t = total - stride * index
    return Trajectory(sampler, index[1:-1], index, t, t)


class Draws(NamedTuple):
    """Everything random in one step. `index` and `t` are shared by the batch, so that one loop serves all of it."""

    index: Int[Array, ""]
    t: Float[Array, ""]
    concept: Int[Array, " batch"]
    noise: Float[Array, "batch height width channel"]
    image: Int[Array, " batch"]


class Batch(NamedTuple):
    """What the student is scored on."""

    x: Float[Array, "batch height width channel"]
    t: Float[Array, ""]
    conditioning: Conditioning
    target: Float[Array, "batch height width channel"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What may change from run to run without compiling again.

    images: latents of memorised images [images, height, width, channel]; with them x_t is a noised image instead of
      a sample (Sec. 5.4 of the paper).
    """

    bank: Bank
    eta: Float[Array, ""]
    sampling_guidance: Float[Array, ""]
    images: Float[Array, "images height width channel"] | None = None


@dataclass(frozen=True, eq=False)
class Method:
    """ESD over one UNet and schedule, as the three functions that a training step is made of.

    `separate_anchor` says whether any anchor is neither the empty prompt nor the concept; only then does the target
    cost a third evaluation of the teacher.
    """

    settings: ESD
    unet: Network
    schedule: Schedule
    trajectory: Trajectory
    separate_anchor: bool

    def draw(self, key: Array, example_keys: Array, shape: tuple[int, ...], inputs: Inputs) -> Draws:
        """The random choices of a step: index and t from `key`, the rest of each example from its own key."""
        table = self.trajectory
        index_key, t_key = jax.random.split(key)
        index = jnp.asarray(table.support)[jax.random.randint(index_key, (), 0, len(table.support))]
        low, high = jnp.asarray(table.t_low)[index], jnp.asarray(table.t_high)[index]
        t = low + jnp.floor(jax.random.uniform(t_key) * (high - low + 1))
        num_images = 1 if inputs.images is None else inputs.images.shape[0]

        def example(key: Array) -> tuple[Array, Array, Array]:
            concept, noise, image = jax.random.split(key, 3)
            return (
                jax.random.randint(concept, (), 0, inputs.bank.num_concepts),
                jax.random.normal(noise, shape),
                jax.random.randint(image, (), 0, num_images),
            )

        concept, noise, image = jax.vmap(example)(example_keys)
        return Draws(index, t, concept, noise, image)

    def prepare(self, student: Params, teacher: Params, draws: Draws, inputs: Inputs) -> Batch:
        """x_t, and what the student should say about it. Nothing here carries a gradient."""
        take = lambda role: inputs.bank.take(role, draws.concept)  # noqa: E731
        null, concept = take("null"), take("concept")
        if inputs.images is not None:
            x = add_noise(self.schedule, inputs.images[draws.image], draws.noise, draws.t.astype(jnp.int32))
        else:
            sampling = student if self.settings.sample_with == "student" else teacher
            x = self._sample(sampling, draws, take("sample"), null, inputs.sampling_guidance)

        if self.separate_anchor:
            eps_anchor, eps_c, eps_null = self._evaluate(teacher, x, draws.t, [take("anchor"), concept, null])
        else:
            eps_c, eps_null = self._evaluate(teacher, x, draws.t, [concept, null])
            is_null = (inputs.bank.roles["anchor"][draws.concept] == 0)[:, None, None, None]
            eps_anchor = jnp.where(is_null, eps_null, eps_c)
        target = eps_anchor - inputs.eta * (eps_c - eps_null)
        return Batch(*jax.lax.stop_gradient((x, draws.t, take("student"), target)))

    def loss(self, student: Params, batch: Batch) -> Float[Array, ""]:
        """Mean squared error over all elements, in float32 at least."""
        e = self._denoise(student, batch.x, batch.t, batch.conditioning)
        return jnp.mean((e - batch.target) ** 2)

    def _denoise(self, params: Params, x: Array, t: Array, conditioning: Conditioning) -> Array:
        return self.unet.apply(component(params, "unet"), x, t, conditioning).astype(x.dtype)

    def _sample(self, params: Params, draws: Draws, prompt: Any, null: Any, scale: Array) -> Array:
        sampler, updates = self.trajectory.sampler, jnp.asarray(self.trajectory.num_updates)[draws.index]
        denoise = guidance.classifier_free(lambda x, t, c: self._denoise(params, x, t, c), prompt, null, scale)
        x = samplers.run(sampler, denoise, draws.noise * sampler.initial_scale, stop=updates)
        # Euler and LMS keep x at unit signal; the network is scored on what it was trained on, unit variance. Only
        # DDIM's trajectories run to the end of the table, and its scale is 1 throughout.
        last = len(sampler.input_scale) - 1
        return x * jnp.asarray(sampler.input_scale, x.dtype)[jnp.minimum(updates, last)]

    def _evaluate(self, params: Params, x: Array, t: Array, prompts: Sequence[Conditioning]) -> list[Array]:
        """One batched call for several prompts: the pairs of an example stay neighbours, as in `guidance`."""
        k = len(prompts)
        stacked = jax.tree.map(lambda *a: jnp.stack(a, axis=1).reshape(-1, *a[0].shape[1:]), *prompts)
        e = self._denoise(params, jnp.repeat(x, k, axis=0), t, stacked)
        return list(jnp.moveaxis(e.reshape(-1, k, *e.shape[1:]), 1, 0))


def make_method(settings: ESD, unet: Network, schedule: Schedule, concepts: Sequence[Concept]) -> Method:
    """ESD for a UNet, its schedule and the concepts' kinds of anchor."""
    anchor = settings.roles()["anchor"]
    separate = any(anchor(c) not in ("", c.text) for c in concepts)
    return Method(settings, unet, schedule, make_trajectory(settings, schedule), separate)


def make_inputs(settings: ESD, bank: Bank, images: Any = None) -> Inputs:
    """The traced inputs of a run."""
    return Inputs(bank, jnp.float32(settings.eta), jnp.float32(settings.sampling_guidance), images)


def from_preset(name: str, **fields: Any) -> ESD:
    """A published variant with some settings changed. Raises ValueError for an unknown preset."""
    if name not in PRESETS:
        raise ValueError(f"unknown ESD preset {name!r}; choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **fields)
