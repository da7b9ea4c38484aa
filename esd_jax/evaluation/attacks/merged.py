"""Does an erasure survive a LoRA that is merged on top, as users merge them every day?

    W = W_erased + strength A B,    A, B: a LoRA, here one that erases another concept from the base:
    min over A, B of E || e_{W_base + A B}(x_t, t, c(p)) - e_{W_base}(x_t, t, c("")) ||^2

p is a prompt of the other concept, and x_t a noised image that the base drew of it. A LoRA of your own is merged from
its file instead. The tensors that both change may then hold less of the erasure: the erased concept may come back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from esd_jax import lora
from esd_jax.diffusion.schedule import Schedule, add_noise
from esd_jax.erasing.textual_inversion import draw
from esd_jax.erasure import Erasure
from esd_jax.evaluation.attacks import adversary
from esd_jax.evaluation.attacks.adversary import BASE, ERASED, PLACEBO, Goal, Kept
from esd_jax.evaluation.attacks.fine_tuning import BENIGN, Batch, Fixed, lacking_subset, sampled_once, tuner
from esd_jax.evaluation.attacks.prompts import OwnPrompts
from esd_jax.evaluation.attacks.scoring import Scored, score
from esd_jax.evaluation.attacks.settings import check
from esd_jax.inputs import expanded
from esd_jax.io.exact import read_each
from esd_jax.io.lora_merge import merge_lora
from esd_jax.io.safetensors import read_header
from esd_jax.params import Conditioning, Network, Params, cast, partition, prefixed
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample
from esd_jax.selection import select


@dataclass(frozen=True)
class MergedLoRA:
    """Settings.

    file: a LoRA; "" trains one that erases `concept`, or the first that the goal keeps.
    strength: with which it is merged. subset, rank: of the trained one.
    """

    NAME: ClassVar[str] = "merged LoRA"
    MODELS: ClassVar[frozenset[str]] = frozenset({BASE, ERASED, PLACEBO})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "emoji": {"steps": 200, "learning_rate": 1e-3},
    }
    needs: ClassVar[frozenset[str]] = frozenset()
    ASKS_KEPT: ClassVar[bool] = True

    file: str = ""
    concept: str | None = None
    strength: float = 1.0
    steps: int = 1000
    learning_rate: float = 1e-4
    batch_size: int = 4
    subset: str = "attn"
    rank: int = 8

    def __post_init__(self):
        check(self, rank=1)

    def lacks(self, base: Pipeline, goal: Goal | None) -> str:
        """A file that is one of tensors; without one, a subset that the base's family has, and another concept."""
        if self.file:
            try:
                read_header(expanded(self.file))
            except (OSError, ValueError) as error:
                return f"{self.NAME} needs its file: {error}"
            return ""
        if reason := lacking_subset(self.NAME, self.subset, base):
            return reason
        if goal is None or self.concept or goal.kept:
            return ""
        return f"{self.NAME} needs another concept, which the goal does not have: name one, or the file of a LoRA"

    def probe(
        self, base: Pipeline, victim: Pipeline, goal: Goal, seeds: Sequence[int], seed: int = 0, **drawing: Any
    ) -> tuple[Scored, ...]:
        """The goal's prompts with the LoRA merged; and what detects the other concept, if anything does, on its prompt.

        Raises ValueError for a goal, or a base, that lacks something; FileNotFoundError for an absent file.
        """
        if reason := self.lacks(base, goal):
            raise ValueError(reason)
        prompts = OwnPrompts().run(base, victim, goal, seed)
        if self.file:
            merged = merge_lora(victim, self.file, self.strength)
            return (replace(score(merged, prompts, goal, seeds, **drawing), name="target prompts, LoRA merged"),)
        text = self.concept or goal.kept[0].text
        drawing_of_lora = tuple(sorted(drawing.items()))
        merged = _with_change(victim, change(base, text, self, seed, drawing_of_lora), self.strength, text)
        scored = score(merged, prompts, goal, seeds, **drawing)
        rows = (replace(scored, name=f"target prompts, LoRA that erases {text!r} merged"),)
        return rows + tuple(
            self._control(merged, kept, scored, seeds, **drawing) for kept in goal.kept if kept.text == text
        )

    def _control(self, merged: Pipeline, kept: Kept, like: Scored, seeds: Sequence[int], **drawing: Any) -> Scored:
        """Whether the LoRA erases what it is of: its prompt, as many images as of the goal's prompts."""
        trials = len(like.cases)
        every = [int(s) + 1000 * trial for trial in range(trials) for s in seeds]
        images = sample(merged, [kept.text] * len(every), seed=every, sampler="auto", **drawing)
        hits = np.asarray(kept.detect(images), bool)
        shape = trials, len(seeds)
        name = f"{kept.text!r}, LoRA that erases it merged"
        return Scored(name, hits.reshape(shape), images.reshape(*shape, *images.shape[1:]), tuple(range(trials)))


def _with_change(victim: Pipeline, change: Params, strength: float, text: str) -> Pipeline:
    """The pipeline with a multiple of a change added to its denoiser, at full precision."""
    changes = prefixed(change, victim.denoiser)
    edits = ((name, first + strength * changes[name]) for name, first in read_each(victim, changes))
    return victim.with_edits(edits, Erasure(lora=f"trained: erases {text!r}", strength=strength))


@lru_cache(maxsize=1)
def change(
    base: Pipeline, text: str, settings: MergedLoRA, seed: int, drawing: tuple[tuple[str, Any], ...] = ()
) -> Params:
    """The weight change A B of a LoRA that erases a text from the base: tensor of the denoiser -> its change.

    Trained once for all models that it is merged into.
    """
    images = sampled_once(base, (text,) * BENIGN, drawing)
    network, weights = adversary.denoiser(base)
    names = select(settings.subset, network.layouts, base.family.subsets)
    first = {name: jnp.asarray(weights[name], jnp.float32) for name in lora.adaptable(names, network.shapes)}
    _, frozen = partition(weights, first)
    start, key = jax.random.split(jax.random.key(seed))
    theta = lora.initial(first, settings.rank, start)
    latents = adversary.latents(base, images)
    run = trainer(settings, network, adversary.schedule_of(base, latents), jnp.dtype(base.dtype).name)
    named, neutral = (base.encode_prompts([prompt]) for prompt in (text, ""))
    theta = run(theta, Fixed(frozen, first), latents, named, neutral, key)[0]
    return {name: value - first[name] for name, value in lora.weights(theta, first).items()}


@lru_cache(maxsize=8)
def trainer(settings: MergedLoRA, network: Network, schedule: Schedule, dtype: str) -> Callable[..., Any]:
    """(theta, fixed, latents, c(p), c(""), key) -> (theta, losses); step i uses fold_in(key, i)."""

    def batch(i: Array, fixed: Fixed, case: tuple[Array, Conditioning, Conditioning, Array]) -> Batch:
        latents, named, neutral, key = case
        image, t, noise = draw(jax.random.fold_in(key, i), settings.batch_size, schedule, latents)
        t = schedule.timestep(t)
        x = add_noise(schedule, latents[image], noise, t)
        named, neutral = jax.tree.map(lambda a: jnp.repeat(a, settings.batch_size, axis=0), (named, neutral))
        known = {**fixed.frozen, **cast(fixed.first, dtype)}
        return Batch(x, t, named, network.apply(known, x, t, neutral).astype(x.dtype))

    tx = optax.adamw(settings.learning_rate, weight_decay=0.0)
    return tuner(network, batch, tx, settings.steps, lora.weights, dtype)
