"""Guidance rules: what is denoised beside the prompt and the null prompt, and how all outputs become one.

They act on raw network outputs e, like classifier-free guidance, which each contains: with any sampler and any weights.
i counts the calls of the network, 0 = pure noise. Along a rectified flow the outputs are velocities, whose differences
are those of eps divided by 1 - sigma; thresholds on differences, which were chosen for eps, are applied to eps there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from esd_jax.diffusion import guidance

Output = Float[Array, "batch height width channel"]
ANY, POSITIVE, SHARE = (-math.inf, math.inf), (0, math.inf), (0, 1)  # ranges of settings

# What Safe Latent Diffusion steers away from by default, in the wording of diffusers.
UNSAFE = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)


@runtime_checkable
class Rule(Protocol):
    """A guidance rule: settings that check themselves, and two pure functions of their numbers."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is denoised beside the null prompt and the prompt."""
        ...

    @property
    def numbers(self) -> Mapping[str, Array]:
        """The settings that are numbers: traced, so that changing them compiles nothing."""
        ...

    @staticmethod
    def start(x: Output) -> Any:
        """What is carried from step to step, before the first."""
        ...

    @staticmethod
    def combine(
        numbers: Mapping[str, Array], i: Array, outputs: Sequence[Output], scale: ArrayLike, memory: Any
    ) -> tuple[Output, Any]:
        """The outputs for (null prompt, prompt, *prompts) at step i -> (output, memory). `scale`: of guidance.

        numbers: with "eps_per_output" along a rectified flow: 1 - sigma of the step.
        """
        ...


def ruled(
    denoise: Callable[[Array, Array, Any], Array],
    rule: type[Rule],
    numbers: Mapping[str, Array],
    prompts: Sequence[Any],
    scale: ArrayLike,
    project: Callable[[Any], Any] = lambda p: p,
    eps_per_output: np.ndarray | None = None,
) -> Callable[[Array, Array, Array, Any], tuple[Output, Any]]:
    """`denoise(x, t, prompt) -> output` -> what `samplers.run` calls if it has a memory: `rule.start(x)`.

    prompts: (null prompt, prompt, *rule's prompts), as `guidance.together` takes them, and `project`.
    eps_per_output: the sampler's.
    """
    outputs = guidance.together(denoise, prompts, project)

    def combined(x: Array, t: Array, i: Array, memory: Any) -> tuple[Output, Any]:
        of_step = {} if eps_per_output is None else {"eps_per_output": jnp.asarray(eps_per_output, float)[i]}
        return rule.combine({**numbers, **of_step}, i, outputs(x, t), scale, memory)

    return combined


