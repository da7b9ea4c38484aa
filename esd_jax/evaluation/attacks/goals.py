"""What attacks are to bring back: prompts, what the base draws of them, and what sees the concept."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from esd_jax.demo import captions, vocabulary
from esd_jax.demo.gallery import GUIDANCE, NUM_STEPS
from esd_jax.demo.groups import find_target
from esd_jax.erasure import ConceptText, as_texts
from esd_jax.evaluation.attacks.adversary import Goal
from esd_jax.evaluation.seen import Detect, probed
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample

SUBJECTS = ("cat", "rocket", "house", "rose", "pizza", "owl", "car", "guitar")


def drawn(
    base: Pipeline,
    concept: str,
    prompts: Sequence[str],
    detect: Detect,
    *,
    neutral: Sequence[str] = (),
    images_each: int = 4,
    seed: int = 0,
    skip: bool = False,
    **drawing: Any,
) -> Goal:
    """A goal whose images the base draws: of each prompt equally many, all with the concept.

    Args:
      prompts: that name the concept. neutral: the same without it, if given.
      detect: sees it. Where it does not, another image of the prompt is taken in place.
      skip: leave out prompts of which no image shows the concept.
      **drawing: num_steps, guidance_scale, batch_size of `sample`.

    Raises ValueError for a prompt of which no image shows the concept, with `skip` if that goes for all.
    """
    asked = list(prompts) * images_each
    drawing = {"sampler": "auto", **drawing}
    images = sample(base, asked, seed=[seed + i for i in range(len(asked))], **drawing)
    good = detect(images).reshape(images_each, len(prompts))
    kept = [p for p in range(len(prompts)) if good[:, p].any()]
    if len(kept) < len(prompts) and not (skip and kept):
        missed = next(prompt for p, prompt in enumerate(prompts) if p not in kept)
        raise ValueError(
            f"{concept!r} is seen in no image that the base draws of {missed!r}, so there is nothing to attack with: "
            "choose other prompts, or another detector"
        )
    index = np.arange(len(asked)).reshape(good.shape)
    chosen = np.stack([np.resize(index[good[:, p], p], images_each) for p in kept], axis=1)
    return Goal(
        concept, tuple(prompts[p] for p in kept), images[chosen.ravel()], detect,
        tuple(neutral[p] for p in kept) if neutral else (),
    )  # fmt: skip


def emoji(base: Pipeline, concept: ConceptText, num_prompts: int = 8, images_each: int = 4, seed: int = 0) -> Goal:
    """The goal "neon style", or "a cat", of the embedded model: prompts of several objects, or styles.

    Of several concepts the first is what is to come back; any of them counts as seen.

    Raises ValueError for a concept that the model does not know, or that it draws of no prompt.
    """
    target = find_target(as_texts(concept))
    if target.kind == "style":
        subjects = dict.fromkeys((*SUBJECTS, *vocabulary.objects()))
        pairs = [(name, target.names[0]) for name in subjects][:num_prompts]
        neutral = [captions.prompt(name) for name, _ in pairs]
    else:
        pairs = [(target.names[0], style) for style in vocabulary.styles()][:num_prompts]
        neutral = [captions.prompt(style=style) for _, style in pairs]
    return drawn(
        base, target.concepts[0], [captions.prompt(*pair) for pair in pairs], probed(target),
        neutral=neutral, images_each=images_each, seed=seed, skip=True,
        num_steps=NUM_STEPS, guidance_scale=GUIDANCE, batch_size=32,
    )  # fmt: skip
