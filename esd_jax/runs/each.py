"""Several concepts, each erased for itself: a run for each, all trained in one compiled step.

The runs are those that each concept would have alone, and are resumed, opened, exported and fused as such.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from esd_jax import runs, sharding
from esd_jax.erasing.method import Tools, discarded
from esd_jax.erasure import Erasure
from esd_jax.inputs import expanded
from esd_jax.io.tensors import check_sources
from esd_jax.params import Params
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe
from esd_jax.runs import keeping
from esd_jax.runs.record import describe
from esd_jax.runs.setup import Setup, assemble, make_tools
from esd_jax.training import run_folder, together
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.log import MetricLog
from esd_jax.training.loop import train
from esd_jax.training.step import Metrics, State, result


def plans(plan: Recipe) -> list[Recipe]:
    """The recipe of each concept of a recipe: what it says of the list holds for each, and `steps_each` is its length.

    Its folder is one in the recipe's, named after the concept. Raises ValueError for two concepts of one name.
    """
    steps = plan.steps_each or plan.training.steps
    training = dataclasses.replace(plan.training, steps=steps)
    texts = [concept.erased_from for concept in plan.concepts]
    names = [run_folder.name_of(text) for text in texts]
    if twice := [text for text, name in zip(texts, names, strict=True) if names.count(name) > 1]:
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
        all of them have.
      at_once: how many are computed together; by default all.
      offload_base: as of `runs.run`.
      then: called with each result and its recipe, while the folders are still the runs' alone.

    Raises ValueError, beside what `runs.run` raises, for inversion rounds, `fsdp`, several processes, or concepts that
    do not train alike: with other numbers of replacements or contexts, say.
    """
    each = plans(plan)
    if not plan.settings.trained:
        return [_solved(base, one, resume, overwrite, then) for one in each]
    check(plan)
    began = time.monotonic()
    if plan.output_dir:
        expanded(plan.output_dir)
        if base.edits:
            raise ValueError(
                "the base has edits that its files lack, so a run could not be restored: export and load it"
            )
        check_sources(base)
    setups = assembled(base, each)
    inputs, differ = alike(setups, [concept.text for concept in plan.concepts])
    first = setups[0]
    setups = [dataclasses.replace(one, inputs=None) for one in setups]
    weights = f"{base.denoiser}/"
    if offload_base:
        base = runs.offload_to_host(base, lambda name, _: not name.startswith(weights))
    theta_0, frozen = first.split(base.params[base.denoiser])
    states = [runs.begin(one, base, None)._replace(memory=one.memory()) for one in setups]
    records = [describe(base, one) for one in each]
    names, mesh = first.names, first.mesh

    with contextlib.ExitStack() as stack:
        folders = [_opened(stack, base, one, resume, overwrite) for one in each]
        checkpoints, logs, previews = [], [], []
        for i, (folder, one) in enumerate(zip(folders, each, strict=True)):
            if folder:
                records[i], kept = keeping.begin(stack, folder, base, one, records[i], resume)
                checkpoints.append(kept)
        if resume and (done := min(kept.latest or 0 for kept in checkpoints)):
            keeping.check_steps(done, each[0])
            states = [kept.restore(state, done) for kept, state in zip(checkpoints, states, strict=True)]
        start = int(states[0].step)
        for folder, one, record in zip(folders, each, records, strict=True):
            if folder:
                seconds = (time.monotonic() - began) / len(each)
                logs.append(keeping.log(stack, folder, one, record, start, resume, seconds))
                previews.append(keeping.previews(base, one, folder))
        whole = (together.stacked(states), theta_0, frozen, inputs)
        del states
        state, theta_0, frozen, inputs = sharding.place(whole, mesh)
        del whole
        step = _Step(together.make_step(first.step, differ, at_once), Logs(logs, start) if logs else None)

        def erased(theta: Params, i: int, record: Erasure | None = None) -> Pipeline:
            own = sharding.fetched(jax.tree.map(lambda a: a[i], theta), mesh)
            return base.with_edits(runs.edits(base, each[i], names, own), record)

        def preview(number: int, theta: Params) -> None:
            for i, draw in enumerate(previews):
                draw(number, erased(theta, i))

        state = train(
            step,
            state,
            theta_0,
            frozen,
            inputs,
            each[0].training,
            checkpoints=AllCheckpoints(checkpoints) if checkpoints else None,
            log=step.logs,
            preview=preview if previews else None,
        )
        theta, finals = result(state), []
        for i, (one, record, folder) in enumerate(zip(each, records, folders, strict=True)):
            final = erased(theta, i, dataclasses.replace(record, step=int(state.step)))
            if folder:
                own = sharding.fetched(jax.tree.map(lambda a, i=i: a[i], theta), mesh)
                runs.write(base, one, final, folder, own)
            finals.append(final)
        if offload_base:
            finals = [runs.restore_to_device(final) for final in finals]
        for one, final in zip(each, finals, strict=True):
            if then:
                then(final, one)
    return finals


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
            together.shared([setups[0].inputs, one.inputs])
        except together.Unlike as error:
            raise ValueError(f"{texts[0]!r} and {text!r} do not train alike, {error}: erase them one by one") from error
    return together.shared([one.inputs for one in setups])


def _solved(base: Pipeline, one: Recipe, resume: bool, overwrite: bool, then: Any) -> Pipeline:
    """The run of a closed form, which has no step to share."""
    return runs.run(base, one, resume=resume, overwrite=overwrite, then=then and (lambda final: then(final, one)))


def _opened(stack: contextlib.ExitStack, base: Pipeline, one: Recipe, resume: bool, overwrite: bool) -> Path | None:
    return stack.enter_context(run_folder.opened(one.output_dir, base.provenance.folder, resume, overwrite))


class _Step:
    """The step as the training loop takes it, which sees means; each run's own metrics go to the logs."""

    def __init__(self, step: Callable[..., Any], logs: "Logs | None"):
        self.step, self.logs = step, logs

    def __call__(self, *arguments: Any) -> tuple[State, Metrics]:
        state, means, metrics = self.step(*arguments)
        if self.logs:
            self.logs.add(metrics)
        return state, means


class Logs:
    """The logs of runs that are trained together, each with its own metrics.

    start: how many updates were made before the first that is told of.
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


class AllCheckpoints:
    """The checkpoints of runs that are trained together, as those of one run."""

    def __init__(self, checkpoints: Sequence[Checkpoints]):
        self._all = checkpoints
        self.folder = checkpoints[0].folder.parent.parent  # that of the runs

    @property
    def latest(self) -> int | None:
        """The newest step of which every run has a checkpoint."""
        return min(kept.latest or 0 for kept in self._all) or None

    def save(self, state: State) -> None:
        for i, kept in enumerate(self._all):
            kept.save(together.one_of(state, i))

    def wait(self) -> None:
        for kept in self._all:
            kept.wait()

    def discard(self, step: int) -> None:
        for kept in self._all:
            kept.discard(step)
