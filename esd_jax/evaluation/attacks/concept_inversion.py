"""Concept Inversion: *Circumventing Concept Erasure Methods* (Pham et al., ICLR 2024, arXiv 2308.01508).

    v* = argmin over v of E || e'(x_t, t, c(p(v))) - eps ||^2,    x_0 an image of the concept that the base drew

where e' is the erased network and p(v) is the image's prompt with new tokens, whose embeddings v alone are learned, in
place of the concept. It is textual inversion in the erased model: its weights stay as they are. Of a model with several
text encoders (SDXL, SD3, FLUX.1) each new token has an embedding in each, and all are learned at once.

The released code (checked: its scripts for ESD, UCE, FMN, AC, SA and negative prompts): AdamW with weight decay 0.01;
25 images, half of them mirrored; 5,000 updates, each of 4 batches of 4 images; the learning rate 5e-3 is multiplied by
these 16. The embeddings start from a word of the user's ("art"); their norms are left alone. Here an update sees one
batch and the learning rate is not multiplied; prompts are the images' own, where the code fills random templates ("a
painting in the style of v*") except on I2P. For SLD and negative prompts the code inverts through the guidance; these
erase without training, and are not attacked here.

What a small budget is best spent on (measured on the embedded model, neon style erased by ESD-x): the prompt decides
little where much of the picture shows. The base's loss falls by 8% at t above 800 if its prompt names the style, and by
1% over all t. So "emoji" learns at t of 900 and more, and 16 tokens, which reach what one does not.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.soft_tokens import Text
from esd_jax.erasing.textual_inversion import NAME, Encoder, TextualInversion
from esd_jax.evaluation.attacks import adversary
from esd_jax.evaluation.attacks.adversary import Adversary, Goal, Trial
from esd_jax.evaluation.attacks.gauge import gauge
from esd_jax.evaluation.attacks.settings import beyond, check
from esd_jax.params import Network
from esd_jax.pipeline import Pipeline


@dataclass(frozen=True)
class ConceptInversion:
    """Settings.

    tokens: new ones, side by side.
    start: from which the new tokens start, one for all or one for each, separated by "|": a word that is one token, or
      "<rand-S>", S times unit Gaussian noise; None starts from the mean of the vocabulary.
    mirror: learn from the mirrored images, too.
    from_t: the least timestep that is learned at.
    member: of a family of searches; it is added to the seed, and the label says how its members differ.
    """

    NAME: ClassVar[str] = "concept inversion"
    needs: ClassVar[frozenset[str]] = frozenset({"soft_tokens"})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "emoji": {"steps": 400, "learning_rate": 2e-2, "tokens": 16, "start": "<rand-0.09>", "from_t": 900},
    }

    steps: int = 3000
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    batch_size: int = 4
    tokens: int = 1
    start: str | None = None
    mirror: bool = True
    from_t: int = 0
    member: int | None = None

    def __post_init__(self):
        check(self)
        if self.start and "|" in self.start and (words := self.start.count("|") + 1) != self.tokens:
            raise ValueError(f"start={self.start!r} has {words} words for {self.tokens} new tokens")

    @property
    def label(self) -> str:
        """The attack's name; of a member of a family, with its settings."""
        if self.member is None:
            return self.NAME
        tokens = f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        return f"{self.NAME} {self.member + 1}: {tokens}, t >= {self.from_t}, from {self.start or 'the mean'}"

    def lacks(self, base: Pipeline, goal: Goal | None) -> str:
        """A timestep `from_t`."""
        return beyond(self.NAME, self.from_t, base)

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int = 0) -> Adversary:
        """Learns new tokens of `victim`; a trial is a prompt of the goal with them in place of the concept."""
        started, text = time.monotonic(), adversary.text_of(victim)
        ids = adversary.stacked([text.place(template, self.tokens) for template in goal.templates])
        images = np.concatenate([goal.images, goal.images[:, :, ::-1]]) if self.mirror else goal.images
        shown = np.tile(np.arange(len(goal.images)) % len(goal.prompts), 2 if self.mirror else 1)
        unet, weights = adversary.denoiser(victim)
        alike = replace(self, tokens=1, start=None, mirror=True, member=None)  # which change nothing that is compiled
        latents = adversary.latents(base, images)
        run = searcher(alike, unet, text.encoder, adversary.schedule_of(victim, latents))
        start_key, key = jax.random.split(jax.random.key(seed + (self.member or 0)))
        new, losses = run(
            weights, text.params, latents,
            jax.tree.map(lambda rows: jnp.asarray(rows[shown]), ids), self._initial(text, start_key), key,
        )  # fmt: skip
        mark = "<v*>" if self.tokens == 1 else f"<v* of {self.tokens} tokens>"
        texts = [template.replace(NAME, mark) for template in goal.templates]
        rows = adversary.conditionings(victim, ids, new, text)
        trials = tuple(Trial(text, row, case) for case, (text, row) in enumerate(zip(texts, rows, strict=True)))
        losses = np.asarray(losses)[None]  # waits for the search
        seconds = time.monotonic() - started
        return Adversary(self.label, trials, seconds, losses, gauge(base, victim, goal, trials, seed))

    def _initial(self, text: Text, key: Array) -> PyTree[Float[Array, "new _"]]:
        if self.start is None:
            return text.mean(self.tokens)
        starts = self.start if "|" in self.start else "|".join([self.start] * self.tokens)
        return text.initial(starts, key)


def family(settings: ConceptInversion, *, whole: bool = False) -> tuple[ConceptInversion, ...]:
    """Searches that differ in tokens, timesteps, start and seed, since a defence may be tuned to one of them.

    Of 1, 4 and 16 tokens; t from 0, 600 and 900 on; a random start, or the vocabulary's mean. By default six members,
    which cover every value of each, and most pairs; `whole`: all 18, three times. An erasure is as good as the worst.
    """
    random = settings.start or "<rand-0.09>"
    chosen: Sequence[tuple[int, int, str | None]] = [
        (16, 900, random), (16, 0, None), (4, 600, random), (4, 900, None), (1, 0, random), (1, 600, None)
    ]  # fmt: skip
    if whole:
        chosen = list(itertools.product((1, 4, 16), (0, 600, 900), (random, None))) * 3
    return tuple(
        replace(settings, tokens=tokens, from_t=from_t, start=start, member=member)
        for member, (tokens, from_t, start) in enumerate(chosen)
    )


@lru_cache(maxsize=8)
def searcher(
    settings: ConceptInversion, unet: Network, text_encoder: Encoder, schedule: Schedule
) -> Callable[..., Any]:
    """The search, compiled once for all models of an architecture: `textual_inversion.inverter` with no pull on norms.

    Raises ValueError for a from_t that the schedule does not have.
    """
    inversion = TextualInversion(
        settings.steps, settings.learning_rate, settings.weight_decay,
        norm=None, batch_size=settings.batch_size, from_t=settings.from_t,
    )  # fmt: skip
    return textual_inversion.inverter(inversion, unet, text_encoder, schedule)
