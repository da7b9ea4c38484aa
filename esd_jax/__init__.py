"""Erase a concept from a Stable Diffusion checkpoint, and get the same checkpoint back without it.

import esd_jax

base = esd_jax.load("emoji")
erased = esd_jax.erase(base, "neon style")
images = esd_jax.sample(erased, ["a cat in neon style"], seed=0)
esd_jax.export(erased, "emoji-without-neon")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esd_jax.api import erase, export, invert, load, purify, sample
    from esd_jax.dossier import attack, evaluate, report
    from esd_jax.pipeline import Pipeline

_PLACES = {
    "Pipeline": "pipeline",
    **dict.fromkeys(("erase", "export", "invert", "load", "purify", "sample"), "api"),
    **dict.fromkeys(("attack", "evaluate", "report"), "dossier"),
}
__all__ = ["Pipeline", "attack", "erase", "evaluate", "export", "invert", "load", "purify", "report", "sample"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The verbs bring JAX and Flax with them: only who uses one waits for that.
    if name in _PLACES:
        return getattr(importlib.import_module(f"esd_jax.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
