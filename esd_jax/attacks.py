"""Attacks on erased models: attempts to recover the erased concept. `esd_jax.attack` reports on several.

    from esd_jax import attacks

    goal = attacks.default_goal(base, "neon style")  # of other models: goal, name = attacks.goal(base, concept, ...)
    adversary = attacks.attack(base, erased, goal, attacks.preset("concept_inversion", "emoji"))
    scored = attacks.score(erased, adversary, goal, seeds=range(1000, 1010))
    print(scored.single_shot())

`ATTACKS` holds the settings of each by its name, `PROBES` those of what needs no prompt; `preset` makes those for a
budget.
"""

from esd_jax.dossier import default_goal, goal
from esd_jax.evaluation.attacks import (
    ATTACKS,
    PROBES,
    Adversary,
    Attack,
    Goal,
    Kept,
    Probe,
    Scored,
    Trial,
    attack,
    campaign,
    chosen,
    goals,
    preset,
    random_weights,
    score,
    table,
)

__all__ = [
    "ATTACKS",
    "PROBES",
    "Adversary",
    "Attack",
    "Goal",
    "Kept",
    "Probe",
    "Scored",
    "Trial",
    "attack",
    "campaign",
    "chosen",
    "default_goal",
    "goal",
    "goals",
    "preset",
    "random_weights",
    "score",
    "table",
]
