"""Several concepts, each erased for itself: a run for each, all trained in one compiled step.

Each makes the updates that a run of its own would make with the same recipe, which is that of the list: what names any
of its concepts is not preserved. The runs are opened, exported and fused as any.
"""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esd_jax import runs, sharding
from esd_jax.erasing.method import Tools, discarded
from esd_jax.erasure import Erasure
from esd_jax.inputs import expanded
from esd_jax.params import Params
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe
from esd_jax.runs import keeping
from esd_jax.runs.record import describe
from esd_jax.runs.setup import Setup, assemble, make_tools
from esd_jax.training import run_folder, together
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.log import MetricLog
from esd_jax.training.loop import NotFinite, train
from esd_jax.training.step import Metrics, State, result


def plans(plan: Recipe) -> list[Recipe]:
    """The recipe of each concept of a recipe: what it says of the list holds for each, and `steps_each` is its length.

    Its folder is one in the recipe's, named after the concept. Raises ValueError for two concepts of one folder.
    """
    training = dataclasses.replace(plan.training, steps=plan.steps_each or plan.training.steps)
    names = [run_folder.name_of(concept.text) for concept in plan.concepts]
    names = [
        run_folder.name_of(f"{concept.text} {concept.from_}") if concept.from_ and names.count(name) > 1 else name
        for concept, name in zip(plan.concepts, names, strict=True)
    ]
    if plan.output_dir and (twice := [c.text for c, n in zip(plan.concepts, names, strict=True) if names.count(n) > 1]):
        raise ValueError(f"the runs of {' and '.join(map(repr, twice))} would have one name: erase them one by one")
    folders = [str(Path(plan.output_dir) / name) if plan.output_dir else None for name in names]
    kept = {name: one for name, one in plan.spelling.items() if name != "concepts"}
    return [
        dataclasses.replace(plan, concepts=(one,), steps_each=0, training=training, output_dir=folder, spelling=kept)
        for one, folder in zip(plan.concepts, folders, strict=True)
    ]


def check(plan: Recipe) -> None:
    """Raises ValueError for what cannot be trained together."""
    if getattr(plan.settings, "rounds_every", 0) or discarded(plan.settings):
        raise ValueError("each concept has inversion rounds of its own: erase the concepts one by one")
    if plan.fsdp > 1:
        raise ValueError(f"fsdp={plan.fsdp} splits what one run trains: give fsdp=1 to train several")
    if jax.process_count() > 1:
        raise ValueError("several runs are trained together by one process, and this job has several")


def check_folders(plan: Recipe, source: Path | None, resume: bool, overwrite: bool) -> None:
    """Raises OSError or ValueError, as a run does, for folders that are not as `resume` and `overwrite` require."""
    if not plan.output_dir:
        return
    if run_folder.is_run(folder := expanded(plan.output_dir)):
        raise FileExistsError(f"{folder} is a run: the folder of several runs is another one")
    each = plans(plan)
    begun = [resume and _resumes(one) for one in each]
    for one, goes_on in zip(each, begun if any(begun) else [resume] * len(each), strict=True):
        run_folder.check(expanded(str(one.output_dir)), source, goes_on, overwrite)


def _resumes(one: Recipe) -> bool:
    """Whether a run can go on; of closed forms, which are solved for one after the other, some may not have begun."""
    return one.settings.trained or not one.output_dir or run_folder.is_run(expanded(one.output_dir))


