"""A run: a recipe carried out on a loaded base, kept in a folder, resumed and restored."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esd_jax import hosts, lora, sharding
from esd_jax.erasing.method import Method, discarded
from esd_jax.erasure import Erasure
from esd_jax.inputs import expanded
from esd_jax.io import delta
from esd_jax.io.delta import export_delta
from esd_jax.io.diffusers import export
from esd_jax.io.exact import read_each, read_exact
from esd_jax.io.lora import export_lora
from esd_jax.io.tensors import check_sources
from esd_jax.params import Params, num_scalars, prefixed
from esd_jax.pipeline import Edits, Pipeline
from esd_jax.recipe import Recipe
from esd_jax.runs import intervals, keeping
from esd_jax.runs.keeping import EXPORTS as EXPORTS
from esd_jax.runs.record import EVIDENCE as EVIDENCE
from esd_jax.runs.record import check_measured as check_measured
from esd_jax.runs.record import describe
from esd_jax.runs.record import read as read
from esd_jax.runs.record import reading as reading
from esd_jax.runs.setup import Setup, assemble
from esd_jax.training import run_folder
from esd_jax.training.holding import held_from
from esd_jax.training.loop import OnStep, train
from esd_jax.training.step import State, result

MODEL = "model"  # the erased checkpoint's folder in a run's
LORA = "lora.safetensors"  # and its LoRA
# Scalars of a denoiser beyond which a run writes its change alone: a folder of FLUX.1 would take 34 GB.
LARGE = 5_000_000_000


def run(
    base: Pipeline,
    plan: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start_from: Pipeline | None = None,
    stop_when: Callable[[Pipeline], bool] | None = None,
    stop_every: int = 50,
    on_step: OnStep | None = None,
    offload_base: bool = False,
    own: bool = False,
    then: Callable[[Pipeline], Any] | None = None,
) -> Pipeline:
    """Carries out a recipe on a loaded base: `erase` with every setting explicit. See there.

    offload_base: the caller does not need the base: its text encoders and VAE go to the host once prompts are encoded,
      and are restored with the result. own: a former name of it.
    then: called with the result while the folder is still this run's alone, to write more into it.
    """
    offload_base |= own
    began = time.monotonic()
    check_kept(base, plan)
    if start_from is not None and resume:
        raise ValueError("resume goes on from the run's own checkpoint: leave start_from out")
    setup = assemble(base, plan)
    names, mesh, inputs, step = setup.names, setup.mesh, setup.inputs, setup.step
    setup = dataclasses.replace(setup, inputs=None)  # they are held once, where the step reads them
    if offload_base:
        base = offload_encoders(base)
    if start_from is not None:
        _check_start(base, plan, names, start_from)
    theta_0, frozen = setup.split(base.params[base.denoiser])
    if several := jax.process_count() > 1:
        step = hosts.preemption_consensus(step, mesh)
    # Not bound to a name: the values of theta would then stay in memory twice for the whole run.
    state = begin(setup, base, inputs, start_from)
    state, theta_0, frozen, inputs = sharding.place((state, theta_0, frozen, inputs), mesh)
    if offload_base:
        base = offload_copied(base, mesh)
    state = state._replace(memory=sharding.spread(setup.memory(), mesh))
    record = describe(base, plan, start_from)
    first = lambda: sharding.place(begin(setup, base, inputs), mesh)  # noqa: E731
    between = intervals.between(setup, theta_0, frozen, inputs, first)

    with contextlib.ExitStack() as stack:
        opened = run_folder.opened(plan.output_dir, base.provenance.folder, resume, overwrite)
        name = hosts.agreed(lambda: str(stack.enter_context(opened) or ""))
        folder = Path(name) if name else None
        checkpoints = log = preview = None
        if folder:
            record, checkpoints = keeping.begin(stack, folder, base, plan, record, resume)
            if resume:
                state = keeping.resumed(checkpoints, state, plan, record)
            elif start_from is not None:
                checkpoints.save(state)  # the base's weights are no substitute for these
            seconds = time.monotonic() - began
            log = keeping.log(stack, folder, plan, record, int(state.step), resume, seconds)
            step = keeping.changing(step, [folder], int(state.step))
            preview = keeping.previews(base, plan, folder)
        records = intervals.Records(folder, int(state.step), write=hosts.is_primary())
        stack.callback(records.close)

        def erased(theta: Params, record: Erasure | None = None) -> Pipeline:
            return base.with_edits(edits(base, plan, names, sharding.fetched(theta, mesh)), record)

        state = train(
            step,
            state,
            theta_0,
            frozen,
            inputs,
            plan.training,
            checkpoints=checkpoints,
            log=log,
            preview=preview and (lambda step, theta: preview(step, erased(theta))),
            # Of a copy: the user may keep the pipeline, and the next update gives theta's memory away.
            stop_when=stop_when and (lambda theta: _asked(stop_when, erased(jax.tree.map(jnp.copy, theta)))),
            stop_every=stop_every,
            stop_after=discarded(plan.settings),
            on_step=on_step,
            between=between,
            on_record=records.add,
            consensus=several,
        )
        record = dataclasses.replace(record, step=int(state.step), rounds=tuple(records.rows) or None)
        final = erased(result(state), record)
        if folder and hosts.is_primary():
            theta = sharding.fetched(result(state), mesh)
            write(base, plan, final, folder, theta)
        final = restore_to_device(final) if offload_base else final
        if then:
            then(final)
        hosts.wait("the run's files are written")
    return final


def check_kept(base: Pipeline, plan: Recipe) -> None:
    """Raises ValueError, before anything is written, for a run with a folder that could not be restored from it."""
    if not plan.output_dir:
        return
    expanded(plan.output_dir)
    if base.edits:
        raise ValueError("the base has edits that its files lack, so a run could not be restored: export and load it")
    check_sources(base)


def offload_encoders(base: Pipeline) -> Pipeline:
    """`offload_to_host` of everything but the denoiser."""
    weights = f"{base.denoiser}/"
    return offload_to_host(base, lambda name, _: not name.startswith(weights))


def offload_copied(base: Pipeline, mesh: Mesh) -> Pipeline:
    """`offload_to_host` of what `sharding.place` copied to where the step reads it, so that it is there once."""
    placed = sharding.placements(prefixed(base.params[base.denoiser], base.denoiser), mesh)
    return offload_to_host(base, lambda name, _: name in placed and sharding.copies(placed[name]))


def offload_to_host(base: Pipeline, which: Callable[[str, tuple[int, ...]], bool]) -> Pipeline:
    """The base with some tensors, chosen by name and shape, in the host's memory: used as before, but slower.

    The base itself can no longer be used: anyone else who holds these arrays would keep them on the devices.
    """
    params = {component: dict(tensors) for component, tensors in base.params.items()}
    for component, tensors in params.items():
        for name, value in tensors.items():
            if isinstance(value, jax.Array) and which(f"{component}/{name}", value.shape):
                tensors[name] = np.array(value)
                value.delete()
    return dataclasses.replace(base, params=params)


def restore_to_device(pipeline: Pipeline) -> Pipeline:
    """All of it on the device again, but for what lies in a file. The tensors keep their order, which jax.device_put
    of a dict does not."""
    params = {
        component: {
            name: value if isinstance(value, np.memmap) else jax.device_put(value) for name, value in tensors.items()
        }
        for component, tensors in pipeline.params.items()
    }
    return dataclasses.replace(pipeline, params=params)


def artefacts(base: Pipeline, plan: Recipe) -> dict[str, str]:
    """What a run leaves of its erased checkpoint, by kind -> its name in the run's folder.

    A folder and a delta; of a denoiser of more than 5e9 scalars the LoRA that was trained, or the delta, alone.
    """
    if num_scalars(base.network(base.denoiser).shapes) <= LARGE:
        return {"model": MODEL, "delta": delta_name(plan)}
    lora = plan.rank and "lora_names" in base.family.provides
    return {"LoRA": LORA} if lora else {"delta": delta_name(plan)}


def write(base: Pipeline, plan: Recipe, final: Pipeline, folder: Path, theta: Params) -> None:
    """Writes a run's `artefacts` into its folder. theta: what was trained."""
    for kind, name in artefacts(base, plan).items():
        _write(kind, final, folder / name, theta)


