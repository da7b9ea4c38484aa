"""Goals on the embedded model, judged by its probe."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, UInt8

from esd_jax.demo import captions, probe, vocabulary
from esd_jax.demo.gallery import GUIDANCE, NUM_STEPS
from esd_jax.demo.groups import Target, parse_target
from esd_jax.evaluation.attacks.adversary import Goal
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample

SUBJECTS = ("cat", "rocket", "house", "rose", "pizza", "owl", "car", "guitar")


def goal(base: Pipeline, concept: str, num_prompts: int = 8, images_each: int = 4, seed: int = 0) -> Goal:
    """The goal "neon style", or "a cat": prompts of several objects or styles, and what the base draws of them.

    Only images in which the probe sees the concept are given to the attacks; a prompt's others are replaced by these.

    Raises ValueError for a concept that the model does not know, or that it draws of no prompt.
    """
    target = parse_target(concept)
    if target.kind == "style":
        subjects = dict.fromkeys((*SUBJECTS, *vocabulary.objects()))
        pairs = [(name, target.names[0]) for name in subjects][:num_prompts]
        neutral = [captions.prompt(name) for name, _ in pairs]
    else:
        pairs = [(target.names[0], style) for style in vocabulary.styles()][:num_prompts]
        neutral = [captions.prompt(style=style) for _, style in pairs]
    prompts = [captions.prompt(*pair) for pair in pairs]
    detect = detector(target)
    asked = prompts * images_each
    drawn = sample(
        base, asked, seed=[seed + i for i in range(len(asked))],
        num_steps=NUM_STEPS, guidance_scale=GUIDANCE, batch_size=32,
    )  # fmt: skip
    good = detect(drawn).reshape(images_each, len(prompts))
    index = np.arange(len(asked)).reshape(good.shape)
    kept = [p for p in range(len(prompts)) if good[:, p].any()]
    if not kept:
        raise ValueError(f"the base draws {concept!r} of none of its prompts: there is nothing to attack with")
    chosen = np.stack([np.resize(index[good[:, p], p], images_each) for p in kept], axis=1)
    return Goal(
        target.concepts[0], tuple(prompts[p] for p in kept), drawn[chosen.ravel()], detect,
        tuple(neutral[p] for p in kept),
    )  # fmt: skip


def detector(target: Target) -> Callable[[UInt8[np.ndarray, "n 64 64 3"]], Bool[np.ndarray, " n"]]:
    """images -> in which of them the probe sees the target."""
    names = {"style": vocabulary.styles(), "object": vocabulary.objects()}[target.kind]
    wanted = [names.index(name) for name in target.names]

    def detect(images: UInt8[np.ndarray, "n 64 64 3"]) -> Bool[np.ndarray, " n"]:
        verdict = probe.classify(images)
        return verdict.recognised & np.isin(verdict.styles if target.kind == "style" else verdict.objects, wanted)

    return detect
