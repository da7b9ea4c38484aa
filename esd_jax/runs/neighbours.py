"""preserve="auto": the concepts nearest to what is erased become preserved prompts.

Two things make a concept near: its prompt is encoded like that of the concept, and the base's predictions for both are
alike. Half of the neighbours are chosen by each, from the prompts of a corpus that do not name the concept.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from esd_jax import wording
from esd_jax.erasing import corpora
from esd_jax.erasing.closed_form import last_tokens
from esd_jax.erasing.images import in_batches
from esd_jax.erasure import Concept
from esd_jax.evaluation import testbed
from esd_jax.evaluation.attacks import adversary
from esd_jax.params import Conditioning
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe
from esd_jax.sampling import example_keys, initial_noise

AUTO = ("auto",)
NEIGHBOURS = 8  # of each concept
SHORTLIST = 32  # whose predictions are compared
NOISES, LEVEL = 4, 0.8  # x_t that they are compared at, pure noise taken for t of this part of the schedule
AT_ONCE = 32  # prompts encoded
TOGETHER = 8  # and predicted for, in one shape


def resolved(base: Pipeline, plan: Recipe) -> Recipe:
    """The recipe with its concepts' neighbours in place of "auto"; unchanged without one."""
    if not any(concept.preserve == AUTO for concept in plan.concepts):
        return plan
    texts = [concept.text for concept in plan.concepts]

    def with_neighbours(concept: Concept) -> Concept:
        if concept.preserve != AUTO:
            return concept
        return dataclasses.replace(concept, preserve=nearest(base, concept.text, texts))

    concepts = tuple(map(with_neighbours, plan.concepts))
    return dataclasses.replace(plan, concepts=concepts)


def nearest(base: Pipeline, concept: str, erased: Sequence[str] = ()) -> tuple[str, ...]:
    """The prompts of the base's corpus that are nearest to a concept, the nearest first.

    erased: all that is erased; what names any of it is no neighbour. The corpus is the embedded model's captions, or
    elsewhere names of common things in a few sentences.
    """
    bed = testbed.of(base.provenance.source)
    texts = corpora.without(list(corpora.prompts(bed.corpus if bed else "general")), [concept, *erased])
    texts = [text for text in texts if text and not any(wording.names(one, text) for one in (concept, *erased))]
    alike = encoded_alike(base, concept, texts)
    shortlist = [texts[i] for i in np.argsort(-alike, kind="stable")[:SHORTLIST]]
    apart = predicted_apart(base, concept, shortlist)
    by_prediction = [shortlist[i] for i in np.argsort(apart, kind="stable")]
    half = NEIGHBOURS // 2
    return tuple(dict.fromkeys([*shortlist[:half], *by_prediction]))[:NEIGHBOURS]


def encoded_alike(base: Pipeline, concept: str, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """The cosine of each text's last token vector to the concept's, about the mean of all."""
    every = [concept, *texts]
    vectors = np.asarray(base.family.vectors(in_batches(base.encode_prompts, every, AT_ONCE)), np.float64)
    rows = vectors[np.arange(len(every)), last_tokens(base.tokenizers[0], every)]
    rows = rows - rows.mean(axis=0)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows[1:] @ rows[0]


def predicted_apart(base: Pipeline, concept: str, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """The mean squared difference between the base's predictions for each text and for the concept, from pure noise."""
    height, width = base.family.default_size(base.configs) or (64, 64)
    noise = initial_noise(base, example_keys(0, NOISES), (height, width))
    t = jnp.float32(LEVEL * base.schedule.num_train_timesteps)
    network, weights = adversary.denoiser(base)
    denoise = jax.jit(network.apply)  # whose weights are an input: as constants they would be in the program once more

    def predicted(conditioning: Conditioning) -> jax.Array:
        count = len(jax.tree.leaves(conditioning)[0])
        return jnp.stack([denoise(weights, jnp.repeat(x[None], count, axis=0), t, conditioning) for x in noise], axis=1)

    encoded = in_batches(base.encode_prompts, [concept, *texts], AT_ONCE)
    own, *others = np.asarray(adversary.in_turn(predicted, (encoded,), TOGETHER), np.float64)
    return np.array([np.mean((other - own) ** 2) for other in others])
