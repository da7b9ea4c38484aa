"""What a run says of itself: what was erased, from what, how and with which versions."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esd_jax import several
from esd_jax.inputs import expanded
from esd_jax.io import diffusers
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe

STARTED = "started_from"  # weights other than the base's that a run began with


def describe(base: Pipeline, plan: Recipe, start_from: Pipeline | None = None) -> dict[str, Any]:
    """What was erased, from what, how and with which versions: the record that travels with every export."""
    packages = ("esd-jax", "jax", "jaxlib", "flax", "optax")
    # A machine's paths do not belong in a model's files: of a folder or an image, its name is kept.
    name = _public(plan.base)
    images = plan.images and several.joined("images", [Path(path).name for path in plan.texts("images")])
    recorded = plan.flat() | {"base": name, "images": images}
    # Tuples as lists, which is how JSON gives them back.
    concepts, recorded = json.loads(json.dumps([[dataclasses.asdict(concept) for concept in plan.concepts], recorded]))
    return {
        "concepts": concepts,
        "base": name,
        "base_sha256": diffusers.source_hash(base),
        "recipe": {key: value for key, value in recorded.items() if key != "output_dir"},
        "versions": {package: version(package) for package in packages},
        **({STARTED: _origin(start_from)} if start_from else {}),
    }


def _public(source: str) -> str:
    """What the world may know of where a checkpoint lies: of a folder, its name."""
    path = expanded(source)
    return path.resolve().name if path.exists() else source


def _origin(start_from: Pipeline) -> dict[str, Any]:
    """Where the weights came from that a run began with, instead of its base's."""
    erased = json.loads(json.dumps(start_from.provenance.erased, default=str))
    return {"name": _public(start_from.provenance.source), "erased": erased}
