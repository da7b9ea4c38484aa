"""preserve="auto": the concepts nearest to what is erased become preserved prompts, beside others that are given.

Two things make a concept near: its prompt is encoded like that of the concept, and the base's predictions for both are
alike. Half of the neighbours are chosen by each, from the prompts of a corpus that do not name the concept.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esd_jax import wording
from esd_jax.erasing import closed_form, corpora
from esd_jax.erasing.closed_form import Encoded
from esd_jax.erasing.images import in_batches
from esd_jax.erasure import AUTO, Concept
from esd_jax.evaluation import testbed
from esd_jax.evaluation.attacks import adversary
from esd_jax.params import Conditioning, Network
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe
from esd_jax.sampling import example_keys, initial_noise

NEIGHBOURS = 8  # of each concept
SHORTLIST = 32  # whose predictions are compared
NOISES, LEVEL = 4, 0.8  # x_t that they are compared at, pure noise taken for t of this part of the schedule
AT_ONCE = 32  # prompts encoded
TOGETHER = 8  # and predicted for, in one shape


def resolved(base: Pipeline, plan: Recipe) -> Recipe:
    """The recipe with its concepts' neighbours in place of "auto"; unchanged without one."""
    texts = [concept.text for concept in plan.concepts]
    return without_auto(plan, "preserve", lambda text, own: [*dict.fromkeys([*own, *nearest(base, text, texts)])])


def without_auto(plan: Recipe, field: str, choose: Callable[[str, list[str]], Sequence[str]]) -> Recipe:
    """The recipe with other texts in a field of those concepts whose texts have "auto" among them.

    choose: a concept, its other texts in the field -> its texts.
    """

    def chosen(concept: Concept) -> Concept:
        if AUTO not in (texts := getattr(concept, field)):
            return concept
        own = [text for text in texts if text != AUTO]
        return dataclasses.replace(concept, **{field: (*choose(concept.text, own),)})

    concepts = tuple(map(chosen, plan.concepts))
    return plan if concepts == plan.concepts else dataclasses.replace(plan, concepts=concepts)


def nearest(base: Pipeline, concept: str, erased: Sequence[str] = (), names: bool = False) -> tuple[str, ...]:
    """The prompts of the base's corpus that are nearest to a concept, the nearest first.

    erased: all that is erased; what names any of it is no neighbour. names: of prompts with no more words than the
    concept. The corpus is the embedded model's captions, or elsewhere names of common things in a few sentences.
    """
    bed = testbed.of(base.provenance.source)
    texts = corpora.without(list(corpora.prompts(bed.corpus if bed else "general")), [concept, *erased])
    texts = [text for text in texts if text and not any(wording.names(one, text) for one in (concept, *erased))]
    if names:
        texts = [text for text in texts if _words(text) <= _words(concept)] or texts
    alike = encoded_alike(base, concept, texts)
    shortlist = [texts[i] for i in np.argsort(-alike, kind="stable")[:SHORTLIST]]
    apart = predicted_apart(base, concept, shortlist)
    by_prediction = [shortlist[i] for i in np.argsort(apart, kind="stable")]
    half = NEIGHBOURS // 2
    return tuple(dict.fromkeys([*shortlist[:half], *by_prediction]))[:NEIGHBOURS]


def _words(text: str) -> int:
    return sum(word not in wording.ARTICLES for word in text.lower().split())


def encoded_alike(base: Pipeline, concept: str, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """The cosine of each text's last token vectors to the concept's, about the mean of all."""
    every = [concept, *texts]
    rows = np.asarray(jnp.concatenate(last_vectors(base, every), axis=1), np.float64)
    rows = rows - rows.mean(axis=0)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows[1:] @ rows[0]


def last_vectors(base: Pipeline, texts: Sequence[str]) -> list[Float[Array, "texts width"]]:
    """The vector of each text's last token that layers read; of each text encoder whose tokens follow one another."""
    chunks = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
    last = lambda part, some: jnp.stack([part[text].vectors[part[text].last] for text in some])  # noqa: E731
    # In turn, since all vectors of all prompts are gigabytes of T5's.
    rows = [[last(part, some) for part in read(base, some)] for some in chunks]
    return [jnp.concatenate(parts) for parts in zip(*rows, strict=True)]


def read(base: Pipeline, texts: Sequence[str]) -> tuple[Mapping[str, Encoded], ...]:
    """What layers read of texts; of each text encoder whose tokens follow one another."""
    readings, names = base.family.readings, base.text_encoders
    tokens, encoders = (readings[0].vectors, readings[0].encoders) if readings else (base.family.vectors, names[:1])
    tokenizers = [tokenizer for name, tokenizer in zip(names, base.tokenizers, strict=True) if name in encoders]
    return closed_form.by_encoder(tokens(in_batches(base.encode_prompts, texts, AT_ONCE)), texts, (), tokenizers)


def predicted_apart(base: Pipeline, concept: str, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """The mean squared difference between the base's predictions for each text and for the concept, from pure noise."""
    own, *others = predictions(base, in_batches(base.encode_prompts, [concept, *texts], AT_ONCE))
    return np.array([np.mean((other - own) ** 2) for other in others])


def predictions(base: Pipeline, encoded: Conditioning, noises: int = NOISES) -> Float[np.ndarray, "prompts noises ..."]:
    """What the base's network predicts for encoded prompts at a few x_t, the same for all."""
    height, width = base.family.default_size(base.configs) or (64, 64)
    noise = initial_noise(base, example_keys(0, noises), (height, width))
    t = jnp.float32(LEVEL * base.schedule.num_train_timesteps)
    network, weights = adversary.denoiser(base)
    denoise = _compiled(network)

    def predicted(conditioning: Conditioning) -> jax.Array:
        count = len(jax.tree.leaves(conditioning)[0])
        return jnp.stack([denoise(weights, jnp.repeat(x[None], count, axis=0), t, conditioning) for x in noise], axis=1)

    return np.asarray(adversary.in_turn(predicted, (encoded,), TOGETHER), np.float64)


@lru_cache(maxsize=2)
def _compiled(network: Network) -> Callable[..., Array]:
    return jax.jit(network.apply)  # whose weights are an input: as constants they would be in the program once more