def _write(kind: str, final: Pipeline, path: Path, theta: Params) -> None:
    if kind == "model":
        export(final, path, overwrite=True)
    elif kind == "delta":
        export_delta(final, path, overwrite=True)
    else:
        export_lora(final, path, trained=theta, dtype="float32", biases=False, overwrite=True)


def delta_name(plan: Recipe) -> str:
    """The file name of a run's delta. Long texts are cut, since a file's name holds 255 bytes at most."""
    texts = ["+".join(c.text for c in plan.concepts), plan.concepts[0].from_ or ""]
    concept, from_ = (text.encode()[:100].decode(errors="ignore") for text in texts)
    return delta.delta_name(concept, from_ or None, plan.subset)


def start(
    base: Pipeline,
    plan: Recipe,
    names: Sequence[str],
    method: Method,
    inputs: Any,
    start_from: Pipeline | None = None,
) -> Params:
    """What is trained, before the first step: the tensors at full precision, or the factors of their change.

    A method in closed form has its result here, and no steps.
    """
    if plan.rank:
        shapes = base.network(base.denoiser).shapes
        key = jax.random.fold_in(jax.random.key(plan.training.seed), 2**31 - 1)
        return lora.initial({f"{base.denoiser}/{name}": shapes[name] for name in names}, plan.rank, key)
    exact = read_exact(start_from or base, [f"{base.denoiser}/{name}" for name in names])
    return method.solve(exact, inputs)


