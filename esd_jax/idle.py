"""Fields of a recipe that a user gives and that mean nothing beside the others. Records and configs have all fields."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from esd_jax.erasing.round_settings import DEFAULTS
from esd_jax.recipe import Recipe


def check_idle(plan: Recipe, fields: Iterable[str]) -> None:
    """Raises ValueError for a field that the others leave without meaning, with what would give it one."""
    fields = list(fields)
    if "preserve_weight" in fields and not plan.settings.trained:
        raise ValueError(
            f"preserve_weight: method {plan.method!r} solves for its result; preserve_scale is what weighs"
        )
    settings, optimizer = plan.settings, plan.optimizer
    for name in fields:
        if name in IDLE and (why := IDLE[name](plan, settings, optimizer)):
            raise ValueError(f"{name} means nothing {why}, or leave it out")
    if getattr(settings, "rounds_every", 0):
        return
    if without := [name for name in fields if name in DEFAULTS and name != "rounds_every"]:
        raise ValueError(f"{without[0]} means nothing without rounds: give rounds_every, too, or leave it out")


def _scale(plan: Recipe, settings: Any, optimizer: Any) -> str:
    if getattr(settings, "delta", "explicit") == "implicit":
        return "with delta='implicit': give token_scale"
    if getattr(settings, "instructions", None):
        return "beside instructions, which have scales of their own: write it there"
    return ""


def _preserve(plan: Recipe, settings: Any, optimizer: Any) -> str:
    named = any(concept.preserve for concept in plan.concepts)
    return "" if named else "without preserved prompts: give preserve, too"


def _inversion(plan: Recipe, settings: Any, optimizer: Any) -> str:
    return "" if settings.inversion_steps else "without an inversion: give inversion_steps, too"


def _contexts(plan: Recipe, settings: Any, optimizer: Any) -> str:
    return "" if settings.contexts else "without contexts: give contexts, too"


def _decay(plan: Recipe, settings: Any, optimizer: Any) -> str:
    return "" if optimizer.decay_steps else "without a decay: give decay_steps, too"


def _quantile(plan: Recipe, settings: Any, optimizer: Any) -> str:
    return "with delta='implicit': give delta='explicit'" if settings.delta == "implicit" else ""


# field -> (recipe, its method's settings, its optimizer) -> why it means nothing, and what to do; "" if it counts.
IDLE: Mapping[str, Callable[[Recipe, Any, Any], str]] = {
    "preserve_weight": _preserve,
    "erase_scale": _scale,
    "kappa": _quantile,
    "context_eta": _contexts,
    "inversion_tokens": _inversion,
    "inversion_learning_rate": _inversion,
    "decay_to": _decay,
}
