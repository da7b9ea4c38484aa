"""The jobs of the page: each function starts one, and raises ValueError for what it cannot do."""

import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esd_jax import api, dossier, examples, exports, prompt_files, recipe, runs
from esd_jax.evaluation import attacks, testbed
from esd_jax.inputs import finite
from esd_jax.recipe import Recipe
from esd_jax.results import numbered
from esd_jax.runs import replacements
from esd_jax.runs.listing import Run
from esd_jax.studio.jobs import MISTAKES, Desk, Job
from esd_jax.training import run_folder

PREVIEWS = 12  # of a run whose preview_every is left to the studio
OWN = ("base", "concept", "kind", "output_dir")  # fields that the form has, or that the studio chooses
STRENGTHS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # of the curve


def plan(base: str, concept: str, kind: str = "", more: str = "", **fields: Any) -> Recipe:
    """The recipe of an erasure. fields: of the recipe; None and "" leave them to it. more: further fields, as TOML."""
    if not (concept or "").strip():
        raise ValueError("Name what is to be erased, “neon style” or “a cat”; several are separated by “;”.")
    try:
        fields |= tomllib.loads(more or "")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"Further fields: {error}. Write NAME = VALUE, one per line, and texts in quotes.") from None
    if taken := [name for name in OWN if name in fields]:
        raise ValueError(f"Further fields: {taken[0]} is set by the form, or by the studio. Leave it out.")
    types, values = recipe.field_types(), {name: v for name, v in fields.items() if v not in (None, "")}
    values = {name: number(v, name) if types.get(name) in (int, float) else v for name, v in values.items()}
    planned = api.planned(base, concept, kind=kind or None, **values)
    every = planned.training.preview_every or max(1, planned.training.steps // PREVIEWS)
    return recipe.make(**{**planned.flat(), "preview_every": every})


def number(text: Any, name: str) -> Any:
    """The number in a text box; None of an empty one. Raises ValueError, naming it, for other text."""
    if not isinstance(text, str):
        return text
    value = finite(text, name) if text.strip() else None
    return int(value) if value is not None and value.is_integer() else value


def erase(desk: Desk, planned: Recipe) -> Job:
    """Carries a recipe out in a new folder, named after its concept."""
    concept = ", ".join(one.text for one in planned.concepts)
    names = numbered(run_folder.name_of(concept))
    folder = next(desk.folder / name for name in names if not (desk.folder / name).exists())
    return _train(desk, recipe.make(**{**planned.flat(), "output_dir": str(folder)}), f"Erasing {concept}")


def resume(desk: Desk, run: Run) -> Job:
    """Continues a run that was stopped."""
    if run.finished:
        raise ValueError(f"{run.name} is complete: there is nothing left to resume.")
    return _train(desk, run.plan, f"Erasing {', '.join(run.record.texts)}, from update {run.step}", resume=True)


def _train(desk: Desk, planned: Recipe, title: str, **how: Any) -> Job:
    def work(job: Job) -> None:
        base = desk.load(planned)
        stopping = lambda step, metrics: job.state == "stopping"  # noqa: E731
        plan = recipe.read_previews(replacements.resolved(base, planned))
        erased = runs.run(base, plan, on_step=stopping, **how)
        job.note = examples.doubt(base, [concept.text for concept in planned.concepts]) or "Compare shows the result"
        try:
            dossier.picture(erased, job.folder)
        except MISTAKES as error:  # the erasure itself is complete, and kept
            job.note = f"but before and after could not be generated: {error}"

    return desk.start(Job("erase", title, Path(str(planned.output_dir))), work)


def attack(
    desk: Desk, run: Run, names: Sequence[str], budget: str, seeds: int | None, updates: str = "",
    random: bool = False, afresh: bool = False, prompts: str = "", detector: str = "",
) -> Job:  # fmt: skip
    """Attacks a run. budget: "" is the one that goes with the base. updates: of each search, in place of the budget's.
    afresh: discards earlier results."""
    if not names:
        raise ValueError("Choose at least one attack.")
    if seeds is None:
        raise ValueError("Seeds: give a whole number.")
    if not testbed.of(run.plan.base) and not prompts.strip():
        raise ValueError(f"{run.plan.base} needs prompts that name the concept, and a detector: see Another model.")
    searches = [name for name in names if "steps" in attacks.ATTACKS[name].__dataclass_fields__]
    settings = {name: {"steps": steps} for name in searches} if (steps := number(updates, "updates")) else None

    def work(job: Job) -> None:
        (base, erased), evidence = desk.pair(run), run.folder / dossier.EVIDENCE
        goal, detector_name = None, "the embedded probe"
        if prompts.strip():
            texts = prompt_files.listed(prompts, "prompts")
            goal, detector_name = dossier.goal(base, run.record.texts, texts, detector)
        if afresh:
            shutil.rmtree(evidence / "attacks", ignore_errors=True)
        dossier.attack(
            base, erased, names, output_dir=evidence, budget=budget or None, settings=settings, seeds=seeds,
            random=random, goal=goal, judge=detector_name,
        )  # fmt: skip

    return desk.start(Job("attack", f"Attacking {run.name}", run.folder), work)


def report(desk: Desk, run: Run, protocol: str = "") -> Job:
    """Writes a run's report, after an evaluation if a protocol is named."""

    def work(job: Job) -> None:
        (base, erased), evidence = desk.pair(run), run.folder / dossier.EVIDENCE
        if protocol:
            dossier.evaluate(base, erased, protocol, output_dir=evidence)
        job.file = dossier.report(run.folder, base=base)

    return desk.start(Job("report", f"Writing the report on {run.name}", run.folder), work)


def curve(desk: Desk, run: Run, images: int | None) -> Job:
    """Measures the detection rate and the retention over the strength of the weight change."""
    if images is None:
        raise ValueError("Images: give a whole number.")
    if not (bed := testbed.of(run.plan.base)):
        raise ValueError(f"For a model that is not in the package: esd-jax evaluate {run.folder} --strengths=0,0.5,1")

    def work(job: Job) -> None:
        metric, evidence = bed.metric(run.record.texts, images), run.folder / dossier.EVIDENCE
        dossier.front(desk.pair(run)[1], metric, STRENGTHS, output_dir=evidence)

    return desk.start(Job("strength", f"Measuring {run.name}", run.folder), work)


def export(desk: Desk, run: Run, format: str, dtype: str = "", rank: str = "") -> Job:
    """Writes a run in a format and verifies it; a folder is zipped, too."""
    options = {"dtype": dtype, "rank": number(rank, "rank")}
    options = {name: value for name, value in options.items() if value and name in exports.FORMATS[format].options}

    def work(job: Job) -> None:
        how = {"verify": True, "overwrite": True, "metadata": dossier.facts(run.folder), **options}
        (written,) = exports.export_all(desk.pair(run)[1], run.folder / runs.EXPORTS, [format], **how)
        file = written.path
        job.file = Path(shutil.make_archive(str(file), "zip", file.parent, file.name)) if file.is_dir() else file
        job.note = str(written)

    return desk.start(Job("export", f"Exporting {run.name} as {format}", run.folder), work)


def delete(desk: Desk, run: Run) -> None:
    """Removes a run's folder. Raises ValueError for the one that a job works on."""
    if desk.job and desk.job.active and desk.job.folder == run.folder:
        raise ValueError(f"“{desk.job.title}” works on {run.name}: stop it first.")
    shutil.rmtree(run.folder)