def begin(setup: Setup, base: Pipeline, inputs: Any, start_from: Pipeline | None = None) -> State:
    """The state before the first update, on no particular device, without what the method keeps."""
    plan = setup.recipe
    state = setup.begin(start(base, plan, setup.names, setup.method, inputs, start_from), memory=False)
    if start_from is not None and plan.optimizer.hold:
        exact = read_exact(base, [f"{base.denoiser}/{name}" for name in setup.names])
        state = state._replace(opt=held_from(state.opt, exact))
    return state


def edits(base: Pipeline, plan: Recipe, names: Sequence[str], theta: Params) -> Edits:
    """The trained tensors at full precision, whatever was trained: of factors, one sum after the other."""
    if not plan.rank:
        return theta
    first = read_each(base, [f"{base.denoiser}/{name}" for name in names])
    return ((name, lora.weights(theta, {name: value})[name]) for name, value in first)


def _check_start(base: Pipeline, plan: Recipe, names: Sequence[str], start_from: Pipeline) -> None:
    """Raises ValueError for weights that a recipe cannot go on from."""
    if plan.rank or not plan.settings.trained:
        why = f"rank={plan.rank} trains a change of the base" if plan.rank else f"method {plan.method!r} does not train"
        raise ValueError(f"{why}, so it cannot start from other weights: leave start_from out")
    if discarded(plan.settings):  # a run that is resumed would restart at the base's
        raise ValueError(f"method {plan.method!r} restarts at the base's weights: leave start_from out")
    component = base.denoiser
    if start_from.configs.get(component) != base.configs[component]:
        raise ValueError("start_from and the base have denoisers of different architectures")
    theirs, trained = start_from.params[component], set(names)
    for name, ours in base.params[component].items():
        if name not in trained and not jnp.array_equal(ours, theirs[name].astype(ours.dtype)):
            raise ValueError(
                f"start_from differs from the base in {name!r}, which subset {plan.subset!r} does not train: "
                "its change would be lost"
            )


def _asked(question: Callable[[Pipeline], bool], erased: Pipeline) -> bool:
    """The primary process's answer, on which all processes agree."""
    return hosts.agreed(lambda: bool(question(erased)))
