"""What is measured for the table of attacks: a row's model, its evaluation, and each attack on it, as cells."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esd_jax import api, attacks, formats, recipe
from esd_jax.demo import groups, testbed
from esd_jax.demo.gallery import Gallery
from esd_jax.demo.groups import Target
from esd_jax.demo.measure import BASE, ERASED, measure
from esd_jax.demo.table import as_dict
from esd_jax.evaluation.attacks import Attack, Goal, Probe
from esd_jax.evaluation.attacks.adversary import RANDOM
from esd_jax.evaluation.attacks.campaigns import FRESH, named
from esd_jax.evaluation.drawing import sampled
from esd_jax.loading import is_run
from esd_jax.metrics.intervals import Estimate
from esd_jax.pictures import check_not_blank
from esd_jax.pipeline import Pipeline
from esd_jax.runs import sessions
from launch.command import say
from launch.experiments import attack_cells
from launch.experiments.results import Cells, kept

Search = Attack | Probe
GROUPS = ("own", "implicit", "nearest", "others")
ERASURE, EVALUATION, MINUTES = "erasure", "evaluation", "minutes"  # two cells, and the first one's only figure
PROMPTS, IMAGES_EACH = 8, 4  # of a goal: prompts at most, and the base's images of each


@dataclass(frozen=True)
class Budget:
    """How much is measured.

    images: of each group and model, in the evaluation. seed: of their noise.
    attack_images: of an attack with one trial for each prompt. attack_seed: of all random numbers of the attacks.
    batch_size: images at a time, which changes none.
    """

    images: int
    attack_images: int
    seed: int
    attack_seed: int
    batch_size: int

    @property
    def prompts(self) -> int:
        """Of a goal; fewer than `PROMPTS` only where fewer images are asked for."""
        return min(PROMPTS, self.attack_images)

    @property
    def seeds(self) -> int:
        """From how many seeds each trial is sampled, the same for all models and attacks."""
        return -(-self.attack_images // self.prompts)

    @property
    def evaluation(self) -> dict[str, Any]:
        """What the cell of the evaluation depends on."""
        return {"images": self.images, "seed": self.seed}

    @property
    def attack(self) -> dict[str, Any]:
        """What the cell of an attack depends on beside the attack."""
        return {
            "prompts": self.prompts, "images_each": IMAGES_EACH, "seeds": self.seeds, "seed": self.attack_seed,
            "drawing": dict(testbed.EMOJI.sampling),
        }  # fmt: skip

    def goal(self, base: Pipeline, target: Target) -> Goal:
        """What the attacks on a target are to recover."""
        return testbed.goal(base, target, self.prompts, IMAGES_EACH, self.attack_seed)


@dataclass(frozen=True)
class Row:
    """A recipe, a config with some fields changed, or one of the controls `BASE` and `RANDOM`; for one target.

    strength: how much of the weight change the model has. run: the folder of the erasure, which rows that differ in
      their strength alone share.
    """

    name: str
    target: Target
    cells: Cells
    config: str | None = None
    changes: Mapping[str, Any] | None = None
    strength: float = 1.0
    run: Path = Path()

    @property
    def lost(self) -> bool:
        """Whether the erasure failed, so that there is no model to measure."""
        return "failed" in self.cells.cells.get(ERASURE, {})


@dataclass(frozen=True)
class Work:
    """A cell to measure: the name of its column, its key and settings, and the attack, if it is one."""

    column: str
    key: str
    settings: Mapping[str, Any]
    search: Search | None = None

    def concerns(self, row: Row) -> bool:
        """Whether the cell can be measured on a row's model."""
        if row.config is not None:
            return True
        if self.search is None:
            return row.name == BASE and self.key == EVALUATION
        return not isinstance(self.search, Probe) or row.name in self.search.MODELS

    def missing(self, row: Row) -> bool:
        """Whether it is to be measured. Raises ValueError where it was with other settings."""
        return self.concerns(row) and not row.cells.measured(self.key, self.settings)


def planned(searches: Mapping[str, Mapping[str, Search]], budget: Budget) -> list[Work]:
    """All cells of a row, in the order in which they are measured. searches: column -> key -> settings."""
    return [
        Work(ERASURE, ERASURE, {}),
        Work(EVALUATION, EVALUATION, budget.evaluation),
        *(
            Work(column, key, {**budget.attack, "attack": {**named(one), **asdict(one)}}, one)
            for column, parts in searches.items()
            for key, one in parts.items()
        ),
    ]


def wanted(row: Row, work: Sequence[Work], only: Callable[[str, str], bool]) -> list[Work]:
    """What is to be measured now of a row: what `only` (row, column) has, and the erasure that it needs."""
    missing = [one for one in work if one.missing(row)]  # all, so that other settings are found first
    some = [one for one in missing if only(row.name, one.column)]
    return [one for one in missing if one in some or (some and one.key == ERASURE)]


