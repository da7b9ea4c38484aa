"""Names of a package that are imported when they are first used, so that importing the package costs nothing."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def names(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__`, and its `__dir__`, which lists these names alone beside `__version__` and the like.

    places: name -> the module that has it, or that it is (`"seen": "esd_jax.evaluation.seen"`).
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(places[name])
        return module if places[name].endswith(f".{name}") else getattr(module, name)

    def listed() -> list[str]:
        return sorted({*(name for name in vars(sys.modules[package]) if name.startswith("__")), *places})

    return get, listed
