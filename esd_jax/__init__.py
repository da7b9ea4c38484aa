"""Erase a concept from a Stable Diffusion checkpoint, and get the same checkpoint back without it.

    import esd_jax

    base = esd_jax.load("emoji")
    erased = esd_jax.erase(base, "neon style")
    images = esd_jax.sample(erased, "a cat in neon style", seed=0)
    esd_jax.grid(images).save("cat.png")
    esd_jax.export(erased, "emoji-without-neon")

Beside these verbs: `guidance` (steering without training), `formats` (LoRAs, deltas, embeddings, ...), `evaluation`
(how an erasure is measured) and `attacks`.
"""

from typing import TYPE_CHECKING

from esd_jax import lazy

if TYPE_CHECKING:
    from esd_jax import attacks, evaluation, formats, guidance
    from esd_jax.api import erase, erase_each, export, invert, load, purify, sample
    from esd_jax.dossier import attack, evaluate, report
    from esd_jax.erasure import Concept
    from esd_jax.picture_grid import grid
    from esd_jax.pipeline import Pipeline

__all__ = [
    "Concept",
    "Pipeline",
    "attack",
    "attacks",
    "erase",
    "erase_each",
    "evaluate",
    "evaluation",
    "export",
    "formats",
    "grid",
    "guidance",
    "invert",
    "load",
    "purify",
    "report",
    "sample",
]
__version__ = "0.1.0"
# The verbs bring JAX and Flax with them: only who uses one waits for that.
_PLACES = {
    "Concept": "esd_jax.erasure",
    "grid": "esd_jax.picture_grid",
    "Pipeline": "esd_jax.pipeline",
    **dict.fromkeys(("erase", "erase_each", "export", "invert", "load", "purify", "sample"), "esd_jax.api"),
    **dict.fromkeys(("attack", "evaluate", "report"), "esd_jax.dossier"),
    **{name: f"esd_jax.{name}" for name in ("attacks", "evaluation", "formats", "guidance")},
}
if not TYPE_CHECKING:  # to a type checker, any other name is an error
    __getattr__, __dir__ = lazy.names(__name__, _PLACES)