def run_each(
    base: Pipeline,
    plan: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    at_once: int | None = None,
    offload_base: bool = False,
    then: Callable[[Pipeline, Recipe], Any] | None = None,
) -> list[Pipeline]:
    """Erases each concept of a recipe from a loaded base, in a run of its own.

    Args:
      resume, overwrite: as of `runs.run`, for all runs. Those that were stopped go on from the newest checkpoint that
        all of them have; later ones are made again.
      at_once: how many are computed together; by default all. A closed form is solved for one after the other.
      offload_base: as of `runs.run`.
      then: called with each result and its recipe, while the folders are still the runs' alone.

    Raises ValueError, beside what `runs.run` raises, for inversion rounds, `fsdp`, several processes, or concepts that
    do not train alike: with other numbers of replacements or contexts, say.
    """
    each = plans(plan)
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once={at_once} must be at least 1")
    check_folders(plan, base.provenance.folder, resume, overwrite)
    if not plan.settings.trained:
        return [_solved(base, one, resume, overwrite, then) for one in each]
    check(plan)
    began = time.monotonic()
    runs.check_kept(base, plan)
    setups, texts = assembled(base, each), [concept.text for concept in plan.concepts]
    inputs, differ = alike(setups, texts)
    first, names, mesh = dataclasses.replace(setups[0], inputs=None), setups[0].names, setups[0].mesh
    states = [runs.begin(one, base, one.inputs)._replace(memory=one.memory()) for one in setups]
    del setups  # whose inputs are there once more
    if offload_base:
        base = runs.offload_encoders(base)
    theta_0, frozen = first.split(base.params[base.denoiser])
    records = [describe(base, one) for one in each]

    with contextlib.ExitStack() as stack:
        folders = [_opened(stack, base, one, resume, overwrite) for one in each]
        kept = []
        for i, (folder, one) in enumerate(zip(folders, each, strict=True)):
            if folder:  # two checkpoints: while the newest is written, all runs have the one before
                records[i], own = keeping.begin(stack, folder, base, one, records[i], resume, least=2)
                kept.append(own)
        if resume:
            states = resumed(kept, states, each)
        start, seconds = int(states[0].step), time.monotonic() - began
        logs, previews = [], []
        for folder, one, record in zip(folders, each, records, strict=True):
            if folder:
                logs.append(keeping.log(stack, folder, one, record, start, resume, seconds, runs=len(each)))
                previews.append(keeping.previews(base, one, folder))
        whole = (together.stacked(states), theta_0, frozen, inputs)
        del states
        state, theta_0, frozen, inputs = sharding.place(whole, mesh)
        del whole
        if offload_base:
            base = runs.offload_copied(base, mesh)
        metrics = Logs(logs, start)
        step = joint(together.make_step(first.step, differ, at_once), metrics)
        step = keeping.changing(step, [folder for folder in folders if folder], start)

        def erased(theta: Params, i: int, record: Erasure | None = None) -> Pipeline:
            return base.with_edits(runs.edits(base, each[i], names, _part(theta, i, mesh)), record)

        def preview(number: int, theta: Params) -> None:
            for i, draw in enumerate(previews):
                draw(number, erased(theta, i))

        try:
            state = train(
                step,
                state,
                theta_0,
                frozen,
                inputs,
                each[0].training,
                checkpoints=AllCheckpoints(kept) if kept else None,
                log=metrics,
                preview=preview if previews else None,
            )
        except NotFinite as error:
            raise NotFinite(f"{error}{metrics.blamed(texts)}") from None
        if offload_base:
            base = runs.restore_to_device(base)  # once, for all results
        theta, finals = result(state), []
        for i, (one, record, folder) in enumerate(zip(each, records, folders, strict=True)):
            finals.append(erased(theta, i, dataclasses.replace(record, step=int(state.step))))
            if folder:
                runs.write(base, one, finals[i], folder, _part(theta, i, mesh))
        for one, final in zip(each, finals, strict=True):
            if then:
                then(final, one)
    return finals


def _part(theta: Params, i: int, mesh: Any) -> Params:
    """What one of the runs has trained, whole."""
    return sharding.fetched(jax.tree.map(lambda a: a[i], theta), mesh)


def resumed(kept: Sequence[Checkpoints], states: Sequence[State], each: Sequence[Recipe]) -> list[State]:
    """The newest checkpoints that all runs have and that are not damaged; the states themselves where there are none.

    Later checkpoints are removed. Raises ValueError for a run that has made more updates than the recipe asks for, and
    for runs that have checkpoints, but none that is in all of them and can be read.
    """
    newest: list[State] = list(states)
    for step in sorted(_common(kept), reverse=True):
        read = [own.at(step, state) for own, state in zip(kept, states, strict=True)]
        if all(state is not None for state in read):
            newest = [state for state in read if state is not None]
            break
    else:
        # A kill while the first one was written leaves some runs without, and nothing is lost.
        if any(len(own.steps) > 1 for own in kept) or (kept and all(own.steps for own in kept)):
            have = "; ".join(f"{own.folder.parent.name}: {sorted(own.steps)}" for own in kept)
            raise ValueError(f"no checkpoint is in all runs and can be read ({have}): overwrite them to begin anew")
    keeping.check_steps(done := int(newest[0].step), each[0])
    if any(step > done for own in kept for step in own.steps):
        warnings.warn(f"the runs go on from step {done}, the newest that all of them have", LaterSteps, stacklevel=2)
    for own in kept:
        own.drop_after(done)
    return newest


