"""Attacks on erased models: whether what was erased can be had back. `esd_jax.attack` makes a report of several.

from esd_jax import attacks

goal = attacks.default_goal(base, "neon style")  # of another model: goal, judge = attacks.goal(base, concept, ...)
found = attacks.attack(base, erased, goal, attacks.preset("concept_inversion", "emoji"))
scored = attacks.score(erased, found, goal, seeds=range(1000, 1010))
print(scored.single_shot())
"""

from esd_jax.dossier import default_goal, goal
from esd_jax.evaluation.attacks import (
    ATTACKS,
    Adversary,
    Attack,
    Goal,
    Scored,
    Trial,
    attack,
    campaign,
    goals,
    preset,
    random_weights,
    score,
    table,
)

__all__ = [
    "ATTACKS",
    "Adversary",
    "Attack",
    "Goal",
    "Scored",
    "Trial",
    "attack",
    "campaign",
    "default_goal",
    "goal",
    "goals",
    "preset",
    "random_weights",
    "score",
    "table",
]
