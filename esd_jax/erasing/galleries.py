"""What the searches of inversion rounds know of the concepts: prompts with and without them, and images of the base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esd_jax import streamed
from esd_jax.erasing import contexts, inversion
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.contexts import Context
from esd_jax.erasing.images import in_batches, sampled
from esd_jax.erasing.inversion import Gallery
from esd_jax.erasing.method import Tools
from esd_jax.erasing.round_settings import RoundsSettings
from esd_jax.erasing.soft_tokens import Text
from esd_jax.erasing.textual_inversion import NAME, Encoder, together

AT_ONCE = 8  # prompts encoded


class Prompts(NamedTuple):
    """Of one concept, each a row. template: with "{concept}" in its place. named, neutral: with and without it."""

    template: Sequence[str]
    named: Sequence[str]
    neutral: Sequence[str]


def prompts_of(
    concepts: Sequence[Concept], sentences: Sequence[Context], roles: Mapping[str, Callable[[Concept], str]]
) -> list[Prompts]:
    """Each concept alone and in every context, with what a method with these roles trains them towards.

    Raises ValueError for a concept with `from_`.
    """
    prompts = []
    for concept in concepts:
        if concept.from_ is not None:
            raise ValueError(f"rounds_every is for concepts that are erased everywhere: {concept.text!r} has from_")
        rows = contexts.expanded([concept], sentences)
        named = [roles["student"](row) for row in rows]
        neutral = [roles["anchor"](row) for row in rows]
        template = [roles["student"](row) for row in contexts.expanded([replace(concept, text=NAME)], sentences)]
        prompts.append(Prompts(template, named, ["" if n == p else n for p, n in zip(named, neutral, strict=True)]))
    return prompts


def text_of(tools: Tools) -> Text:
    """The text encoders of a checkpoint."""
    names = tuple(tools.text_encoders)
    tables = tuple(tools.tables[name] for name in names)
    networks = together(tools.text_encoders[name] for name in names)
    params = together(dict(tools.params[name]) for name in names)
    encoder = Encoder(networks, tools.condition, tuple(table.tensor for table in tables))
    return Text(encoder, params, tuple(tools.tokenizers[name] for name in names), tables)


def own_params(tools: Tools) -> Any:
    """The text encoders' tensors for a run, which may move its base away: copies on devices, in the compute dtype."""
    every = (value for params in tools.params.values() for value in params.values())
    dtype = next(value.dtype for value in every if not isinstance(value, np.memmap))
    return together(streamed.loaded(tools.params[name], dtype, copy=True) for name in tools.text_encoders)


def placed(text: Text, kinds: Sequence[int], prompts: Sequence[Prompts]) -> list[Any]:
    """The ids of each kind of adversary in each template of each concept. Raises ValueError for too many tokens."""
    return [text.place(template, length) for length in kinds for one in prompts for template in one.template]


def make_gallery(
    settings: RoundsSettings,
    tools: Tools,
    text: Text,
    kinds: Sequence[int],
    prompts: Sequence[Prompts],
    images: Array | None,
    sampling: Mapping[str, Any],
) -> Gallery:
    """The gallery of the concepts, with the text encoders' tensors as its own: a run may move its base away.

    images: latents [concepts, rows, images, ...]; None: they are drawn here, `sampling` being options of
      `Tools.sample`.
    """
    count, rows = settings.rounds_images, len(prompts[0].named)
    ids = jax.tree.map(
        lambda *each: jnp.asarray(np.stack(each).reshape(len(kinds), len(prompts), rows, -1), jnp.int32),
        *placed(text, kinds, prompts),
    )

    def encoded(texts: list[str]) -> Any:
        return jax.tree.map(
            lambda a: a.reshape(len(prompts), rows, *a.shape[1:]), in_batches(tools.encode, texts, AT_ONCE)
        )

    named, neutral = (encoded([t for one in prompts for t in getattr(one, name)]) for name in ("named", "neutral"))
    if images is None:
        asked = [text for one in prompts for text in one.named]
        drawn = sampled(tools, asked, count, seed=settings.rounds_seed, **sampling)
        images = drawn.reshape(len(prompts), rows, *drawn.shape[1:])
    radius = settings.rounds_radius * inversion.mean_distance(named, neutral)
    return Gallery(images, ids, named, neutral, own_params(tools), radius)
