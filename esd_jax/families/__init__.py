"""The model families, each a `Family` in a file of its own.

families.of(pipeline.configs).name
families.register(family)      # one of yours: it is then loaded, erased from, resumed, measured and exported
"""

from collections.abc import Mapping
from typing import Any

from esd_jax.families.family import NEEDS, Configs, Family
from esd_jax.families.sd import SD
from esd_jax.families.sdxl import SDXL

__all__ = ["NEEDS", "SD", "SDXL", "Configs", "Family", "by_pipeline", "module", "of", "register"]

_FAMILIES = [SD, SDXL]


def register(family: Family) -> Family:
    """Makes a family known, in place of one of the same name.

    Raises ValueError for a pipeline class, or components of the same config classes, that another family has.
    """
    others = [other for other in _FAMILIES if other.name != family.name]
    for other in others:
        if family.pipeline == other.pipeline or _configs(family) == _configs(other):
            raise ValueError(f"{family.name}: its pipeline class or its components are those of {other.name}")
    _FAMILIES[:] = [*others, family]
    return family


def _configs(family: Family) -> Mapping[str, set[type]]:
    return {name: set(classes.values()) for name, classes in family.components.items()}


def of(configs: Configs) -> Family:
    """The family of a checkpoint's configs. Raises ValueError for none."""
    for family in _FAMILIES:
        if family.fits(configs):
            return family
    raise ValueError(f"no model family has the components {', '.join(sorted(configs))} of these classes")


def by_pipeline(index: Mapping[str, Any]) -> Family | None:
    """The family that a `model_index.json` names; None if it is not implemented."""
    return next((family for family in _FAMILIES if family.pipeline == index.get("_class_name")), None)


def known() -> str:
    """The pipeline classes that are implemented, for a message."""
    return ", ".join(family.pipeline for family in _FAMILIES)


def module(config: Any) -> Any:
    """The NNX module that is built of a network's config. Raises ValueError for a class that no family has."""
    for family in _FAMILIES:
        if type(config) in family.modules:
            return family.modules[type(config)]
    raise ValueError(f"no model family builds a network of a {type(config).__name__}")
