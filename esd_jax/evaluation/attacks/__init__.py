"""Attacks on erased models: attempts to recover the erased concept.

    goal = Goal("Van Gogh", prompts, images, detect)
    adversary = attack(base, erased, goal, preset("concept_inversion"), seed=0)
    scored = score(erased, adversary, goal, seeds=range(1000, 1010))

A new attack, or probe of what remains beyond prompts, is one file and one line here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from esd_jax import names
from esd_jax.evaluation.attacks.adversary import Adversary, Attack, Goal, Kept, Trial
from esd_jax.evaluation.attacks.campaigns import campaign, label
from esd_jax.evaluation.attacks.composition import Composition
from esd_jax.evaluation.attacks.concept_inversion import ConceptInversion, family
from esd_jax.evaluation.attacks.encoder_output import EncoderOutput
from esd_jax.evaluation.attacks.hidden import Completion, Resurgence, ResurgenceLoRA
from esd_jax.evaluation.attacks.merged import MergedLoRA
from esd_jax.evaluation.attacks.null_inversion import NullInversion
from esd_jax.evaluation.attacks.p4d import P4D
from esd_jax.evaluation.attacks.probe import Particular, Probe
from esd_jax.evaluation.attacks.prompts import OwnPrompts, PromptList, RandomPrompts
from esd_jax.evaluation.attacks.ring_a_bell import RingABell
from esd_jax.evaluation.attacks.scoring import Scored, random_weights, score, table
from esd_jax.evaluation.attacks.settings import typed, value
from esd_jax.evaluation.attacks.stored import StoredWeights
from esd_jax.evaluation.attacks.tiers import Tiers
from esd_jax.evaluation.attacks.unlearn_diff_atk import UnlearnDiffAtk
from esd_jax.evaluation.report.terms import term
from esd_jax.pipeline import Pipeline
from esd_jax.suggest import did_you_mean

ATTACKS: Mapping[str, type[Attack]] = {
    "own_prompts": OwnPrompts,
    "concept_inversion": ConceptInversion,
    "unlearn_diff_atk": UnlearnDiffAtk,
    "p4d": P4D,
    "ring_a_bell": RingABell,
    "encoder_output": EncoderOutput,
    "tiers": Tiers,
    "prompts": PromptList,
    "random_prompts": RandomPrompts,
}

PROBES: Mapping[str, type[Probe]] = {
    "null_inversion": NullInversion,
    "resurgence": Resurgence,
    "resurgence_lora": ResurgenceLoRA,
    "completion": Completion,
    "stored_weights": StoredWeights,
    "merged_lora": MergedLoRA,
    "composition": Composition,
}
FAMILY = "concept_inversion_family"  # several searches in place of one

__all__ = [
    "ATTACKS",
    "FAMILY",
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
    "lacking",
    "possible",
    "preset",
    "random_weights",
    "score",
    "table",
    "within",
]


def preset(name: str, variant: str = "paper", **changes: Any) -> Any:
    """An attack's or a probe's settings: a variant's, with some of them changed.

    A text is read as the field's type (`settings.typed`).

    Raises ValueError for an unknown attack, variant or field, and for a value of another type or out of range.
    """
    known = {**ATTACKS, **PROBES}
    if name not in known:
        raise ValueError(f"attack={name!r} is unknown; {did_you_mean(name, [*known, FAMILY])}")
    settings = known[name]
    if variant not in settings.PRESETS:
        raise ValueError(f"attack {name!r} has no preset {variant!r}; {did_you_mean(variant, settings.PRESETS)}")
    own = [f.name for f in fields(settings)]
    for field in changes:
        if field not in own:
            hint = did_you_mean(field, own) if own else "it has none"
            raise ValueError(f"attack {name!r} has no field {field!r}; {hint}")
    return settings(**{**settings.PRESETS[variant], **typed(settings, changes)})


def chosen(
    texts: Sequence[str], variant: str = "paper", changes: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Attack | Probe]:
    """The settings of named attacks and probes, in their order, each once; "all" is every one that needs no file.

    "concept_inversion_family" stands for the members of `concept_inversion.family`; its field `whole` for all of them.
    changes: name -> changes of its fields.

    Raises ValueError as `preset` does; and for changes of what is not named, or of what the members differ in.
    """
    every = (*names.ATTACK_NAMES, *names.MORE_ATTACKS)
    wanted = list(dict.fromkeys(name for text in texts for name in (every if text == "all" else (text,))))
    changes = changes or {}
    for name in changes:
        if name not in (known := {**ATTACKS, **PROBES, FAMILY: None}):
            raise ValueError(f"attack={name!r} is unknown; {did_you_mean(name, known)}")
        if name not in wanted:
            raise ValueError(f"{name!r} has settings, but is not among the attacks: {', '.join(wanted)}")
    settings: list[Attack | Probe] = []
    for name in wanted:
        own = dict(changes.get(name, {}))
        if name == FAMILY:
            if fixed := [field for field in own if field in ("tokens", "from_t", "member")]:
                raise ValueError(f"{fixed[0]} of {FAMILY!r}: its members differ in it; 'concept_inversion' takes one")
            whole = value("whole", own.pop("whole", False), bool)
            settings += family(preset("concept_inversion", variant, **own), whole=whole)
        else:
            settings.append(preset(name, variant, **own))
    return settings


def within(
    settings: Sequence[Attack | Probe],
    texts: Sequence[str] | None,
    lacks: Callable[[Attack | Probe], str],
    say: Callable[[str], None],
) -> list[Attack | Probe]:
    """The attacks and probes that can be made, of those that `chosen` gave for `texts`.

    texts: None: those by default, of which none was named.
    lacks: an attack -> a sentence on what it lacks, or "" (`lacking`).
    say: is called with a line for each that is left out, which are those of "all" and by default alone.

    Raises ValueError, with what can be made, for one that is named and cannot be, and if all are left out.
    """
    known = {**ATTACKS, **PROBES, FAMILY: ConceptInversion}
    named = {known[text] for text in texts or () if text in known}
    possible = []
    for one in settings:
        if not (reason := lacks(one)):
            possible.append(one)
        elif type(one) in named:
            raise ValueError(f"{reason}; {_others(lacks)}")
        else:
            say(f"left out: {reason}")
    if settings and not possible:
        raise ValueError(f"none of these attacks can be made; {_others(lacks)}")
    return possible


def _others(lacks: Callable[[Attack | Probe], str]) -> str:
    """What else can be asked for."""
    every = [name for name in (*names.ATTACK_NAMES, *names.MORE_ATTACKS) if name != FAMILY]
    return f"this base takes: {', '.join(name for name in every if not lacks(preset(name))) or 'none'}"


def possible(
    base: Pipeline,
    texts: Sequence[str] | None,
    variant: str = "paper",
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Attack | Probe]:
    """What is `chosen`, by default `ATTACK_NAMES`, `within` what the base has: the goal may lack something, too.

    Raises ValueError as both do.
    """
    wanted = names.ATTACK_NAMES if texts is None else texts
    return within(chosen(wanted, variant, changes), texts, lambda one: lacking(one, base), say)


def lacking(settings: Attack | Probe, base: Pipeline, goal: Goal | None = None) -> str:
    """What a base, or a goal, lacks for an attack, as a sentence; empty if nothing."""
    if reason := base.family.lacks(settings.needs, term(label(settings))):
        return reason
    return settings.lacks(base, goal) if isinstance(settings, Particular) else ""


def attack(base: Pipeline, victim: Pipeline, goal: Goal, settings: Attack, seed: int = 0) -> Adversary:
    """What an attack finds against `victim`. Its draws depend on the seed alone: all models are attacked alike.

    Raises ValueError for a base or a goal that lacks what the attack needs.
    """
    if reason := lacking(settings, base, goal):
        raise ValueError(reason)
    return settings.run(base, victim, goal, seed)
