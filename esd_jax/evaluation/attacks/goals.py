"""What attacks try to recover: prompts, the base's images of them, and a detector of the concept."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from esd_jax.evaluation.attacks.adversary import Goal, Kept
from esd_jax.evaluation.drawing import sampled
from esd_jax.evaluation.seen import Detect
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample


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
    kept: Sequence[Kept] = (),
    **drawing: Any,
) -> Goal:
    """A goal with the base's images: of each prompt equally many, all with the concept.

    Args:
      prompts: that name the concept. neutral: the same without it, if any.
      detect: detects it. Where it does not, another image of the prompt takes its place.
      skip: leave out prompts of which no image shows the concept.
      kept: other concepts, for probes that ask for them.
      **drawing: steps, guidance_scale, batch_size of `sample`.

    Raises ValueError for a prompt of which no image shows the concept, with `skip` if that goes for all.
    """
    asked = list(prompts) * images_each
    drawing = {"sampler": "auto", **drawing}
    images = sample(base, asked, seed=[seed + i for i in range(len(asked))], **sampled(drawing))
    good = detect(images).reshape(images_each, len(prompts))
    shown = [p for p in range(len(prompts)) if good[:, p].any()]
    if len(shown) < len(prompts) and not (skip and shown):
        missed = next(prompt for p, prompt in enumerate(prompts) if p not in shown)
        raise ValueError(
            f"{concept!r} is detected in none of the base's {images_each} images of {missed!r}, so there is nothing to "
            "attack with: choose other prompts, or another detector"
        )
    index = np.arange(len(asked)).reshape(good.shape)
    chosen = np.stack([np.resize(index[good[:, p], p], images_each) for p in shown], axis=1)
    return Goal(
        concept, tuple(prompts[p] for p in shown), images[chosen.ravel()], detect,
        tuple(neutral[p] for p in shown) if neutral else (), tuple(kept),
    )  # fmt: skip
