"""The files of a report: the page, its figures as JSON, and the card; and a repository of the hub with the card."""

import dataclasses
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from esd_jax import examples, run_facts
from esd_jax.erasure import Erasure
from esd_jax.evaluation import store
from esd_jax.evaluation.evidence import Evidence, as_json
from esd_jax.evaluation.report import card, verdict
from esd_jax.evaluation.report.about import About, File
from esd_jax.evaluation.report.html import report as html
from esd_jax.exports import FORMATS, Written
from esd_jax.io import hub
from esd_jax.io.safetensors import read_header
from esd_jax.pipeline import Pipeline

PAGE, FIGURES, CARD, README = "report.html", store.FIGURES, "ERASURE.md", "README.md"


def write(folder: Path, evidence: Evidence, erased: Pipeline | None) -> Path:
    """Writes the report of an erasure into a folder, and a card into the diffusers folders there. Returns the page.

    Args:
      erased: the erased model of a run; None of a folder of evidence alone.
    """
    shown = _shown(folder)
    figures = {"sentence": verdict.sentence(evidence), **as_json(evidence)}
    (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    picture = examples.PICTURE if (folder / examples.PICTURE).is_file() else None
    facts = run_facts.about(folder, erased, shown=shown) if erased else About()
    text = card.card(evidence, picture=picture, report=PAGE, facts=facts)
    (folder / CARD).write_text(text, encoding="utf-8")
    for file in facts.files:
        if file.format == "folder" and erased and _of_record(folder / file.path, evidence.record):
            readme(folder / file.path, evidence, erased, picture=folder / examples.PICTURE)
    facts = run_facts.about(folder, erased, shown=shown) if erased else facts  # with what was written by now
    page = html(evidence, run=shlex.quote(shown), facts=facts)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return folder / PAGE


def _shown(folder: Path) -> str:
    """A folder as a page that is passed on shows it: relative to this one, or its name alone."""
    below = folder.absolute().is_relative_to(Path.cwd())
    return str(folder.absolute().relative_to(Path.cwd()) if below else folder.name)


def _of_record(folder: Path, record: Erasure) -> bool:
    """Whether a diffusers folder holds all of an erasure's change."""
    return any(card.describes(read_header(file), record) for file in folder.rglob("*.safetensors"))


def readme(folder: Path, evidence: Evidence, erased: Pipeline, *, picture: Path | None = None) -> Path:
    """Writes the card of an erased model into its diffusers folder, with the picture if there is one."""
    shown = picture if picture and picture.is_file() else None
    if shown:
        shutil.copyfile(shown, folder / shown.name)
    path = folder / README
    path.write_text(card_of([File("", 0, "", "folder")], evidence, erased, picture=shown), encoding="utf-8")
    return path


def card_of(
    files: Sequence[File], evidence: Evidence, erased: Pipeline, *, picture: Path | None = None, repo: str = ""
) -> str:
    """The card of an erased model's files, whose paths are as seen from the card.

    repo: the repository of the hub in which they lie.
    """
    uses = run_facts.uses(tuple(files), erased, repo=repo, folder="" if repo else "path/to/this/folder")
    facts = About(license=run_facts.license_of(erased), base=run_facts.base_id(erased), uses=uses)
    adapter = not any(FORMATS[file.format].whole for file in files)
    return card.card(evidence, picture=picture and picture.name, facts=facts, adapter=adapter)


def push(
    repo: str,
    written: Sequence[Written],
    evidence: Evidence,
    erased: Pipeline,
    *,
    picture: Path | None = None,
    private: bool = True,
) -> str:
    """Uploads exports of an erased model to a repository of the hub, with the card as its README.md.

    A diffusers folder comes to lie in the root, everything else beside it under its own name.

    Args:
      repo: "ORG/NAME". written: what `exports` wrote.
      evidence: what is known of the erasure. picture: of before and after.
      private: see `hub.push`.

    Returns the address. Raises ValueError, in one line, if that fails.
    """
    places: Mapping[Path, str] = {one.path: "" if one.format == "folder" else one.path.name for one in written}
    files = [File(place, 0, "", one.format) for one, place in zip(written, places.values(), strict=True)]
    shown = picture if picture and picture.is_file() else None
    if shown:
        places = {**places, shown: shown.name}
    text = card_of(files, evidence, erased, picture=shown, repo=repo)
    message = f"Upload a model from which {evidence.title} was erased"
    return hub.push(repo, places, text, private=private, message=message)


def without_measurements(erased: Pipeline, strength: float = 1.0) -> Evidence:
    """What an erased model says of itself, where nothing is known of how it was measured.

    strength: how much of the erasure's change it has.
    """
    records = erased.provenance.erased
    texts = dict.fromkeys(text for record in records for text in record.texts)
    plain = Evidence(", ".join(texts) or "nothing recorded")
    if strength != 1:
        caveat = f"The files have {strength:g} of the erasure's weight change; the command makes all of it."
        plain = dataclasses.replace(plain, caveats=(caveat,))
    return dataclasses.replace(plain, record=records[-1]) if records else plain
