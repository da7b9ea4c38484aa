"""What a run keeps in its folder while it trains: its record, checkpoints, log and previews."""

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from esd_jax import hosts, prompt_files
from esd_jax.erasure import Erasure
from esd_jax.io import leftovers
from esd_jax.io.images import read_images, write_strip
from esd_jax.pipeline import Pipeline, image_size
from esd_jax.recipe import Recipe
from esd_jax.results import numbered
from esd_jax.runs import sessions
from esd_jax.runs.record import EVIDENCE, READING, read, reading, reading_of
from esd_jax.runs.setup import files_of
from esd_jax.sampling import sample
from esd_jax.training import run_folder
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.log import MetricLog
from esd_jax.training.loop import StepFunction
from esd_jax.training.step import State

EXPORTS = "exports"  # the folder of the erased model's other formats in a run's
# Of a run's model: beside its evaluation results; drawn with every erasure; and results that name their updates.
OF_ONE_MODEL = ("report.html", "report.json", "ERASURE.md", "before_after.png")
DRAWN = ("examples.json", "examples.npz")
OF_ALL_STEPS = ("until.json", "until.npz")

# Recipe fields that may differ between a run and its resumption: they do not change what is computed next.
NOT_COMPUTED = {
    "base", "images", "fsdp", "steps", "steps_each", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard",
    "preview_every", "preview_prompts", "preview_steps", "preview_guidance",
}  # fmt: skip


def begin(
    stack: contextlib.ExitStack,
    folder: Path,
    base: Pipeline,
    plan: Recipe,
    record: Erasure,
    resume: bool,
    least: int = 1,
) -> tuple[Erasure, Checkpoints]:
    """Writes the record of a new run, and opens the checkpoints of either; `stack` closes them.

    least: how many of the newest are kept at least.

    Returns the record, of a run that is resumed with the weights that it started from, and the checkpoints.
    """
    meta = {k: v for k, v in (record.recipe or {}).items() if k not in NOT_COMPUTED}
    meta["base_sha256"] = record.base_sha256
    how = reading_of(base)
    if how and (not resume or reading(folder)):  # two readings of one file may predict different things
        meta["prediction_type"] = base.schedule.prediction_type
    if plan.images:
        pixels = read_images(plan.images, image_size(base.configs, plan.height, plan.width))
        meta["images_sha256"] = hashlib.sha256(pixels.tobytes()).hexdigest()
    for field, file in files_of(plan).items():
        meta[f"{field}_sha256"] = hashlib.sha256("\n".join(prompt_files.read(file)).encode()).hexdigest()
    if resume and (started := read(folder)[0].started_from):
        record = dataclasses.replace(record, started_from=started)
    if hosts.is_primary() and not resume:
        run_folder.write_record(folder, _private(record, plan, how))
    keep = max(least, plan.training.keep_checkpoints)
    return record, stack.enter_context(Checkpoints(folder / "checkpoints", meta, keep=keep))


def resumed(checkpoints: Checkpoints, state: State, plan: Recipe, record: Erasure) -> State:
    """The newest checkpoint's state; `state` itself if a run was killed before its first.

    Raises ValueError for a run that has made more updates than the recipe asks for, and for one that started from other
    weights and was killed before it kept them.
    """
    if checkpoints.latest is None:
        if record.started_from:
            raise ValueError(
                "the run was killed before it kept the weights that it started from: start it again, with start_from "
                "and overwrite"
            )
        return state
    state = checkpoints.resume(state)
    check_steps(int(state.step), plan)
    return state


def check_steps(done: int, plan: Recipe) -> None:
    """Raises ValueError if a run has made more updates than its recipe asks for."""
    if done > plan.training.steps:
        raise ValueError(f"steps={plan.training.steps}, but the run has made {done}: give steps={done} or more")


def log(
    stack: contextlib.ExitStack,
    folder: Path,
    plan: Recipe,
    record: Erasure,
    step: int,
    resume: bool,
    seconds: float,
    runs: int = 1,
) -> MetricLog | None:
    """The log, from a step on; on the primary process alone. It begins a session, and clears what a kill left.

    What was measured of the model is set aside by `changing`, once it changes.

    seconds: from the call of the run to here. runs: how many are trained together.
    """
    if not hosts.is_primary():
        return None
    if resume:
        run_folder.write_record(folder, _private(record, plan, reading(folder)))
    if not resume or step < plan.training.steps:
        sessions.begin(folder, seconds, step, runs)
    opened = MetricLog(folder, start=step, tensorboard=plan.training.tensorboard)
    stack.callback(opened.close)
    for place in (folder, folder / EXPORTS):
        leftovers.sweep_folder(place)
    return opened


def changing(step: StepFunction, folders: Sequence[Path], start: int) -> StepFunction:
    """The step, before whose first update results of runs that have made `start` are set aside.

    A run that ended early, and is resumed, makes none: its results stay.
    """
    pending = list(folders) if hosts.is_primary() else []

    def update(*args: Any) -> Any:
        while pending:
            set_results_aside(pending.pop(0), start)
        return step(*args)

    return update


def set_results_aside(folder: Path, step: int) -> None:
    """Moves what was measured after so many updates into a folder that says so: the model is about to change."""
    evidence = folder / EVIDENCE
    measured = [path for path in evidence.glob("*") if path.name not in OF_ALL_STEPS]
    if not measured:
        return
    names = numbered(f"{EVIDENCE}_after_{step}")
    aside = next(folder / name for name in names if not (folder / name).exists())
    aside.mkdir()
    for path in [*measured, *(folder / name for name in OF_ONE_MODEL)]:
        if path.exists():
            path.rename(aside / path.name)
    if all(path.name in DRAWN for path in measured):
        return
    updates = "1 update" if step == 1 else f"{step} updates"
    warnings.warn(f"what was measured after {updates} is in {aside} now: evaluate again", stacklevel=2)


def _private(record: Erasure, plan: Recipe, how: dict[str, Any]) -> dict[str, Any]:
    """A run's own file, which unlike its exports records paths on this machine. how: its base is read."""
    fields = plan.flat()
    local = {name: fields[name] for name in ("base", "images", *files_of(plan))}
    return {**record.to_dict(), **({READING: how} if how else {}), "local": local}


def previews(base: Pipeline, plan: Recipe, folder: Path) -> Callable[[int, Pipeline], None]:
    """Draws the same prompts and seeds as the run goes on: one strip of images per call, `previews/step_N.png`."""
    prompts = plan.previews
    (folder / "previews").mkdir(exist_ok=True)

    def preview(step: int, erased: Pipeline) -> None:
        if not hosts.is_primary():
            return
        images = sample(
            erased,
            prompts,
            seed=plan.training.seed,
            steps=plan.preview_steps,
            guidance_scale=plan.preview_guidance,
            sampler="auto",
            height=plan.height,
            width=plan.width,
        )
        write_strip(images, folder / "previews" / f"step_{step:06d}.png")

    return preview
