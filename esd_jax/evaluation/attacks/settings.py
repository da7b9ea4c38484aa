"""The fields of attacks and probes: what a text says for one, and the least that a number may be."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

from esd_jax.inputs import check_finite
from esd_jax.pipeline import Pipeline

ACCEPTED = {bool: bool, int: Integral, float: Real, str: str | os.PathLike}
FORMS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
SWITCH = {**dict.fromkeys(("true", "t", "1"), True), **dict.fromkeys(("false", "f", "0"), False)}
# The least that a field of the name may be, in every attack that says nothing else.
LEAST = {
    **dict.fromkeys(("batch_size", "count", "generations", "images", "iterations", "judge_every", "judged_on"), 1),
    **dict.fromkeys(("keep", "length", "limit", "num_steps", "num_times", "prompts", "steps", "together", "tokens"), 1),
    **dict.fromkeys(("from_t", "learning_rate", "member", "rank", "times", "weight_decay"), 0),
}


def typed(settings: type, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an attack in the types that they are declared with.

    A text says what it says in Python ("3", "0.5", "False", "None"); several values are separated by "," or "|".

    Raises ValueError, naming the field, for what does not convert.
    """
    hints = get_type_hints(settings)
    return {name: value(name, changed, hints[name]) for name, changed in changes.items()}


def value(name: str, changed: Any, hint: Any) -> Any:
    """One field's value in the type of a hint; see `typed`."""
    if get_origin(hint) is tuple:
        parts = re.split("[,|]", changed) if isinstance(changed, str) else changed
        parts = parts if isinstance(parts, list | tuple) else (parts,)
        return tuple(value(name, part, get_args(hint)[0]) for part in parts)
    kind, *others = get_args(hint) or (hint,)
    plain = changed.strip() if isinstance(changed, str) else changed
    if others and plain in (None, "None"):
        return None
    if isinstance(plain, str) and kind is not str:
        plain = _read(plain, kind)
    if not isinstance(plain, ACCEPTED[kind]) or isinstance(plain, bool) != (kind is bool):
        raise ValueError(f"{name}={changed} must be {FORMS[kind]}{', or None' if others else ''}")
    return kind(plain)


def _read(text: str, kind: type) -> Any:
    """What a text says as a value of a type; None if it says nothing."""
    try:
        return SWITCH.get(text.lower()) if kind is bool else kind(text)
    except ValueError:
        return None


def check(settings: Any, **least: float) -> None:
    """Raises ValueError, naming the field, for a number that is not finite, or below `LEAST`, or `least`."""
    lowest = LEAST | least
    for field in fields(settings):
        numbers = getattr(settings, field.name)
        for number in numbers if isinstance(numbers, tuple) else (numbers,):
            if not isinstance(number, Real):
                continue
            check_finite(**{field.name: number})
            if number < (low := lowest.get(field.name, -math.inf)):
                raise ValueError(f"{field.name}={number} must be at least {low}")


def beyond(name: str, from_t: int, base: Pipeline) -> str:
    """That an attack learns from a timestep on that the base's schedule does not have; empty if it has it."""
    last = base.schedule.num_train_timesteps - 1
    return "" if from_t <= last else f"{name} learns at timesteps up to {last}: from_t={from_t} is beyond them"