def recipe_of(target: Target, config: str, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an erasure's result depends on beside its base and concepts; None if the recipe cannot erase these.

    Raises ValueError for a recipe that erases nothing.
    """
    try:
        fields = api.planned("emoji", target.concepts, config=config, **changes).flat()
    except ValueError:
        recipe.make(**{**recipe.read(config).to_dict(), **changes})  # raises, if it is not the concepts
        return None
    return {name: value for name, value in fields.items() if name not in ("base", "concept", "output_dir")}


def fill(
    base: Pipeline,
    row: Row,
    missing: Sequence[Work],
    goal: Callable[[], Goal],
    drawn: Gallery,
    budget: Budget,
    left: Iterator[int],
) -> None:
    """Measures what is missing of a row. drawn: the base's images. left: how many cells are after each."""
    model = functools.cache(functools.partial(model_of, base, row, budget.attack_seed))

    def compute(one: Work) -> dict[str, Any]:
        if one.key == ERASURE:
            model()
            minutes = (sessions.seconds(row.run) or 0.0) / 60
            return {"figures": attack_cells.stored({MINUTES: Estimate(minutes, minutes, minutes, 1)})}
        if one.search is None:
            return evaluated(base, row, model(), drawn, budget)
        return attacked(base, model(), one.search, goal(), budget, may_be_blank=row.name == RANDOM)

    for one in missing:
        after = next(left)
        if row.lost and one.key != ERASURE:
            continue
        cell = row.cells.measure(one.key, one.settings, functools.partial(compute, one))
        result = cell.get("failed") or "  ".join(f"{name} {v['value']:.3g}" for name, v in cell["figures"].items())
        say(f"{row.target.concept}: {row.name}, {one.key}: {result}  {cell['seconds']:.0f} s ({after} left)")


def model_of(base: Pipeline, row: Row, seed: int) -> Pipeline:
    """The row's model; an erasure is read, or gone on with, where its run is there. seed: of random weights."""
    if row.config is None:
        return base if row.name == BASE else attacks.random_weights(base, seed)
    erased = _erased(base, row)
    return erased if row.strength == 1 else formats.with_strength(erased, row.strength)


def _erased(base: Pipeline, row: Row) -> Pipeline:
    if is_run(row.run) and row.cells.measured(ERASURE, {}):
        return api.restore(row.run, base=base)
    goes_on = any(path.name.isdigit() for path in row.run.glob("checkpoints/*"))
    how: dict[str, Any] = {"resume": True} if goes_on else {"overwrite": row.run.exists()}
    fields: dict[str, Any] = {"preview_every": 0, **(row.changes or {}), "output_dir": str(row.run)}
    return api.erase(base, row.target.concepts, config=row.config, **how, **fields)


def evaluated(base: Pipeline, row: Row, erased: Pipeline, drawn: Gallery, budget: Budget) -> dict[str, Any]:
    """Detection on target prompts, and what is kept of the others."""
    models, galleries, name = {BASE: base}, {BASE: drawn}, BASE
    if row.config is not None:
        models[ERASED], name = erased, ERASED
        output = row.cells.file.parent.parent
        galleries[ERASED] = kept(output, f"{row.name} {row.target.concept}"[:80], row.cells.settings)
    measured = measure(
        models, [group for group in groups.groups(row.target) if group.name in GROUPS], row.target,
        num_images=budget.images, seed=budget.seed, other_seed=False, galleries=galleries, batch_size=budget.batch_size,
    )  # fmt: skip
    figures = attack_cells.evaluation_figures(measured, row.target.kind, name)
    return {"figures": attack_cells.stored(figures), "groups": as_dict(measured)}


def attacked(
    base: Pipeline, victim: Pipeline, search: Search, goal: Goal, budget: Budget, *, may_be_blank: bool
) -> dict[str, Any]:
    """What an attack or a probe achieves; the hits of each trial and seed are kept. Raises ValueError for blank images.

    may_be_blank: those of random weights are.
    """
    seed, drawing = budget.attack_seed, {**sampled(testbed.EMOJI.sampling), "batch_size": budget.batch_size}
    fresh = [FRESH + 10_000 * seed + i for i in range(budget.seeds)]
    if isinstance(search, Probe):
        scores = search.probe(base, victim, goal, fresh, seed, **drawing)
    else:
        scores = (attacks.score(victim, search.run(base, victim, goal, seed), goal, fresh, **drawing),)
    for one in () if may_be_blank else scores:
        check_not_blank(one.images.reshape(-1, *one.images.shape[2:]), "the model")
    trials = [{"name": one.name, "cases": list(one.cases), "hits": one.hits.astype(int).tolist()} for one in scores]
    return {"figures": attack_cells.stored(attack_cells.attack_figures(scores)), "trials": trials}
