"""The model families, each a `Family` in a file of its own.

families.of(pipeline.configs).name
families.register(family)      # one of yours: it is then loaded, erased from, resumed, measured and exported

A package makes a family known to the command line, too, by an entry point: its pyproject.toml has

    [project.entry-points."esd_jax.families"]
    mine = "my_package:FAMILY"
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from esd_jax.families.family import NEEDS, Configs, Family, TokenTable
from esd_jax.families.flux import FLUX, FLUX_UNDISTILLED
from esd_jax.families.klein import KLEIN
from esd_jax.families.sd import SD
from esd_jax.families.sd3 import SD3
from esd_jax.families.sdxl import SDXL
from esd_jax.suggest import did_you_mean

__all__ = [
    "FLUX", "FLUX_UNDISTILLED", "KLEIN", "NEEDS", "SD", "SD3", "SDXL", "Configs", "Family", "TokenTable", "by_pipeline",
    "module", "of", "register",
]  # fmt: skip

_FAMILIES = [SD, SDXL, FLUX, FLUX_UNDISTILLED, SD3, KLEIN]


def register(family: Family) -> Family:
    """Makes a family known, in place of one of the same name.

    Raises ValueError for a pipeline class, or components of the same config classes, that another family has; for
    components without a VAE or the denoiser; for `tables` of some text encoders alone; and for what is none of `NEEDS`.
    """
    if missing := sorted({"vae", family.denoiser} - family.components.keys()):
        raise ValueError(f"{family.name}: its components lack {missing[0]!r}")
    if unknown := sorted(family.provides - NEEDS.keys()):
        raise ValueError(f"{family.name} provides {unknown[0]!r}, which is unknown; {did_you_mean(unknown[0], NEEDS)}")
    if family.tables and (others := sorted(set(family.text_encoders) ^ family.tables.keys())):
        raise ValueError(f"{family.name}: tables are for all text encoders or for none, but see {others[0]!r}")
    others = [other for other in _FAMILIES if other.name != family.name]
    for other in others:
        if family.pipeline == other.pipeline or _configs(family) == _configs(other):
            raise ValueError(f"{family.name}: its pipeline class or its components are those of {other.name}")
    _FAMILIES[:] = [*others, family]
    return family


def _known() -> list[Family]:
    _installed()
    return _FAMILIES


@cache
def _installed() -> None:
    """Registers the families of other packages, once."""
    for point in entry_points(group="esd_jax.families"):
        register(point.load())


def _configs(family: Family) -> Mapping[str, set[type]]:
    return {name: set(classes.values()) for name, classes in family.components.items()}


def of(configs: Configs) -> Family:
    """The family of a checkpoint's configs. Raises ValueError for none."""
    for family in _known():
        if family.fits(configs):
            return family
    raise ValueError(f"no model family has the components {', '.join(sorted(configs))} of these classes")


def by_pipeline(index: Mapping[str, Any]) -> Family | None:
    """The family that a `model_index.json` names; None if it is not implemented."""
    return next((family for family in _known() if family.pipeline == index.get("_class_name")), None)


def known() -> str:
    """The pipeline classes that are implemented, for a message."""
    return ", ".join(dict.fromkeys(family.pipeline for family in _known()))


def module(config: Any) -> Any:
    """The NNX module that is built of a network's config. Raises ValueError for a class that no family has."""
    for family in _known():
        if type(config) in family.modules:
            return family.modules[type(config)]
    raise ValueError(f"no model family builds a network of a {type(config).__name__}")
