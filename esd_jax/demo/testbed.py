"""The embedded models as testbeds: their captions, their probe, and budgets that their size allows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from esd_jax.demo import FLOW, MODEL, captions, groups, probe, protocol, vocabulary
from esd_jax.demo.gallery import GUIDANCE, NUM_STEPS, Gallery
from esd_jax.demo.groups import Target
from esd_jax.evaluation.attacks import goals
from esd_jax.evaluation.attacks.adversary import Goal, Kept
from esd_jax.evaluation.evidence import Evidence
from esd_jax.evaluation.gather import Metric
from esd_jax.evaluation.seen import Detect, Question
from esd_jax.evaluation.testbed import register
from esd_jax.pipeline import Pipeline

SUBJECTS = ("cat", "rocket", "house", "rose", "pizza", "owl", "car", "guitar")


class Emoji:
    """See `evaluation.testbed.Testbed`. recipes: (method, kind) -> a config that the rule of `config` does not name."""

    images: Mapping[str, int] = MappingProxyType({"smoke": 8, "quick": 24, "emoji": 200})
    budget = "emoji"
    sampling: Mapping[str, Any] = MappingProxyType({"num_steps": NUM_STEPS, "guidance_scale": GUIDANCE})
    commands: Mapping[str, str] = MappingProxyType({"heat": "esd-jax evaluate RUN --protocol=emoji"})
    detector_name = "probe"
    corpus = "emoji"

    def __init__(self, source: str, folder: Path, recipes: Mapping[tuple[str, str], str]):
        self.source, self.folder, self.recipes = source, folder, recipes

    def kind(self, concepts: Sequence[str]) -> str:
        try:
            return self._target(concepts).kind
        except ValueError:  # nothing that it knows, and every style has its name
            return "object"

    def config(self, method: str, kind: str) -> str:
        kind = "style" if kind == "style" else "object"
        rule = f"{self.source.replace('-', '_')}_{method}" + ("" if kind == "style" else "_object")
        return self.recipes.get((method, kind), rule)

    def examples(self, concepts: Sequence[str]) -> Sequence[tuple[str, Sequence[str]]] | None:
        try:
            return groups.examples(self._target(concepts))
        except ValueError:
            return None

    def evaluate(
        self,
        models: Mapping[str, Pipeline],
        concepts: Sequence[str],
        *,
        num_images: int,
        folders: Mapping[str, Path],
        progress: Callable[[str], None],
        **options: Any,
    ) -> Evidence:
        target = self._target(concepts)  # before a folder is read
        galleries = {name: Gallery(folder) for name, folder in folders.items()}
        return protocol.evaluate(
            models, target, num_images=num_images, galleries=galleries, progress=progress, **options
        )

    def goal(self, base: Pipeline, concepts: Sequence[str]) -> Goal:
        return goal(base, self._target(concepts))

    def detector(self, concepts: Sequence[str]) -> tuple[Detect, str]:
        return probed(self._target(concepts)), f"the embedded probe, sha256 {probe.sha256()[:16]}"

    def question(self, concepts: Sequence[str], num_images: int, detector: str) -> Question:
        return protocol.question(self._target(concepts), num_images, detector)

    def metric(self, concepts: Sequence[str], num_images: int) -> Metric:
        return protocol.metric(self._target(concepts), num_images)

    def _target(self, concepts: Sequence[str]) -> Target:
        return groups.find_target(concepts)


EMOJI = register(Emoji("emoji", MODEL, {("esd", "style"): "emoji_contexts", ("esd", "object"): "emoji_object"}))
EMOJI_FLOW = register(
    Emoji("emoji-flow", FLOW, {("esd", "style"): "emoji_flow", ("esd", "object"): "emoji_flow_object"})
)


def probed(target: Target) -> Detect:
    """The embedded probe's detection of a style or an object."""
    known = vocabulary.styles() if target.kind == "style" else vocabulary.objects()
    wanted = [known.index(name) for name in target.names]

    def detect(images: UInt8[np.ndarray, "n height width 3"]) -> Bool[np.ndarray, " n"]:
        verdict = probe.classify(images)
        classes = verdict.styles if target.kind == "style" else verdict.objects
        return verdict.recognised & np.isin(classes, wanted)

    return detect


def goal(base: Pipeline, target: Target, num_prompts: int = 8, images_each: int = 4, seed: int = 0) -> Goal:
    """The goal "neon style", or "a cat": prompts of several objects, or styles; of several targets, the first alone.

    Raises ValueError for a concept that no prompt brings the model to generate.
    """
    if target.kind == "style":
        subjects = dict.fromkeys((*SUBJECTS, *vocabulary.objects()))
        pairs = [(name, target.names[0]) for name in subjects][:num_prompts]
        neutral = [captions.prompt(name) for name, _ in pairs]
    else:
        pairs = [(target.names[0], style) for style in vocabulary.styles()][:num_prompts]
        neutral = [captions.prompt(style=style) for _, style in pairs]
    searched = probed(Target(target.kind, target.names[:1]))
    return goals.drawn(
        base, target.concepts[0], [captions.prompt(*pair) for pair in pairs], searched,
        neutral=neutral, images_each=images_each, seed=seed, skip=True, batch_size=32, kept=kept(target),
        **EMOJI.sampling,
    )  # fmt: skip


def kept(target: Target) -> tuple[Kept, ...]:
    """Objects that an erasure is to keep; of objects, none of the targets' categories."""
    own = {vocabulary.category(name) for name in target.names} if target.kind == "object" else set()
    names = [name for name in SUBJECTS if vocabulary.category(name) not in own]
    return tuple(Kept(captions.prompt(name), probed(Target("object", (name,)))) for name in names)
