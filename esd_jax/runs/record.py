"""The record of a run: what was erased, from what, how and with which versions."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esd_jax import several
from esd_jax.erasure import Erasure, Origin, texts_of
from esd_jax.inputs import expanded, read_json
from esd_jax.io import diffusers
from esd_jax.io import folder as files
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe
from esd_jax.runs.setup import files_of
from esd_jax.training import run_folder

READING = "reading"  # beside the record in `run.json`, as "local" is
EVIDENCE = "evidence"  # the folder of a run's evaluation results, in parts


def describe(base: Pipeline, plan: Recipe, start_from: Pipeline | None = None) -> Erasure:
    """What was erased, from what, how and with which versions: the record that travels with every export."""
    packages = ("esd-jax", "jax", "jaxlib", "flax", "optax")
    # A machine's paths do not belong in a model's files: of a folder or an image, its name is kept.
    name = _public(plan.base)
    images = several.joined("images", [Path(path).name for path in plan.images]) if plan.images else None
    recorded = plan.flat() | {"base": name, "images": images}
    recorded |= {field: _public(str(file)) for field, file in files_of(plan).items()}
    recorded = json.loads(json.dumps(recorded))  # tuples as lists, which is how JSON gives them back
    return Erasure(
        plan.concepts,
        base=name,
        base_sha256=diffusers.source_hash(base),
        recipe={key: value for key, value in recorded.items() if key != "output_dir"},
        versions={package: version(package) for package in packages},
        started_from=_origin(start_from) if start_from else None,
    )


def read(folder: Path) -> tuple[Erasure, dict[str, Any]]:
    """(The record of a run, the fields of its recipe that hold on this machine alone), of its folder's `run.json`.

    Raises FileNotFoundError, or ValueError if it holds no JSON object.
    """
    content = read_json(folder / "run.json")
    content.pop(READING, None)
    local = content.pop("local", {})
    return Erasure.from_dict(content), local


def reading(folder: Path) -> dict[str, Any]:
    """How a run's base is read, beside what its recipe says: `config` and `ema` of a single file, as arguments of
    `load`. Raises as `read` does."""
    return dict(read_json(folder / "run.json").get(READING, {}))


def reading_of(base: Pipeline) -> dict[str, Any]:
    """What `reading` is for a run on a base."""
    config, ema = base.provenance.config, base.provenance.ema
    if config and expanded(config).exists():
        config = str(expanded(config).absolute())
    return {name: value for name, value in (("config", config), ("ema", ema)) if value}


def check_measured(folder: Path, erased: Pipeline, concepts: Sequence[str], *, every: bool = False) -> None:
    """Raises ValueError for results in a run's folder that are not of what the run erased.

    Its report would give them as the run's. every: they must be of all its concepts, not of some of them.
    """
    if folder.name != EVIDENCE or not run_folder.is_run(folder.parent):
        return
    recorded, asked = ({text.casefold() for text in texts} for texts in (texts_of(erased.provenance.erased), concepts))
    if recorded and (asked != recorded if every else asked - recorded):
        names, run = ", ".join(map(repr, concepts)), "; ".join(texts_of(erased.provenance.erased))
        raise ValueError(f"the run erased {run!r}: results for {names} need a folder of their own, give another output")


def _public(source: str) -> str:
    """Where a checkpoint lies, as others may read it: of a folder, its name."""
    path = expanded(source)
    return path.resolve().name if path.exists() else source


def _origin(start_from: Pipeline) -> Origin:
    """Where the weights came from that a run began with, instead of its base's."""
    erased = tuple(map(Erasure.from_dict, files.json_records(start_from.provenance.erased)))
    return Origin(_public(start_from.provenance.source), erased)
