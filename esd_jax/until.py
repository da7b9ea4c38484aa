"""Training until an erasure's figures are within bounds (`evaluation.bounds`), or for so many extensions.

    erased, stages = until.erase("emoji", "neon style", "detection<=0.02, drop<=3", output_dir="runs/neon")

The recipe's steps are trained and the figures of the bounds measured. While one is missed, the same run goes on with
half as many steps again: 200, 300, 450, 675. Whether it ends depends on the measured images, so the last figures may be
better than those of other images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esd_jax import api, runs
from esd_jax.erasure import ConceptText, Erasure, as_texts, texts_of
from esd_jax.evaluation import attacks, store, testbed
from esd_jax.evaluation.attacks import Goal
from esd_jax.evaluation.bounds import FIGURES, Bound, parse
from esd_jax.evaluation.drawing import sampled
from esd_jax.evaluation.evidence import Evidence, Table
from esd_jax.evaluation.gather import Metric
from esd_jax.inputs import expanded
from esd_jax.metrics.intervals import Estimate
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe
from esd_jax.training.checkpoint import Checkpoints

PART = "until"  # of a run's results
EXTENSIONS = 3  # at most, unless more are asked for
SEEDS = range(1_000_000, 1_000_010)  # from which each found token sequence is sampled; no prompt's own

# Name of a bound -> its figure.
Figures = Mapping[str, Estimate | float]
Measure = Callable[[Pipeline], Figures]
# (steps, whether a run goes on, what is called with the result while its folder is still the run's) trains.
Train = Callable[[int, bool, Callable[[Pipeline], None]], Any]


@dataclass(frozen=True)
class Stage:
    """The figures after so many steps."""

    steps: int
    figures: Figures

    def missed(self, bounds: Sequence[Bound]) -> list[Bound]:
        return [bound for bound in bounds if bound.missed_by(value(self.figures[bound.name]))]

    def lines(self, bounds: Sequence[Bound]) -> list[str]:
        """One for each bound: met, or missed and by how much."""
        return [bound.line(value(self.figures[bound.name])) for bound in bounds]


def value(figure: Estimate | float) -> float:
    return figure.value if isinstance(figure, Estimate) else figure


def lengths(steps: int, extensions: int) -> list[int]:
    """After how many steps it is measured: each number is the last and half of it. No steps cannot be extended."""
    numbers = [steps]
    while steps and len(numbers) <= extensions:
        numbers.append(numbers[-1] + -(-numbers[-1] // 2))
    return numbers


def train_until(
    train: Train,
    measure: Measure,
    bounds: Sequence[Bound],
    steps: int,
    *,
    folder: Path,
    settings: Mapping[str, Any] | None,
    extensions: int = EXTENSIONS,
    resume: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    then: Callable[[Pipeline], None] = lambda _: None,
) -> tuple[Stage, ...]:
    """Trains and measures, and goes on where a bound is missed; see `erase`.

    Args:
      train, measure: one part of the run; the figures that the bounds name.
      steps: of the recipe.
      folder: the run's; its results get until.json.
      settings: of the measurement. Figures of a run that goes on are read again if they were measured with the same;
        None: nothing says that two measurements are the same.
      resume: the run is there, and goes on from its newest checkpoint.
      progress: called with a line before each extension.
      then: called with the final result while the folder is still the run's.

    Returns what was measured, in the order of steps.
    """
    numbers = lengths(steps, extensions)
    done = _checkpoint(folder) if resume else 0
    ahead = [number for number in numbers if number >= done] or [done]  # it may have been trained further already
    recorded = {"bounds": ", ".join(f"{bound.name}<={bound.most:g}" for bound in bounds), **(settings or {})}
    earlier = _measured(folder, recorded) if resume and settings is not None else []
    stages = [stage for stage in earlier if stage.steps < ahead[0]]
    for number in ahead:

        def finished(erased: Pipeline, number: int = number) -> None:
            trained = _steps(erased, number)
            stages[:] = [stage for stage in stages if stage.steps != trained]  # of a run that ended by itself
            stages.append(Stage(trained, measure(erased)))
            store.save(evidence(erased, bounds, stages, recorded), folder / runs.EVIDENCE, PART)
            if _over(stages[-1], bounds, number, ahead[-1]):
                then(erased)

        train(number, resume or number != ahead[0], finished)
        if _over(stages[-1], bounds, number, ahead[-1]):
            break
        missed = "; ".join(bound.line(value(stages[-1].figures[bound.name])) for bound in stages[-1].missed(bounds))
        progress(f"after {number} steps: {missed}; going on to {ahead[ahead.index(number) + 1]}")
    return tuple(stages)


def _over(stage: Stage, bounds: Sequence[Bound], number: int, last: int) -> bool:
    """Whether training ends: all bounds are met, nothing is left, or the run itself ended before `number`, as it would
    again."""
    return not stage.missed(bounds) or number == last or stage.steps < number


def trainer(base: Pipeline, plan: Recipe, **options: Any) -> Train:
    """Trains a recipe's run with other numbers of steps.

    options: of `runs.run`, for the part with which the run begins.
    """

    def train(steps: int, goes_on: bool, finished: Callable[[Pipeline], None]) -> None:
        longer = replace(plan, training=replace(plan.training, steps=steps))
        how = options | ({"resume": True, "overwrite": False, "start_from": None} if goes_on else {})
        runs.run(base, longer, then=finished, **how)

    return train


def measuring(
    base: Pipeline,
    concept: ConceptText,
    bounds: Sequence[Bound],
    metric: Metric,
    *,
    goal: Goal | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Measure:
    """Measures what bounds name.

    Args:
      base: before the erasure; what is lost is measured against it, now.
      concept: the text of what is erased, or the texts.
      metric: a model -> (detection rate, retention of everything else).
      goal: of Concept Inversion; by default the testbed's of each concept, of which the worst counts.
      seed: of the search.
      progress: called with a line for each of several concepts that are searched for.

    Raises ValueError for a bound on inversion without a goal.
    """
    names = {bound.name for bound in bounds}
    bed = testbed.of(base.provenance.source)
    goals = {"": goal} if goal is not None else {}
    if "inversion" in names and not goals:
        if bed is None:
            raise ValueError(
                f"a bound on inversion needs a goal, and {base.provenance.source} has no testbed with one: leave it "
                "out, and measure it with `esd-jax attack`"
            )
        goals = {text: bed.goal(base, [text]) for text in as_texts(concept)}
    settings = attacks.preset("concept_inversion", bed.budget if bed else "paper")
    before = metric(base)[1].value if "drop" in names else 0.0

    def inverted(erased: Pipeline, goal: Goal) -> Estimate:
        adversary = attacks.attack(base, erased, goal, settings, seed)
        return attacks.score(erased, adversary, goal, SEEDS, **sampled(bed.sampling if bed else {})).single_shot()

    def measure(erased: Pipeline) -> Figures:
        figures: dict[str, Estimate | float] = {}
        if names & {"detection", "drop"}:
            detection, retained = metric(erased)
            figures |= {"detection": detection, "drop": 100 * (before - retained.value)}
        if "inversion" in names:
            shares = {text: inverted(erased, one) for text, one in goals.items()}
            figures["inversion"] = max(shares.values(), key=lambda share: share.value)
            if len(shares) > 1:
                progress("inversion of each: " + ", ".join(f"{text} {one.value:.0%}" for text, one in shares.items()))
        return {bound.name: figures[bound.name] for bound in bounds}

    return measure


def erase(
    base: Pipeline | str | Path,
    concept: ConceptText,
    bounds: str | Sequence[Bound],
    *,
    output_dir: str | Path,
    metric: Metric | None = None,
    goal: Goal | None = None,
    images: int = 40,
    extensions: int = EXTENSIONS,
    resume: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    **fields: Any,
) -> tuple[Pipeline, tuple[Stage, ...]]:
    """`erase` of a concept until bounds are met.

    Args:
      base, concept: as `erase` takes them.
      bounds: "detection<=0.02, inversion<=0.2, drop<=3": target detection rate, success rate of Concept Inversion, and
        the drop of other concepts in percentage points; or some of them.
      output_dir: the run's folder.
      metric, goal: of the measurement, see `measuring`; by default those of the base's testbed. With others, nothing
        says that a run that goes on was measured with the same, and its figures so far are left out.
      images: of each figure, with the testbed's metric.
      extensions: how often at most the run is extended by half of its steps.
      resume: continue the run in the folder.
      progress: called with a line before each extension.
      **fields: of the recipe, and kind=, config=, overwrite=, start_from= of `erase`.

    Returns the erased pipeline, and what was measured, in the order of steps.

    Raises ValueError for bounds that are none, and for a base without a testbed if its metric, or goal, is missing.
    """
    bounds = parse(bounds) if isinstance(bounds, str) else tuple(bounds)
    begin = {name: fields.pop(name) for name in ("overwrite", "start_from") if name in fields}
    if resume and (besides := [name for name, value in begin.items() if value]):
        raise ValueError(f"resume goes on with the run in the folder: leave {besides[0]} out")
    which = {name: fields.pop(name, None) for name in ("kind", "config")}
    base, plan = api.begun(base, concept, **which, fields={**fields, "output_dir": str(output_dir)}, resume=resume)
    texts = [one.text for one in plan.concepts]
    own = metric is None and goal is None
    if metric is None:
        if (bed := testbed.of(base.provenance.source)) is None:
            raise ValueError(f"{base.provenance.source} has no testbed: give a metric (esd_jax.evaluation.seen.metric)")
        metric = bed.metric(texts, images)
    measure = measuring(base, texts, bounds, metric, goal=goal, progress=progress)
    if isinstance(start := begin.get("start_from"), str | Path):
        begin["start_from"] = api.opened(base, start)
    results: list[Pipeline] = []
    stages = train_until(
        trainer(base, plan, resume=resume, **begin), measure, bounds, plan.training.steps,
        folder=expanded(output_dir), settings={"images": images} if own else None, extensions=extensions, resume=resume,
        progress=progress, then=results.append,
    )  # fmt: skip
    return results[-1], stages


def evidence(
    erased: Pipeline, bounds: Sequence[Bound], stages: Sequence[Stage], settings: Mapping[str, Any]
) -> Evidence:
    """What was measured, as a table: a row for each number of steps, a column for each bound."""
    shares = tuple(FIGURES[bound.name][0] for bound in bounds if bound.name != "drop")
    rows = [("at most", tuple(bound.most for bound in bounds))]
    rows += [(f"{stage.steps} steps", tuple(stage.figures[bound.name] for bound in bounds)) for stage in stages]
    columns = tuple(FIGURES[bound.name][0] for bound in bounds)
    record = erased.provenance.erased[-1] if erased.provenance.erased else Erasure()
    how = "Training went on while a bound was missed. " if len(stages) > 1 else ""
    if not stages[-1].steps:
        how = "A closed form has no steps to go on with. "
    note = how + "; ".join(stages[-1].lines(bounds)) + "."
    title, table = ", ".join(texts_of(erased.provenance.erased)), Table("Bounds", columns, tuple(rows), note, shares)
    return Evidence(title, record, measured_with={PART: dict(settings)}, tables=(table,))


def _measured(folder: Path, settings: Mapping[str, Any]) -> list[Stage]:
    """What was measured with the same settings before a run was stopped."""
    file = folder / runs.EVIDENCE / f"{PART}.json"
    if not file.is_file():
        return []
    stored = store.load(file)
    if stored.measured_with.get(PART) != dict(settings):
        return []
    names = {title: name for name, (title, _) in FIGURES.items()}
    (table,) = stored.tables
    stages = []
    for label, cells in table.rows[1:]:
        figures: dict[str, Any] = {names[column]: cell for column, cell in zip(table.columns, cells, strict=True)}
        stages.append(Stage(int(label.split()[0]), figures))
    return stages


def _steps(erased: Pipeline, number: int) -> int:
    """How many were trained: a run may have ended by itself."""
    record = erased.provenance.erased[-1] if erased.provenance.erased else Erasure()
    return number if record.step is None else record.step


def _checkpoint(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 if there is none."""
    if not (folder / "checkpoints").is_dir():
        return 0
    with Checkpoints(folder / "checkpoints", {}, read_only=True) as checkpoints:
        return checkpoints.latest or 0
