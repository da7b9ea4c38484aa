"""Searches for settings that erase enough and keep enough: a grid, stored as it comes, and the best trade-off in it.

Settings that need training of their own are trained once each, at the largest number of steps; fewer steps are that
run's checkpoints, and strengths are parts of its change, so that they cost an evaluation alone.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esd_jax import api, recipe, results
from esd_jax.evaluation.gather import Metric
from esd_jax.inputs import check_finite
from esd_jax.io.diffusers import component_hashes, source_hash
from esd_jax.io.exact import with_strength
from esd_jax.pipeline import Pipeline

TRIALS = "trials.json"
OURS = ("base", "concept", "output_dir", "steps", "steps_each")  # fields that a search sets itself


@dataclass(frozen=True)
class Aim:
    """target: the highest detection rate of the concept. drop: the most that everything else may lose."""

    target: float = 0.05
    drop: float = 0.05


@dataclass(frozen=True)
class Trial:
    """Settings and their results. drop: what everything else loses, relative to the base."""

    fields: Mapping[str, Any]
    steps: int
    strength: float
    target: float
    drop: float

    def misses(self, aim: Aim) -> float:
        """By how much an aim is missed, in both respects together; 0 or less where it is reached."""
        over = (self.target - aim.target, self.drop - aim.drop)
        return sum(max(part, 0.0) for part in over) or max(over)


def search(
    base: Pipeline,
    concept: str | Sequence[str],
    metric: Metric,
    *,
    grid: Mapping[str, Sequence[Any]],
    steps: Sequence[int],
    strengths: Sequence[float] = (1.0,),
    folder: Path,
    measured_with: Mapping[str, Any] | None = None,
    progress: Callable[[Trial], None] = lambda _: None,
    **fields: Any,
) -> list[Trial]:
    """Tries every combination, in the grid's order; what is in the folder already is not tried again.

    Args:
      base: what is erased from. concept: what is erased.
      metric: measures a model, always in the same way.
      grid: recipe field -> its values ("eta", "learning_rate", "subset", ...).
      steps: updates after which to measure.
      strengths: parts of the change to measure; 1 is the erasure itself.
      folder: gets trials.json, and each run as long as it is needed.
      measured_with: names what distinguishes this metric from others: JSON values.
      progress: called with a line after each trial.
      **fields: those of all trials, for `erase`: config=, method=, ...

    Raises ValueError for an empty grid, a field of it that a search sets itself, or a folder of another search.
    """
    for strength in strengths:
        check_finite(strength=strength)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not combinations or not steps or not strengths or min(steps) < 1:
        raise ValueError("a search needs values of every field, steps of 1 or more, and strengths")
    if own := [field for field in grid if field in OURS]:
        instead = "give steps" if own[0].startswith("steps") else "make a search for each"
        raise ValueError(f"grid: {own[0]} is no field to vary: {instead}")
    for field in grid:
        recipe.check_field(field, fields.get("method", "esd"))
    hashes = {"base": source_hash(base), "components_sha256": component_hashes(base)}
    identity = json.loads(json.dumps({**hashes, "concept": concept, "fields": fields}))
    identity |= {"measured_with": dict(measured_with)} if measured_with else {}
    record = results.read(folder / TRIALS, **identity) or {}
    identity = {name: value for name, value in identity.items() if name in record or not record}  # as it is stored
    if "kept" not in record:
        record["kept"] = metric(base)[1].value
    trials = [Trial(**trial) for trial in record.get("trials", ())]
    for combination in combinations:
        wanted = [(step, strength) for step in sorted(steps) for strength in strengths]
        done = {(t.steps, t.strength) for t in trials if t.fields == combination}
        if all(pair in done for pair in wanted):
            continue
        run = folder / "run"
        parts = _checkpoints(base, concept, run, sorted(steps), {**fields, **combination})
        for step, erased in parts:
            for strength in (s for s in strengths if (step, s) not in done):
                target, kept = metric(erased if strength == 1 else with_strength(erased, strength))
                trials.append(Trial(combination, step, strength, target.value, record["kept"] - kept.value))
                record["trials"] = [asdict(trial) for trial in trials]
                results.write(folder / TRIALS, record, **identity)
                progress(trials[-1])
    return trials


def best(trials: Iterable[Trial], aim: Aim) -> Trial:
    """The trial that reaches the aim by most, or misses it by least."""
    return min(trials, key=lambda trial: trial.misses(aim))


def undominated(trials: Iterable[Trial]) -> list[Trial]:
    """The best trade-offs: those of which no other trial is better in one respect and as good in the other."""
    trials = list(trials)

    def beaten(trial: Trial) -> bool:
        own = (trial.target, trial.drop)
        return any((t.target, t.drop) != own and t.target <= trial.target and t.drop <= trial.drop for t in trials)

    return sorted((t for t in trials if not beaten(t)), key=lambda t: (t.target, t.drop))


def _checkpoints(
    base: Pipeline, concept: str | Sequence[str], run: Path, steps: Sequence[int], fields: Mapping[str, Any]
) -> Iterable[tuple[int, Pipeline]]:
    """The erased model after so many steps: one run, continued from step to step."""
    for i, step in enumerate(steps):
        settings: dict[str, Any] = {**fields, "steps": step, "output_dir": str(run)}
        settings |= {"preview_every": 0, "keep_checkpoints": 1}
        erased = api.erase(base, concept, **settings, resume=i > 0, overwrite=i == 0 and run.exists())
        yield step, erased
