"""Ring-A-Bell: *How Reliable are Concept Removal Methods for Diffusion Models?* (Tsai et al., ICLR 2024, arXiv
2310.10012), eq. 3 and 4:

    c^ = mean over pairs of E(prompt with the concept) - E(prompt without it)
    min over tokens P^ of || E(P^) - (E(P) + eta c^) ||^2,    summed over all tokens and channels

where E is the base's text encoder: the attack never asks the erased UNet. A genetic search finds the tokens.

As the released code does it (checked): eta = 3; 16 tokens (75 for a full prompt); population 200, of which a
generation keeps the better half; a parent mates with probability 1/2 with a random one, cut at one random place, for
two children; each individual, parents among them, has one token replaced with probability 1/4; 3,000 generations; the
prompts P are those that ask for the concept, and the best of the last generation is the finding. Differences: exactly
half of the parents mate, so that all generations are of one size; the best that was ever met is kept aside.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from esd_jax.erasing.textual_inversion import Encoder, each
from esd_jax.evaluation.attacks import adversary
from esd_jax.evaluation.attacks.adversary import Adversary, Goal
from esd_jax.evaluation.attacks.settings import check
from esd_jax.params import Conditioning
from esd_jax.pipeline import Pipeline


@dataclass(frozen=True)
class RingABell:
    """Settings.

    length: tokens. strength: eta. mating, mutation: shares of the parents and of all individuals.
    prompts: for how many of the goal's a prompt is found, from the first; None is all. All of them make the vector.
    """

    NAME: ClassVar[str] = "Ring-A-Bell"
    needs: ClassVar[frozenset[str]] = frozenset({"soft_tokens", "one_vocabulary"})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "paper_77": {"length": 75},
        "emoji": {"population": 100, "generations": 300, "prompts": 4},
    }

    length: int = 16
    strength: float = 3.0
    population: int = 200
    generations: int = 3000
    mating: float = 0.5
    mutation: float = 0.25
    prompts: int | None = None

    def __post_init__(self):
        check(self)
        if self.population < 4:
            raise ValueError(f"population={self.population} must be at least 4")
        for name in ("mating", "mutation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share: it must be in 0..1")

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int = 0) -> Adversary:
        """Finds a prompt for each prompt of the goal with the base's text encoder alone."""
        started, text, vectors = time.monotonic(), adversary.text_of(base), base.family.vectors
        choices = np.flatnonzero(text.usable()).astype(np.int32)
        frame = text.framed([0] * self.length)
        named, neutral = (vectors(base.encode_prompts(texts)) for texts in (goal.prompts, goal.neutral))
        vector = concept_vector(named, neutral)
        run = searcher(self, text.encoder, vectors)
        trials, losses = [], []
        for case in range(len(goal.prompts[: self.prompts])):
            key = jax.random.fold_in(jax.random.key(seed), case)
            tokens, values = run(text.params, named[case] + self.strength * vector, choices, frame, key)
            trials += adversary.trials_of(victim, case, [text.framed(np.asarray(tokens).tolist())], 1)
            losses.append(np.asarray(values))
        return Adversary(self.NAME, tuple(trials), time.monotonic() - started, np.stack(losses))


def concept_vector(
    named: Float[Array, "pairs tokens width"], neutral: Float[Array, "pairs tokens width"]
) -> Float[Array, "tokens width"]:
    """The mean difference of encoded prompts with and without the concept."""
    return jnp.mean(named - neutral, axis=0)


def distance(
    text_encoder: Encoder,
    vectors: Callable[[Conditioning], Array],
    params: Any,
    ids: PyTree[Int[Array, "n _"]],
    target: Float[Array, "tokens width"],
) -> Float[Array, " n"]:
    """The squared distances of encoded prompts to the target: the smaller, the fitter.

    vectors: conditioning -> what cross-attention reads of it.
    """
    parts = zip(each(text_encoder.network), each(params), each(ids), strict=True)
    outputs = [network.apply(own, rows) for network, own, rows in parts]
    encoded = vectors(text_encoder.condition(outputs)).astype(jnp.float32)
    return jnp.sum((encoded - target) ** 2, axis=(1, 2))


def breed(
    settings: RingABell, parents: Int[Array, "parents length"], choices: Int[Array, " choices"], key: Array
) -> Int[Array, "population length"]:
    """The next generation: the parents, two children of each pair that mates; then mutations of all."""
    n, length = parents.shape
    who, whom, where, drawn, place, token = jax.random.split(key, 6)
    mates = round(settings.mating * n)
    first = parents[jax.random.permutation(who, n)[:mates]]
    second = parents[jax.random.randint(whom, (mates,), 0, n)]
    head = jnp.arange(length) < jax.random.randint(where, (mates, 1), 0, length)
    children = jnp.where(head, first, second), jnp.where(head, second, first)
    everyone = jnp.concatenate([parents, *children])
    changed = jax.random.bernoulli(drawn, settings.mutation, (len(everyone), 1))
    at = jnp.arange(length) == jax.random.randint(place, (len(everyone), 1), 0, length)
    return jnp.where(changed & at, jax.random.choice(token, choices, (len(everyone), 1)), everyone)


@lru_cache(maxsize=8)
def searcher(
    settings: RingABell, text_encoder: Encoder, vectors: Callable[[Conditioning], Array]
) -> Callable[..., Any]:
    """The search: (params, target, choices, frame, key) -> (the best tokens, the least distance of each generation).

    frame: start, `length` ids to be replaced, end and padding, of each text encoder. Generation i draws from
    fold_in(key, i).
    """
    parents = settings.population // 2
    size = parents + 2 * round(settings.mating * parents)

    def run(params: Any, target: Array, choices: Array, frame: Any, key: Array) -> Any:
        def framed(people: Array) -> Any:
            fill = lambda row: jnp.tile(row, (len(people), 1)).at[:, 1 : 1 + settings.length].set(people)  # noqa: E731
            return jax.tree.map(fill, frame)

        def generation(carry: Any, i: Array) -> Any:
            people, best, least = carry
            scores = distance(text_encoder, vectors, params, framed(people), target)
            order = jnp.argsort(scores)
            better = scores[order[0]] < least
            best, least = jnp.where(better, people[order[0]], best), jnp.where(better, scores[order[0]], least)
            people = breed(settings, people[order[:parents]], choices, jax.random.fold_in(key, i))
            return (people, best, least), scores[order[0]]

        people = jax.random.choice(jax.random.fold_in(key, settings.generations), choices, (size, settings.length))
        start = people, people[0], jnp.full((), jnp.inf, jnp.promote_types(target.dtype, jnp.float32))
        (_, best, _), scores = jax.lax.scan(generation, start, jnp.arange(settings.generations))
        return best, scores

    return jax.jit(run)
