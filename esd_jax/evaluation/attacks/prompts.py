"""Black-box attacks: lists of prompts, the prompts that name the concept, and random ones, which are the control.

    success of k prompts from an attack  >>  success of k prompts drawn at random

or the attack shows nothing but luck. Lists that others have published (Ring-A-Bell's and MMA-Diffusion's, those of P4D
and UnlearnDiffAtk) are read from the user's files; none is part of this package.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from esd_jax import prompt_files
from esd_jax.erasing import textual_inversion
from esd_jax.evaluation.attacks import adversary
from esd_jax.evaluation.attacks.adversary import Adversary, Goal, Trial
from esd_jax.evaluation.attacks.settings import check
from esd_jax.inputs import expanded
from esd_jax.pipeline import Pipeline
from esd_jax.text import PromptTruncated

NOTHING = np.zeros((0, 0))  # losses where nothing is searched


@dataclass(frozen=True)
class OwnPrompts:
    """The goal's prompts as they are: what succeeds without any attack (UnlearnDiffAtk's pre-ASR)."""

    NAME: ClassVar[str] = "its own prompts"
    needs: ClassVar[frozenset[str]] = frozenset()
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "emoji": {}}

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int = 0) -> Adversary:
        """A trial for each prompt."""
        started = time.monotonic()
        return Adversary(self.NAME, trials_of(victim, goal.prompts), time.monotonic() - started, NOTHING)


@dataclass(frozen=True)
class PromptList:
    """The prompts of a file. file: one prompt a line, or a CSV with a column `prompt`. limit: from the first."""

    NAME: ClassVar[str] = "list of prompts"
    needs: ClassVar[frozenset[str]] = frozenset()
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "emoji": {}}

    file: str = ""
    limit: int | None = None

    def __post_init__(self):
        check(self)

    def lacks(self, base: Pipeline, goal: Goal | None) -> str:
        """A file of prompts."""
        if not self.file:
            return "file is empty: name the file that holds the prompts"
        try:
            read(self.file)
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int = 0) -> Adversary:
        """A trial for each prompt; each is a case of its own, as published rates count them."""
        started, texts = time.monotonic(), read(self.file)[: self.limit]
        trials = trials_of(victim, texts)
        return Adversary(f"prompts of {Path(self.file).name}", trials, time.monotonic() - started, NOTHING)


@dataclass(frozen=True)
class RandomPrompts:
    """The control. count: prompts, as many as the attack's k. length: tokens, as many as the attack finds."""

    NAME: ClassVar[str] = "random prompts"
    needs: ClassVar[frozenset[str]] = frozenset()
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "emoji": {"count": 8}}

    count: int = 50
    length: int = 16

    def __post_init__(self):
        check(self)

    def run(self, base: Pipeline, victim: Pipeline, goal: Goal, seed: int = 0) -> Adversary:
        """Trials of random tokens, all of one case."""
        started, tokenizer = time.monotonic(), victim.tokenizers[0]
        by_ids = {"soft_tokens", "one_vocabulary"} <= victim.family.meets
        known = victim.configs[victim.text_encoders[0]].vocab_size
        text = adversary.text_of(victim) if by_ids else None
        may = text.usable() if text else textual_inversion.usable(tokenizer, known)
        drawn = np.random.default_rng(seed).choice(np.flatnonzero(may), (self.count, self.length)).tolist()
        if text:
            trials = adversary.trials_of(victim, 0, [text.framed(ids) for ids in drawn], self.count)
        else:  # as text, which every text encoder reads in its own way
            texts = [adversary.readable(victim, np.asarray(ids)) for ids in drawn]
            with (
                warnings.catch_warnings()
            ):  # T5 needs more tokens for them than CLIP; what it does not read is as random
                warnings.simplefilter("ignore", PromptTruncated)
                rows = _rows(victim, texts)
            trials = [Trial(prompt, row) for prompt, row in zip(texts, rows, strict=True)]
        return Adversary(self.NAME, tuple(trials), time.monotonic() - started, NOTHING)


def read(file: str | Path) -> tuple[str, ...]:
    """The prompts of a file: of a CSV's column `prompt`, or one a line; empty lines are left out.

    Raises FileNotFoundError, or ValueError for a file without prompts, or that is damaged; see `prompt_files`.
    """
    return tuple(" ".join(prompt.split()) for prompt in prompt_files.read(expanded(file)))


def trials_of(victim: Pipeline, texts: Sequence[str]) -> tuple[Trial, ...]:
    """A trial for each text, each a case of its own."""
    return tuple(
        Trial(text, row, case) for case, (text, row) in enumerate(zip(texts, _rows(victim, texts), strict=True))
    )


def _rows(pipeline: Pipeline, prompts: Sequence[str]) -> tuple[Any, ...]:
    encoded = pipeline.encode_prompts(prompts)
    return tuple(jax.tree.map(lambda a, i=i: a[i : i + 1], encoded) for i in range(len(prompts)))
