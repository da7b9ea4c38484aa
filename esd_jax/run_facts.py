"""What a run's folder says besides its evidence: when and where it ran, its files, and how they are used."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from esd_jax import exports, runs
from esd_jax.evaluation import testbed
from esd_jax.evaluation.drawing import sampled
from esd_jax.evaluation.report import snippets
from esd_jax.evaluation.report.about import About, File, Use
from esd_jax.io import hub
from esd_jax.pipeline import Pipeline
from esd_jax.runs import sessions

# Files of a run that a reader may want, and what they are.
NAMED = {
    "before_after.png": "before and after at equal seeds",
    "report.json": "the figures of this report",
    "ERASURE.md": "the card for model hubs",
    "run.json": "the recipe and the record of the erasure",
    "log.jsonl": "the loss of each update",
    "rounds.jsonl": "what each inversion round measured",
}
METADATA = "_CHECKPOINT_METADATA"  # of Orbax: when a checkpoint was written


def about(folder: Path, erased: Pipeline, *, shown: str = "") -> About:
    """The facts of a run.

    Args:
      folder: the run's. erased: its erased model. shown: the folder as code and commands name it.
    """
    here = sessions.read(folder)
    kept = tuple(_files(folder, erased))
    return About(
        folder=shown,
        date=_date(folder),
        seconds=sessions.seconds(folder),
        device=_device(here[-1]) if here else "",
        license=license_of(erased),
        base=base_id(erased),
        files=kept,
        uses=uses(kept, erased, folder=shown),
    )


def uses(files: tuple[File, ...], erased: Pipeline, *, folder: str = "", repo: str = "") -> tuple[Use, ...]:
    """How files of an erased model are used, as seen from where they lie in `folder`, or in a repository of the hub."""
    bed = testbed.of(erased.provenance.source)
    source = snippets.Source(
        prompt=_prompt(erased),
        base=base_id(erased),
        folder=folder,
        repo=repo,
        pipeline=str(erased.index.get("_class_name", "StableDiffusionPipeline")),
        denoiser=erased.denoiser,
        sampling=sampled(bed.sampling) if bed else {},
        arguments=erased.family.arguments(erased.configs),
        embedded=bed.source if bed else "",
    )
    return snippets.uses(files, source)


def base_id(erased: Pipeline) -> str | None:
    """The base's name where it is the id of a model on the hub ("org/name"), else None."""
    records = erased.provenance.erased
    base = (records[-1].base if records else None) or str(erased.provenance.source)
    return base if hub.HUB_ID.fullmatch(base) and not Path(base).exists() else None


def license_of(erased: Pipeline) -> str | None:
    """The licence of an erased model: its base's, as the record, the base's card or the hub's id of the base say."""
    records, folder = erased.provenance.erased, erased.provenance.folder
    if recorded := next((record.license for record in reversed(records) if record.license), None):
        return recorded
    if folder and (license_id := hub.license_of(folder / "README.md")):
        return license_id
    base = (records[-1].base if records else None) or str(erased.provenance.source)
    return next((name for pattern, name in LICENSES if re.search(pattern, base, re.IGNORECASE)), None)


# Published checkpoints, by their hub ids, and their licences.
LICENSES = (
    (r"^(CompVis|runwayml|stable-diffusion-v1-5|sd-legacy)/stable-diffusion-v1", "creativeml-openrail-m"),
    (r"^(stabilityai|sd2-community)/stable-diffusion-(2|xl-base)", "openrail++"),
)


def _prompt(erased: Pipeline) -> str:
    """One that names what was erased."""
    bed, texts = testbed.of(erased.provenance.source), [t for e in erased.provenance.erased for t in e.texts]
    groups = bed.examples(texts) if bed and texts else None
    return groups[0][1][0] if groups else (texts[0] if texts else "a photo of a cat")


def _files(folder: Path, erased: Pipeline) -> Iterator[File]:
    model = folder / runs.MODEL
    if (model / "model_index.json").is_file():
        what = exports.FORMATS["folder"].what
        yield File(f"{runs.MODEL}/", _size(model), f"the erased model, a {what}", "folder")
    for path in sorted(folder.glob("*.safetensors")):
        format = "lora" if path.name == runs.LORA else "delta"
        yield File(path.name, path.stat().st_size, exports.FORMATS[format].what, format)
    for path in sorted((folder / runs.EXPORTS).glob("*")):
        if path.name.startswith(".") or (format := format_of(path)) is None:
            continue
        end = "/" if path.is_dir() else ""
        yield File(f"{runs.EXPORTS}/{path.name}{end}", _size(path), exports.FORMATS[format].what, format)
    for name, what in NAMED.items():
        if (folder / name).is_file():
            yield File(name, (folder / name).stat().st_size, what)


def format_of(path: Path) -> str | None:
    """The format (`exports.FORMATS`) of an exported file or folder, by its name's ending; None of another file."""
    if path.is_dir():
        return "folder" if (path / "model_index.json").is_file() else "orbax" if (path / "params").is_dir() else None
    if path.suffix != ".safetensors":
        return None
    endings = {name: kind.ending for name, kind in exports.FORMATS.items() if kind.ending.endswith(".safetensors")}
    fitting = [name for name, ending in endings.items() if path.name.endswith(ending)]
    return max(fitting, key=lambda name: len(endings[name]))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def _date(folder: Path) -> datetime | None:
    """When the newest checkpoint was written, else when the last session began."""
    moments = []
    for file in folder.glob(f"checkpoints/*/{METADATA}"):
        try:
            moments.append(int(json.loads(file.read_text())["commit_timestamp_nsecs"]) / 1e9)
        except (ValueError, KeyError, TypeError):
            continue
    if moments:
        return datetime.fromtimestamp(max(moments), UTC)
    here = sessions.read(folder)
    return datetime.fromisoformat(here[-1]["started"]) if here else None


def _device(session: Mapping[str, Any]) -> str:
    """ "NVIDIA H100 80GB HBM3", "8 x TPU v5e", "CPU, 2 cores"."""
    kind, count, cores = session.get("device", ""), session.get("devices", 1), session.get("cores")
    if kind == "cpu":
        return f"CPU, {cores} cores" if cores else "CPU"
    return kind if count == 1 else f"{count} x {kind}"
