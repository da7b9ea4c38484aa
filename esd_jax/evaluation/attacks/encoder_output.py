"""Inversion at the text encoder's output: no text at all, but free vectors where the network reads the prompt.

    c* = argmin over c of E || e'(x_t, t, c) - e(x_t, t, c(p)) ||^2,    x_0 an image that the base drew of prompt p

where e is the base, e' the erased network, and c is everything that a family's encoded prompt consists of. Any prompt,
and any soft token, gives one such c: what this search cannot recover, none of them can, as far as the search is good.
RECELER (Huang et al., ECCV 2024) and RACE (Kim et al., ECCV 2024) train against such adversaries; as an attack it
is this package's own. It needs no gradient of a text encoder, so it works with every family.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.embedding_search import Search
from esd_jax.erasing.textual_inversion import draw
from esd_jax.evaluation.attacks import adversary
from esd_jax.evaluation.attacks.adversary import Adversary, Goal, Trial
from esd_jax.evaluation.attacks.gauge import gauge
from esd_jax.evaluation.attacks.settings import beyond, check
from esd_jax.params import Conditioning, Network, Params
from esd_jax.pipeline import Pipeline

Leaves = tuple[Array, ...]


@dataclass(frozen=True)
class EncoderOutput:
    """Settings.

    from_t: the least timestep that is learned at.
    prompts: how many of the goal's are attacked, from the first; None is all. together: how many at once, which changes
      the time and nothing else.
    """

    NAME: ClassVar[str] = "encoder-output inversion"
    needs: ClassVar[frozenset[str]] = frozenset()
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "emoji": {"steps": 300, "learning_rate": 2e-2, "from_t": 600, "prompts": 4, "together": 4},
    }

    steps: int = 1000
    learning_rate: float = 1e-2
    batch_size: int = 4
    from_t: int = 0
    prompts: int | None = None
    together: int = 1

    def __post_init__(self):
        check(self)

    def lacks(self, base: Pipeline, goal: Goal | None) -> str:
        """A timestep `from_t`."""
        return beyond(self.NAME, self.from_t, base)

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int = 0) -> Adversary:
        """Starts from the neutral prompts; a trial is what the search ends with, one for each prompt."""
        started = time.monotonic()
        texts = goal.prompts[: self.prompts]
        unet, weights = adversary.denoiser(victim)
        asked, start = base.encode_prompts(texts), victim.encode_prompts(goal.neutral[: len(texts)])
        free = depend(asked, victim.encode_prompts([""] * len(texts)), start)
        latents = adversary.latents(base, np.concatenate([goal.of(case) for case in range(len(texts))]))
        run = searcher(self, unet, adversary.schedule_of(victim, latents), jax.tree.structure(asked), free)
        alone = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32)[:, None], tree)  # noqa: E731
        cases = (
            latents.reshape(len(texts), -1, *latents.shape[1:]),
            alone(asked),
            alone(start),
            adversary.case_keys(seed, len(texts)),
        )
        search = partial(run, weights, adversary.denoiser(base)[1])
        value, losses = adversary.in_turn(search, cases, self.together)
        rows = [jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), value) for i in range(len(texts))]
        trials = tuple(
            Trial(f"vectors for {text!r}", row, i) for i, (text, row) in enumerate(zip(texts, rows, strict=True))
        )
        seconds = time.monotonic() - started
        return Adversary(self.NAME, trials, seconds, losses, gauge(base, victim, goal, trials, seed))


def depend(*encoded: Conditioning) -> tuple[bool, ...]:
    """Which leaves of encoded prompts depend on the prompt; SDXL's image size, for one, does not."""
    first, *others = (jax.tree.leaves(one) for one in encoded)
    return tuple(any(bool((a != b).any()) for b in same) for a, *same in zip(first, *others, strict=True))


@lru_cache(maxsize=8)
def searcher(
    settings: EncoderOutput, denoiser: Network, schedule: Schedule, structure: Any, free: tuple[bool, ...]
) -> Callable[..., tuple[Conditioning, Float[Array, "cases steps"]]]:
    """The search, compiled once for all models of an architecture.

    structure: of a family's conditioning. free: which of its leaves are searched for.

    Returns a function (the victim's parameters, the base's; and for each case: latents [images, ...], the base's
    conditioning [1, ...], the one to start with, key) -> (conditionings, losses). Step i draws from fold_in(key, i).

    Raises ValueError for a from_t that the schedule does not have.
    """
    total, from_t = schedule.num_train_timesteps, settings.from_t
    if not 0 <= from_t < total:
        raise ValueError(f"from_t={from_t} must be in 0..{total - 1}")

    def together(value: Leaves, start: Conditioning) -> Conditioning:
        own = iter(value)
        leaves = [next(own) if searched else leaf for leaf, searched in zip(jax.tree.leaves(start), free, strict=True)]
        return jax.tree.unflatten(structure, leaves)

    def batch(i: Array, fixed: tuple[Params, Params], case: tuple[Array, Conditioning, Conditioning, Array]) -> Any:
        latents, asked, start, key = case
        image, t, noise = draw(jax.random.fold_in(key, i), settings.batch_size, schedule, latents)
        t = schedule.timestep(from_t + t * (total - from_t) // total)
        x = add_noise(schedule, latents[image], noise, t)
        return x, t, denoiser.apply(fixed[1], x, t, repeated(asked)).astype(x.dtype), start

    def repeated(one: Conditioning) -> Conditioning:
        return jax.tree.map(lambda a: jnp.repeat(a, settings.batch_size, axis=0), one)

    def loss(value: Leaves, drawn: Any, fixed: tuple[Params, Params]) -> Float[Array, ""]:
        x, t, target, start = drawn
        e = denoiser.apply(fixed[0], x, t, repeated(together(value, start))).astype(x.dtype)
        return jnp.mean((e - target) ** 2)

    search = Search(batch, loss, optax.adam(settings.learning_rate), several=True)

    def run(
        weights: Params, base: Params, latents: Array, asked: Conditioning, start: Conditioning, keys: Array
    ) -> Any:
        value = tuple(leaf for leaf, searched in zip(jax.tree.leaves(start), free, strict=True) if searched)
        case = (latents, asked, start, keys)
        state, losses = search.run(search.begin(value), np.arange(settings.steps), (weights, base), case)
        return together(state.value, start), losses

    return run
