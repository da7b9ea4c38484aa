"""STEREO in torch: an update's x_t and target in each stage, on words that a text encoder reads; and a tiny method."""

from collections.abc import Sequence
from typing import Any

import esd_oracle
import torch
from ablating_world import Studio
from rounds_world import Words

from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.retention import Retention, retaining
from esd_jax.methods.stereo import STEREO

CONCEPTS = (Concept("clay", strength=0.5), Concept("cat", replace_with=("the photo",)))
TINY: dict[str, Any] = {
    "search_rounds": 2, "search_updates": 2, "contexts": "a photo of {}: a photo | photo of a {}: photo of a",
    "inversion_steps": 3, "inversion_tokens": "style", "template": "photo of {concept}; the {concept}",
    "drawn_images": 5,
}  # fmt: skip
ANCHORS = {"clay": ["a photo", "photo of a"], "cat": ["the photo", "a photo", "photo of a"]}


def make(w: Words, concepts: Sequence[Concept] = CONCEPTS, kept: Any = None, **fields: Any) -> Any:
    """(method, inputs) of STEREO, of `TINY` with some fields changed; kept: fields of `Retention`."""
    tools = w.tools_with(Studio().sample)
    method, inputs = STEREO(**{**TINY, **fields}).make(tools, concepts)
    return retaining(method, inputs, tools, concepts, Retention(**kept)) if kept else (method, inputs)


def searched(models: esd_oracle.Models, texts: Sequence[str], noise: torch.Tensor, i: int) -> esd_oracle.Target:
    """Of the first stage, which erases a text: the target is the base's prediction for the empty prompt."""
    drawn = esd_oracle.alt(models, [(text, None) for text in texts], noise, i)
    return esd_oracle.Target(drawn.x, drawn.t, list(texts), models.e_star(drawn.x, drawn.t, [""] * len(texts)))


def erased(
    models: esd_oracle.Models,
    texts: Sequence[str],
    anchors: Sequence[str],
    negatives: Sequence[Sequence[str]],
    strengths: Sequence[float],
    noise: torch.Tensor,
    i: int,
    s: float = 2.0,
) -> esd_oracle.Target:
    """Of the second. texts, anchors: what each example has drawn. negatives: all texts of its concept."""
    drawn = esd_oracle.alt(models, [(text, None) for text in texts], noise, i)
    null = models.e_star(drawn.x, drawn.t, [""] * len(texts))
    towards = models.e_star(drawn.x, drawn.t, list(anchors)) - null
    away = [models.e_star(drawn.x, drawn.t, list(column)) - null for column in zip(*negatives, strict=True)]
    strength = torch.tensor(strengths, dtype=null.dtype)[:, None, None, None]
    target = null + (s - 1) * towards - strength * (s + 1) * torch.stack(away).mean(0)
    return esd_oracle.Target(drawn.x, drawn.t, list(texts), target)