def _common(kept: Sequence[Checkpoints]) -> frozenset[int]:
    """The steps of which every run has a checkpoint."""
    return frozenset.intersection(*[own.steps for own in kept])


class LaterSteps(UserWarning):
    """Runs that are trained together, of which some have checkpoints that others lack."""


def assembled(base: Pipeline, each: Sequence[Recipe]) -> list[Setup]:
    """The setups of recipes that differ in their concepts, on the same tools: images of a prompt are drawn once."""
    mesh = sharding.make_mesh(each[0].training.batch_size)
    tools = make_tools(base, each[0], mesh)
    drawn: dict[Any, Any] = {}

    def sample(prompts: Sequence[str], **options: Any) -> Any:
        key = (tuple(prompts), repr(sorted(options.items())))
        if key not in drawn:
            drawn[key] = tools.sample(prompts, **options)
        return drawn[key]

    common: Tools = dataclasses.replace(tools, sample=sample)
    return [assemble(base, one, mesh, tools=common) for one in each]


def alike(setups: Sequence[Setup], texts: Sequence[str]) -> tuple[Any, tuple[bool, ...]]:
    """`together.shared` of the setups' inputs. Raises ValueError, naming two concepts, where their steps differ."""
    for one, text in zip(setups[1:], texts[1:], strict=True):
        try:
            together.check_alike([setups[0].method, one.method])
            together.check_shapes(setups[0].inputs, one.inputs)
        except together.Unlike as error:
            raise ValueError(f"{texts[0]!r} and {text!r} do not train alike, {error}: erase them one by one") from error
    return together.shared([one.inputs for one in setups])


def _solved(base: Pipeline, one: Recipe, resume: bool, overwrite: bool, then: Any) -> Pipeline:
    """The run of a closed form, which has no step to share."""
    resume = resume and _resumes(one)
    return runs.run(base, one, resume=resume, overwrite=overwrite, then=then and (lambda final: then(final, one)))


def _opened(stack: contextlib.ExitStack, base: Pipeline, one: Recipe, resume: bool, overwrite: bool) -> Path | None:
    return stack.enter_context(run_folder.opened(one.output_dir, base.provenance.folder, resume, overwrite))


def joint(step: Callable[..., Any], logs: "Logs") -> Callable[..., tuple[State, Metrics]]:
    """The step as the training loop takes it, which sees means; each run's own metrics go to the logs."""

    def update(*arguments: Any) -> tuple[State, Metrics]:
        state, means, metrics = step(*arguments)
        logs.add(metrics)
        return state, means

    return update


class Logs:
    """The logs of runs that are trained together, each with its own metrics.

    start: how many updates were made before the first of these.
    """

    def __init__(self, logs: Sequence[MetricLog | None], start: int):
        self._logs, self._waiting, self._step = logs, {}, start

    def add(self, metrics: Metrics) -> None:
        """Keeps the metrics of the next update, an axis of runs first, until it is written or passed over."""
        self._step += 1
        self._waiting[self._step] = metrics

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A line in each log. metrics: the means, which the runs' own take the place of."""
        own = self._waiting[step]._asdict()
        self._waiting = {number: kept for number, kept in self._waiting.items() if number > step}
        for i, log in enumerate(self._logs):
            if log:
                log.write(step, {**metrics, **{name: float(value[i]) for name, value in own.items()}})

    def blamed(self, texts: Sequence[str]) -> str:
        """Whose loss or gradient is not finite, for the end of a message; empty where nobody's is."""
        for _, metrics in sorted(self._waiting.items()):
            finite = np.isfinite(np.asarray(metrics.loss)) & np.isfinite(np.asarray(metrics.grad_norm))
            if not finite.all():
                return f". Not finite: {', '.join(repr(t) for t, fine in zip(texts, finite, strict=True) if not fine)}"
        return ""


class AllCheckpoints:
    """The checkpoints of runs that are trained together, as those of one run."""

    def __init__(self, checkpoints: Sequence[Checkpoints]):
        self._all = checkpoints
        self.folder = checkpoints[0].folder.parent.parent  # that of the runs

    @property
    def latest(self) -> int | None:
        """The newest step of which every run has a checkpoint."""
        return max(_common(self._all), default=None)

    def save(self, state: State) -> None:
        for i, kept in enumerate(self._all):
            kept.save(together.one_of(state, i))

    def wait(self) -> None:
        for kept in self._all:
            kept.wait()

    def discard(self, step: int) -> None:
        for kept in self._all:
            kept.discard(step)
