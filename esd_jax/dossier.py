"""The evaluation results of an erasure, from files: evaluate it, attack it, and write the report.

Each part is stored in a folder ("evidence" in a run's): NAME.json and NAME.npz. The report is made of the parts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax import api, examples, repeat, report_files, results, runs, several, wording
from esd_jax.erasure import ConceptText, Erasure, as_texts, texts_of
from esd_jax.evaluation import attacks, gather, protocols, seen, store, testbed
from esd_jax.evaluation.attacks import Goal, Kept, goals
from esd_jax.evaluation.drawing import recorded
from esd_jax.evaluation.evidence import Evidence, Moment
from esd_jax.evaluation.gather import Metric
from esd_jax.evaluation.report import card, comparison
from esd_jax.inputs import check_text, expanded
from esd_jax.io import exact
from esd_jax.io.safetensors import annotate, read_header
from esd_jax.loading import is_run
from esd_jax.pipeline import Pipeline
from esd_jax.results import writing

EVIDENCE = runs.EVIDENCE
BASE, ERASED, PLACEBO = "base", "erased", "sham"
Progress = Callable[[str], None]


def silent(_: str) -> None:
    pass


def opened(erased: str | Path, base: Pipeline | str | Path | None = None) -> tuple[Pipeline, Pipeline]:
    """(base, erased) of what was erased: a run's folder, a delta file, or a diffusers folder.

    Args:
      base: what it was erased from, a pipeline or what `load` takes; of a run, where that lies now, if it has moved.

    Raises FileNotFoundError, ValueError: what is missing.
    """
    path = expanded(erased)
    if is_run(path):
        restored = api.restore(path, base=base)
        return exact.unmodified(restored), restored
    if base is None:
        raise ValueError(f"{erased} is no run, so it does not say what it was erased from: name the base, too")
    before = base if isinstance(base, Pipeline) else api.load(base)
    return before, api.opened(before, path)


def concepts_of(erased: Pipeline, concept: ConceptText | None = None) -> tuple[str, ...]:
    """The texts of what was erased: of the concept or concepts that are given, else of the model's records.

    Raises ValueError if nothing says so.
    """
    if not (texts := as_texts(concept) if concept else texts_of(erased.provenance.erased)):
        raise ValueError("the model does not say what was erased from it: name the concept")
    for text in texts:
        check_text(text, "the concept")
    return texts


def evaluate(
    base: Pipeline,
    erased: Pipeline,
    protocol: str = "quick",
    *,
    output_dir: str | Path,
    concept: ConceptText | None = None,
    images: int | None = None,
    sham: Pipeline | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Evidence:
    """Measures erasure and retention, and stores the result in `output_dir`.

    Args:
      base, erased: before and after.
      protocol: one of `esd_jax.evaluation.PROTOCOLS`; or, of a testbed's model, the testbed's ("emoji", and "smoke"
        and "quick" with fewer images, for the embedded model).
      output_dir: images that are there already are not sampled again, so that a stopped evaluation continues.
      concept: the text of what was erased, or the texts; by default what the model's records say.
      images: how many of each group (emoji), or of the list of prompts; by default the protocol's.
      sham: the placebo, the base from which a nonsense word was erased with the same recipe; for a testbed's model.
      progress: called with a line after each part.
      **options: of `protocols.evaluate`: prompt_list, samples, measured, request, steps, ...; of the testbed's.

    Raises ValueError for an unknown name, a detector that is not installed, or a folder with other settings.
    """
    concepts, folder, options = concepts_of(erased, concept), expanded(output_dir), recorded(options)
    runs.check_measured(folder, erased, concepts, every=True)
    if bed := testbed_for(base, protocol, options.get("prompt_list")):
        bed.detector(concepts)  # refuses what it does not know before a folder is made
        models = {BASE: base, ERASED: erased} | ({PLACEBO: sham} if sham else {})
        folders = {name: _own(folder / "images" / name, protocols.identity(m)) for name, m in models.items()}
        count = images or bed.images[protocol]
        evidence = bed.evaluate(models, concepts, num_images=count, folders=folders, progress=progress, **options)
    else:
        evidence = protocols.evaluate(
            base, erased, concepts, protocol, folder, limit=images, progress=progress, **options
        )
    evidence = dataclasses.replace(evidence, record=_record(erased))
    store.save(evidence, folder, store.free(folder, f"evaluation-{protocol}", evidence))
    return evidence


def testbed_for(base: Pipeline, protocol: str, prompt_list: Any = None) -> testbed.Testbed | None:
    """The testbed that measures with a protocol: the base's own, or that of the protocol's name; None for all others.

    A list of prompts is no testbed's.
    """
    bed = testbed.of(base.provenance.source) or testbed.of(protocol)
    return bed if bed and protocol in bed.images and not prompt_list else None


def front(erased: Pipeline, metric: Metric, strengths: Sequence[float], *, output_dir: str | Path) -> Evidence:
    """Measures scales of an erasure's weight change, and stores the curve in `output_dir`; see `gather.front`."""
    title = ", ".join(concepts_of(erased))
    evidence = Evidence(title, _record(erased), front=gather.front(metric, erased, strengths))
    store.save(evidence, expanded(output_dir), "front")
    return evidence


