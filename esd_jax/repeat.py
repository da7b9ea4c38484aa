"""The shortest command that repeats an erasure: the config that is nearest to its recipe, and what differs from it."""

import functools
import shlex
from collections.abc import Mapping
from typing import Any

from esd_jax import config_files, kinds, recipe
from esd_jax.erasure import Erasure
from esd_jax.evaluation import testbed
from esd_jax.evaluation.report import card

SHOWN = ("base", "concept")  # what stands alone, without the name of its field


def command(record: Erasure, folder: str = "runs/again") -> str:
    """`esd-jax erase BASE "CONCEPT" ... -o FOLDER`; "" if no record or no flags can.

    The result is the same erasure: every field that shapes it is the config's, or spelled out.
    """
    if not record.recipe or record.started_from:
        return ""
    try:
        wanted = _computed(recipe.make(**record.recipe).flat())
    except (TypeError, ValueError):  # another version's
        return ""
    if any(isinstance(value, list | tuple) for value in wanted.values()):
        return ""  # texts that hold a separator can be passed in Python alone
    if record.step is not None and record.step < wanted["steps"]:  # it was stopped early
        wanted["steps"] = record.step
    usual = _usual(record)
    lines = [line for name in _configs() if (line := _line(name, wanted, usual)) is not None]
    return f"{min(lines, key=len)} -o {shlex.quote(folder)}" if lines else ""


def _line(name: str, wanted: Mapping[str, Any], usual: str | None) -> str | None:
    """The command that starts from a config; None if it sets what the recipe leaves open."""
    known = _computed(_configs()[name])
    if known.get("method", "esd") != wanted["method"]:
        return None
    other = {field: wanted.get(field) for field in {*known, *wanted} if known.get(field) != wanted.get(field)}
    if any(value is None for field, value in other.items() if field not in SHOWN):
        return None  # no flag takes a field's value away
    base, concept = (str(wanted.get(field) or "") for field in SHOWN)
    changed = sorted(f"--{field}={shlex.quote(str(value))}" for field, value in other.items() if field not in SHOWN)
    if name == usual and "kind" not in other:  # which follows from the concept and the method
        start = [] if wanted["method"] == "esd" else [f"--method={wanted['method']}"]
    else:
        start = [f"--config={name}"]
    # A word alone is no flag, and a base alone is one that differs from a concept.
    alone = (testbed.of(base) is not None or "/" in base) and concept and not concept.startswith("-")
    shown = [base, concept] if alone else [f"--base={base}", f"--concept={concept}"]
    words = ["esd-jax erase", *map(shlex.quote, shown), *start, *changed]
    return " ".join(words)


@functools.cache
def _configs() -> Mapping[str, Mapping[str, Any]]:
    """The flat fields of each config that the package carries; without `steps` where they follow from the concepts."""
    configs = {name: recipe.read(name).to_dict() for name in config_files.config_names()}
    left_out = {name: ("steps",) if config.get("steps_each") else () for name, config in configs.items()}
    return {
        name: {field: value for field, value in recipe.make(**config).flat().items() if field not in left_out[name]}
        for name, config in configs.items()
    }


def _computed(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flat.items() if name not in card.NOT_COMPUTED}


def _usual(record: Erasure) -> str | None:
    """The config that the command takes by itself, where that is known without the base's files."""
    base, method = str((record.recipe or {}).get("base")), str((record.recipe or {}).get("method", "esd"))
    if not testbed.of(base):
        return None
    try:
        return kinds.config(base, record.texts, dict, fields={} if method == "esd" else {"method": method})
    except ValueError:  # a method without a recipe for this base
        return None
