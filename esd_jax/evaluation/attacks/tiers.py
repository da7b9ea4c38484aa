"""Prompts around the concept, tier by tier: does it come back where a prompt misspells, translates or describes it?

No weights and no search: this is what a user of the erased model may type. The prompts are those of `evaluation.tiers`;
each tier is a row of its own, beside the base, random weights and random prompts. A tier in which the base does not
draw the concept either says nothing.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from esd_jax.evaluation import tiers
from esd_jax.evaluation.attacks import settings
from esd_jax.evaluation.attacks.adversary import Adversary, Goal
from esd_jax.evaluation.attacks.prompts import NOTHING, trials_of
from esd_jax.names import check_kind
from esd_jax.pipeline import Pipeline

LEAST_VOCABULARY = 10_000  # tokens below which a text encoder reads the prompts letter by letter


@dataclass(frozen=True)
class Tiers:
    """Settings. tiers: of `tiers.TIERS`. kind: of the concept (`names.KINDS`), by default what its words tell.

    limit: prompts of each tier, from the first; None is all.

    Raises ValueError for an unknown tier or kind.
    """

    NAME: ClassVar[str] = "tiers"
    needs: ClassVar[frozenset[str]] = frozenset()
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "emoji": {}}

    tiers: tuple[str, ...] = tuple(tiers.TIERS)
    kind: str = ""
    limit: int | None = None

    def __post_init__(self):
        settings.check(self)
        tiers.check(self.tiers)
        check_kind(self.kind or None)

    @property
    def label(self) -> str:
        """The attack's name; of one tier, with what that is."""
        return f"tier: {tiers.TIERS[self.tiers[0]]}" if len(self.tiers) == 1 else self.NAME

    def lacks(self, base: Pipeline, goal: Goal | None) -> str:
        """A text encoder that knows the words; a tier that the concept has."""
        if (size := base.configs[base.text_encoders[0]].vocab_size) < LEAST_VOCABULARY:
            return f"{self.NAME} need a text encoder that knows any word: this one has a vocabulary of {size:,} tokens"
        if goal is not None and not self.prompts(goal):
            return tiers.absent(goal.concept, self.tiers, self.kind)
        return ""

    def parts(self, goal: Goal) -> "tuple[Tiers, ...]":
        """One for each tier that the concept has."""
        return tuple(replace(self, tiers=(tier,)) for tier in self.prompts(goal))

    def remark(self, goal: Goal) -> str:
        """Which tiers the concept lacks, as a sentence; empty if none."""
        return tiers.absent(goal.concept, self.tiers, self.kind)

    def prompts(self, goal: Goal, seed: int = 0) -> dict[str, tuple[str, ...]]:
        """Those of each tier that the concept has."""
        every = tiers.of(goal.concept, self.kind, seed)
        return {tier: every[tier][: self.limit] for tier in self.tiers if tier in every}

    def texts(self, goal: Goal, seed: int = 0) -> tuple[str, ...]:
        """All of them."""
        return tuple(text for prompts in self.prompts(goal, seed).values() for text in prompts)

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int = 0) -> Adversary:
        """A trial for each prompt, each a case of its own. seed: of the misspellings."""
        started = time.monotonic()
        return Adversary(self.label, trials_of(victim, self.texts(goal, seed)), time.monotonic() - started, NOTHING)