def attack(
    base: Pipeline,
    erased: Pipeline,
    names: Sequence[str] | None = None,
    *,
    output_dir: str | Path,
    concept: ConceptText | None = None,
    budget: str | None = None,
    goal: Goal | None = None,
    judge: str = "the embedded probe",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Evidence:
    """Attempts to recover the erased concept, and stores the results in `output_dir`.

    Args:
      base, erased: before and after.
      names: of `esd_jax.attacks.ATTACKS` and `PROBES`, or "concept_inversion_family"; "all", and the default, leave out
        what the base lacks something for.
      output_dir: an attack whose results are there already is not run again.
      concept: the text of what was erased, or the texts; by default what the model's records say.
      budget: a preset of the attacks: "paper", or the testbed's, by default, where the base has one.
      goal: what to recover, and its detector; by default the testbed's, of the first concept.
      judge: the name of the goal's detector.
      settings: attack -> changes of its fields.
      progress: called with a line after each attack.
      **options: of `attacks.campaign`: seeds, seed, random, placebo, steps, guidance_scale, batch_size.

    Raises ValueError for an unknown attack, one that lacks something, a missing goal, or a folder with other settings.
    """
    concepts, folder, options = concepts_of(erased, concept), expanded(output_dir), recorded(options)
    runs.check_measured(folder, erased, concepts)
    bed = testbed.of(base.provenance.source)
    budget = budget or (bed.budget if bed else "paper")
    chosen = attacks.possible(base, names, budget, settings, progress)
    if goal is None:
        if bed is None:
            raise ValueError("attacks need a goal: prompts that name the concept, images of it, and what detects it")
        goal = bed.goal(base, concepts)
    chosen = attacks.within(chosen, names, lambda one: attacks.lacking(one, base, goal), progress)
    options = {**bed.sampling, **options} if bed else options
    if (count := len(texts_of(erased.provenance.erased) or concepts)) > 1:
        progress(f"searched for: {goal.concept!r}, one of {count}; for another, give concept and another output")
        options["alone"] = True
    # Results of other models, goals or seeds that lie there are refused below.
    earlier = store.readable(folder / "attacks.json") if any((folder / "attacks").glob("*.npz")) else None
    evidence = attacks.campaign(
        base,
        erased,
        goal,
        chosen,
        folder / "attacks",
        control=attacks.preset("random_prompts", budget.partition("_")[0]),  # of "emoji_k" and the like, as "emoji" has
        identity=protocols.identities(judge, base, erased=erased, placebo=options.get("placebo")),
        progress=progress,
        **options,
    )
    evidence = dataclasses.replace(evidence, record=_record(erased))
    store.save(store.joined(earlier, evidence) if earlier else evidence, folder, "attacks")
    return evidence


def goal(
    base: Pipeline, concept: ConceptText, prompts: Sequence[str], detector: str, *,
    images_each: int = 4, kept: Mapping[str, str] | None = None, **drawing: Any,
) -> tuple[Goal, str]:  # fmt: skip
    """A goal for `attack` on any model, and the name of its detector.

    Args:
      base: generates the images that the attacks learn from.
      concept: the text of what was erased, or the texts: then the goal is the first that all prompts name.
      prompts: that name the concept.
      detector: of the concept; see `seen.detector`.
      images_each: of each prompt. Only images in which the concept is detected are used.
      kept: other concepts, for some probes, as prompts -> their detectors: {"a church": "imagenet:church"}.
      **drawing: steps, guidance_scale, batch_size of `sample`.

    Raises ValueError for a prompt of which the base generates no image with the concept.
    """
    texts = as_texts(concept)
    detect, judge = seen.detector(detector, texts, base)
    named = (text for text in texts if all(wording.names(text, prompt) for prompt in prompts))
    drawing["kept"] = [Kept(text, seen.detector(name, text, base)[0]) for text, name in (kept or {}).items()]
    return goals.drawn(base, next(named, texts[0]), prompts, detect, images_each=images_each, **drawing), judge


def default_goal(base: Pipeline, concept: str) -> Goal:
    """What the testbed of a base has attacks recover. Raises ValueError for a base without one."""
    if (bed := testbed.of(base.provenance.source)) is None:
        raise ValueError(f"{base.provenance.source} is no testbed: give prompts and a detector (attacks.goal)")
    return bed.goal(base, [concept])


def report(run: str | Path, *, base: Pipeline | str | Path | None = None) -> Path:
    """Writes the report of a run into its folder: report.html, report.json and the card, ERASURE.md.

    Args:
      run: a run's folder; or another one that holds evaluation results, whose report lacks what only a run has.
      base: where the run's base lies now, if it has moved; or the base itself.

    The card is also the README.md of the run's diffusers folders; its facts go into the metadata of its weight files.

    Returns the HTML file.

    Raises FileNotFoundError if there are no results.
    """
    folder = expanded(run)
    erased = api.restore(folder, base=base) if is_run(folder) else None
    if erased and not any(part.pictures for part in _parts(folder / EVIDENCE)):
        picture(erased, folder)
    evidence = _of_run(folder, erased) if erased else _kept(folder)
    with writing(folder / report_files.PAGE):
        page = report_files.write(folder, evidence, erased)
    for file in folder.rglob("*.safetensors") if erased else ():
        # Of an export, files that were not erased from are the base's, byte for byte.
        if card.describes(read_header(file), evidence.record):
            annotate(file, card.facts(evidence), replacing=card.is_fact)
    return page


def facts(run: str | Path) -> dict[str, str]:
    """A run's results as flat texts, for the metadata of an export."""
    folder = expanded(run)
    record, _ = runs.read(folder)
    evidence = store.merged(", ".join(record.texts), record, _parts(folder / EVIDENCE))
    return card.facts(dataclasses.replace(evidence, command=repeat.command(record)))


def picture(erased: Pipeline, run: str | Path) -> Path:
    """Writes before and after at equal seeds into a run's folder, and returns the picture; see `examples.draw`."""
    folder = expanded(run)
    with writing(folder / examples.PICTURE):
        return examples.write(examples.draw(erased), folder / examples.PICTURE, folder / EVIDENCE)


def gathered(run: str | Path, *, base: str | Path | None = None, erased: Pipeline | None = None) -> Evidence:
    """The results of a run, or of another folder that holds some. erased: of a run, if it is open already."""
    folder = expanded(run)
    return _of_run(folder, erased or api.restore(folder, base=base)) if is_run(folder) else _kept(folder)


def so_far(evidence: Evidence, folder: str | Path) -> Evidence:
    """One part's results beside those of the folder that it was stored in; alone where one of these is damaged."""
    try:
        return store.merged(evidence.title, evidence.record, _parts(expanded(folder)))
    except ValueError:  # a report will say so
        return evidence


def _kept(folder: Path) -> Evidence:
    """The results in a folder that is no run's."""
    if not (parts := _parts(folder)):
        raise FileNotFoundError(f"{folder} is no run, and holds no evaluation results: evaluate it first")
    return store.merged(parts[0].title, parts[0].record, parts)


def _of_run(folder: Path, erased: Pipeline) -> Evidence:
    """The results of a run that is open."""
    record, concepts = _record(erased), concepts_of(erased)
    course = gather.course(folder, record)
    bed = testbed.of(erased.provenance.source)
    if bed and bed.examples(concepts) is not None:  # it knows the concepts
        detect, _ = bed.detector(concepts)
        course = dataclasses.replace(course, timeline=tuple(_detected(moment, detect) for moment in course.timeline))
    templates = several.parts("preview_prompts", (record.recipe or {}).get("preview_prompts")) or ("{}",)
    course = dataclasses.replace(
        course,
        timeline_prompts=several.filled(templates, concepts) if course.timeline else (),
        weights=gather.weight_changes(erased),
    )
    evidence = store.merged(", ".join(concepts), record, [*_parts(folder / EVIDENCE), course])
    once = len(erased.provenance.erased) == 1  # of several in turn, no one command makes them all
    return dataclasses.replace(evidence, command=evidence.command or (repeat.command(record) if once else ""))


def _detected(moment: Moment, detect: seen.Detect) -> Moment:
    """A moment with the images in which the concept is detected."""
    hits = tuple(map(bool, detect(moment.images)))
    return dataclasses.replace(moment, detected=hits, score=float(np.mean(hits)))


def _parts(folder: Path) -> list[Evidence]:
    """The parts that are stored in a folder; what was measured shows more than the examples."""
    parts = store.parts(folder)
    if any(part.pictures for name, part in parts.items() if name != examples.PART):
        parts.pop(examples.PART, None)
    return list(parts.values())


def compare(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Writes several runs side by side as one HTML file, and returns it."""
    if len(runs) < 2:
        raise ValueError("compare needs two runs or more")
    output = expanded(output)
    page = comparison.compare([gathered(run) for run in runs])
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    return output


def _record(erased: Pipeline) -> Erasure:
    """The newest erasure's record."""
    return erased.provenance.erased[-1] if erased.provenance.erased else Erasure()


def _own(folder: Path, identity: Mapping[str, Any]) -> Path:
    """A folder of one model's images. Raises ValueError if it is another's."""
    if results.read(file := folder / "model.json", folder, **identity) is None:
        results.write(file, {}, **identity)
    return folder
