"""Attacks on erased models: attempts to recover the erased concept.

    goal = Goal("Van Gogh", prompts, images, detect)
    adversary = attack(base, erased, goal, preset("concept_inversion"), seed=0)
    scored = score(erased, adversary, goal, seeds=range(1000, 1010))

A new attack is one file and one line here.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from esd_jax.evaluation.attacks.adversary import Adversary, Attack, Goal, Trial
from esd_jax.evaluation.attacks.campaigns import campaign
from esd_jax.evaluation.attacks.concept_inversion import ConceptInversion
from esd_jax.evaluation.attacks.p4d import P4D
from esd_jax.evaluation.attacks.prompts import OwnPrompts, PromptList, RandomPrompts
from esd_jax.evaluation.attacks.ring_a_bell import RingABell
from esd_jax.evaluation.attacks.scoring import Scored, random_weights, score, table
from esd_jax.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk
from esd_jax.pipeline import Pipeline
from esd_jax.suggest import did_you_mean

ATTACKS: Mapping[str, type[Attack]] = {
    "own_prompts": OwnPrompts,
    "concept_inversion": ConceptInversion,
    "unlearn_diff_atk": UnlearnDiffAtk,
    "p4d": P4D,
    "ring_a_bell": RingABell,
    "prompts": PromptList,
    "random_prompts": RandomPrompts,
}

__all__ = [
    "ATTACKS",
    "Adversary",
    "Attack",
    "Goal",
    "Scored",
    "Trial",
    "attack",
    "campaign",
    "preset",
    "random_weights",
    "score",
    "table",
]


def preset(name: str, variant: str = "paper", **changes: Any) -> Attack:
    """An attack's settings: a variant's, with some of them changed.

    Raises ValueError for an unknown attack, variant or field.
    """
    if name not in ATTACKS:
        raise ValueError(f"attack={name!r} is unknown; {did_you_mean(name, ATTACKS)}")
    settings = ATTACKS[name]
    if variant not in settings.PRESETS:
        raise ValueError(f"attack {name!r} has no preset {variant!r}; {did_you_mean(variant, settings.PRESETS)}")
    known = [f.name for f in fields(settings)]
    for field in changes:
        if field not in known:
            hint = did_you_mean(field, known) if known else "it has none"
            raise ValueError(f"attack {name!r} has no field {field!r}; {hint}")
    return settings(**{**settings.PRESETS[variant], **changes})


def attack(base: Pipeline, victim: Pipeline, goal: Goal, settings: Attack, seed: int = 0) -> Adversary:
    """What an attack finds against `victim`. Its draws depend on the seed alone: all models are attacked alike."""
    return settings.run(base, victim, goal, seed)