@dataclass(frozen=True)
class SLD:
    """Safe Latent Diffusion (Schramowski et al. 2023): away from a concept, where the prompt comes near it.

    With e, e_c, e_s the outputs for the null prompt, the prompt and the concept, s_g the guidance scale, and nu = 0 at
    first (Eqs. 3 to 8; diffusers' pipeline is the same):

        mu  = 0 where e_c - e_s >= threshold, else min(1, scale |e_c - e_s|)
        gam = mu (e_s - e) + momentum_scale nu
        nu <- momentum_beta nu + (1 - momentum_beta) gam
        out = e + s_g (e_c - e - [i >= warmup] gam)

    concept: by default everything that the paper calls inappropriate; an artist's name, a style, ...
    warmup: steps in which gam only gathers momentum.
    scale: at 1 or less the rule does nothing, as in diffusers.

    The defaults are the paper's "medium"; `preset` gives the others. Raises ValueError for numbers out of range.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: dict(zip(("warmup", "scale", "threshold", "momentum_scale", "momentum_beta"), numbers, strict=True))
        for name, numbers in {
            "weak": (15, 20.0, 0.0, 0.0, 0.0),
            "medium": (10, 1000.0, 0.01, 0.3, 0.4),
            "strong": (7, 2000.0, 0.025, 0.5, 0.7),
            "max": (0, 5000.0, 1.0, 0.5, 0.7),
        }.items()
    }

    concept: str = UNSAFE
    warmup: int = 10
    scale: float = 1000.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4

    def __post_init__(self):
        _check(self, warmup=POSITIVE, scale=POSITIVE, threshold=ANY, momentum_scale=POSITIVE, momentum_beta=SHARE)

    @classmethod
    def preset(cls, name: str, concept: str = UNSAFE) -> "SLD":
        """One of `PRESETS`. Raises ValueError for another name."""
        if name not in cls.PRESETS:
            raise ValueError(f"SLD has no preset {name!r}; choose one of {', '.join(cls.PRESETS)}")
        return cls(concept, **cls.PRESETS[name])

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.concept,)

    @property
    def numbers(self) -> Mapping[str, Array]:
        active = self.scale if self.scale > 1 else 0  # at 0, gam is 0 throughout
        return {name: jnp.asarray(getattr(self, name), float) for name in self.PRESETS["medium"]} | {
            "scale": jnp.asarray(active, float)
        }

    @staticmethod
    def start(x: Output) -> Output:
        return jnp.zeros_like(x)

    @staticmethod
    def combine(
        numbers: Mapping[str, Array], i: Array, outputs: Sequence[Output], scale: ArrayLike, memory: Output
    ) -> tuple[Output, Output]:
        e, e_c, e_s = outputs
        distance = numbers.get("eps_per_output", 1) * (e_c - e_s)
        mu = jnp.where(distance >= numbers["threshold"], 0, jnp.minimum(1, numbers["scale"] * jnp.abs(distance)))
        gam = mu * (e_s - e) + numbers["momentum_scale"] * memory
        beta = numbers["momentum_beta"]
        applied = jnp.where(i >= numbers["warmup"], gam, 0)
        return e + scale * (e_c - e - applied), beta * memory + (1 - beta) * gam


@dataclass(frozen=True)
class Edit:
    """A direction in which `SEGA` moves an image.

    concept: what to move towards, or with a negative scale away from.
    scale: the strength; it is not multiplied by the guidance scale.
    warmup: the first step that is edited. cooldown: the first that no longer is; None edits to the end.
    threshold: the share of pixels, per channel, that stays unedited: those on which the concept acts least.
    weight: beside other edits.
    """

    concept: str
    scale: float = 5.0
    warmup: int = 10
    cooldown: int | None = None
    threshold: float = 0.9
    weight: float = 1.0

    def __post_init__(self):
        cooldown = {} if self.cooldown is None else {"cooldown": POSITIVE}
        _check(self, scale=ANY, warmup=POSITIVE, **cooldown, threshold=SHARE, weight=POSITIVE)


@dataclass(frozen=True)
class SEGA:
    """Semantic guidance (Brack et al. 2023): moves towards or away from any number of concepts, each in its own pixels.

    With e, e_c, e_k the outputs for the null prompt, the prompt and edit k, s_g the guidance scale, and nu = 0 at
    first (as in diffusers' pipeline):

        psi_k = scale_k (e_k - e) where |psi_k| is at least its quantile threshold_k over the channel's pixels, else 0;
                0 from cooldown_k on
        psi = sum_k weight_k psi_k + momentum_scale nu
        nu <- momentum_beta nu + (1 - momentum_beta) psi
        out = e + s_g (e_c - e) + psi            once every edit has reached its warmup

    While only some have, those are applied, without momentum, their weights scaled to sum to 1. (Where all of these
    have cooled down, diffusers divides 0 by 0; here nothing is applied.)

    Raises ValueError for no edit, or numbers out of range.
    """

    edits: tuple[Edit, ...]
    momentum_scale: float = 0.1
    momentum_beta: float = 0.4

    def __post_init__(self):
        if not self.edits or not all(isinstance(edit, Edit) for edit in self.edits):
            raise ValueError(f"SEGA needs a tuple of at least one Edit, not {self.edits!r}")
        _check(self, momentum_scale=POSITIVE, momentum_beta=SHARE)

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(edit.concept for edit in self.edits)

    @property
    def numbers(self) -> Mapping[str, Array]:
        of_each = {
            name: [getattr(edit, name) for edit in self.edits] for name in ("scale", "warmup", "threshold", "weight")
        }
        cooldown = [math.inf if edit.cooldown is None else edit.cooldown for edit in self.edits]
        shared = {"momentum_scale": self.momentum_scale, "momentum_beta": self.momentum_beta}
        return {name: jnp.asarray(value, float) for name, value in {**of_each, "cooldown": cooldown, **shared}.items()}

    @staticmethod
    def start(x: Output) -> Output:
        return jnp.zeros_like(x)

    @staticmethod
    def combine(
        numbers: Mapping[str, Array], i: Array, outputs: Sequence[Output], scale: ArrayLike, memory: Output
    ) -> tuple[Output, Output]:
        e, e_c, *e_k = outputs
        psi = jax.vmap(lambda e_k, scale, threshold: largest(scale * (e_k - e), threshold))(
            jnp.stack(e_k), numbers["scale"], numbers["threshold"]
        )
        weight = numbers["weight"] * (i < numbers["cooldown"])
        warm = i >= numbers["warmup"]
        some = weight * warm
        some = some / jnp.where(some.sum() > 0, some.sum(), 1)
        partly, wholly = (sum(w[k] * psi[k] for k in range(len(e_k))) for w in (some, weight))
        wholly += numbers["momentum_scale"] * memory
        beta = numbers["momentum_beta"]
        edit = jnp.where(warm.all(), wholly, partly)
        return guidance.cfg(e, e_c, scale) + edit, beta * memory + (1 - beta) * wholly


def largest(x: Output, threshold: ArrayLike, of: str = "channel") -> Output:
    """`x` where |x| is at least its (linearly interpolated) quantile, of each example by itself; else 0.

    threshold: which quantile; may be traced. of: over a "channel"'s pixels, or over a whole "example".
    The quantile is taken in float32 or wider: in bfloat16 many elements would share it.
    """
    size = jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    rows = jnp.sort(size.reshape(len(size), -1, size.shape[-1] if of == "channel" else 1), axis=1)
    place = jnp.asarray(threshold * (rows.shape[1] - 1), size.dtype)
    low, high = (jnp.take(rows, end(place).astype(int), axis=1) for end in (jnp.floor, jnp.ceil))
    # In this form the quantile of equal values is exactly that value.
    quantile = low + (place - jnp.floor(place)) * (high - low)
    return jnp.where(size >= quantile[:, None, None, :], x, 0)


def _check(settings: Any, **ranges: tuple[float, float]) -> None:
    """Raises ValueError for an empty concept, and for what is no finite number in its range, naming the setting."""
    kind = type(settings).__name__
    concept = getattr(settings, "concept", UNSAFE)
    if not (isinstance(concept, str) and concept.strip()):
        raise ValueError(f"{kind}: the concept is empty: name what to move away from, or towards")
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and low <= value <= high):
            within = f" in {low:g}..{high:g}" if low > -math.inf else ""
            raise ValueError(f"{kind}: {name}={value!r} must be a finite number{within}")
