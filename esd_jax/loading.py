"""What is opened: a checkpoint, a run, and what was erased from a base, whatever it lies in."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from esd_jax import compile_cache, recipe, runs
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasure import Erasure
from esd_jax.evaluation import testbed
from esd_jax.inputs import expanded
from esd_jax.io import diffusers, exact, flow_file, recognised
from esd_jax.io import folder as files
from esd_jax.io.delta import load_delta
from esd_jax.io.difference import apply_difference, is_difference
from esd_jax.io.ldm import UNET
from esd_jax.io.lora_merge import is_lora, merge_lora
from esd_jax.io.safetensors import OF_TENSORS, Header, read_header, refuse_pickle
from esd_jax.models import architectures
from esd_jax.models.architectures import ARCHITECTURES
from esd_jax.pipeline import NetworkConfig, Pipeline
from esd_jax.runs import setup
from esd_jax.training import run_folder
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.step import State, result

# What a source may be.
RUN, UNET_FOLDER, ALONE = "a run", "the folder of a denoiser alone", "a transformer without its text encoders"


def load(
    source: str | Path,
    *,
    base: Pipeline | str | Path | None = None,
    dtype: Any = None,
    variant: str | None = None,
    revision: str | None = None,
    config: str | Path | None = None,
    ema: bool = False,
) -> Pipeline:
    """Opens a checkpoint, a run, or what was erased from a base.

        load("emoji")                                      # a model that the package carries; "emoji-flow" is another
        load("CompVis/stable-diffusion-v1-4")              # a hub id, or a diffusers folder
        load("v1-5-pruned-emaonly.safetensors")            # the single file that A1111 and ComfyUI open
        load("runs/van_gogh")                              # a run: its erased model, from its newest checkpoint
        load("esd-Van_Gogh-from-Van_Gogh-esdx.safetensors", base="CompVis/stable-diffusion-v1-4")

    Args:
      source: what to open.
      base: what `source` was erased from, where that is no whole checkpoint: a delta, a difference, a LoRA, or the
        folder of a denoiser alone. Of a file with the transformer of FLUX or SD3 alone, what has the rest. Of a run,
        where its base lies now, if it has moved. A loaded pipeline, or what `load` takes; the arguments below then
        apply to it.
      dtype: compute dtype, "float32" or "bfloat16"; the files may have any. By default float32, and of a run its own.
      variant, revision: of the files, as diffusers means them ("fp16"; a branch, tag or commit).
      config, ema: of a single file: the architecture ("sd14", "sd21", "sd21-base", "sdxl", or a diffusers folder of it,
        which also supplies the networks that a file of FLUX or SD3 lacks), by default read off the file; and whether
        to read the denoiser's moving average. See `io.diffusers.load`.

    Returns:
      The pipeline. Of a run, a delta, a difference or a LoRA, it has the changed tensors in `edits`.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or not implemented, and the fix; of a delta, a difference or
        a LoRA without `base`, the call that opens it.
    """
    compile_cache.use()
    options = {"dtype": dtype, "variant": variant, "revision": revision, "config": config, "ema": ema}
    reading = {name: value for name, value in options.items() if value}
    if isinstance(base, Pipeline) and reading:
        raise ValueError(f"{next(iter(reading))} says how to read the base's files, but base is loaded already")
    kind, named = _kind(source)
    if kind == RUN:
        return restore(source, base=base, **reading)
    if not kind:
        if base is not None:
            architecture(source, variant=variant, revision=revision, config=config)  # raises for what is none
            raise ValueError(f"{source} is a whole checkpoint: load it without base")
        return _checkpoint(source, **reading)
    if kind == ALONE and config is not None and base is None:  # whose folder has the rest
        return _checkpoint(source, **reading)
    if base is None:
        which = "" if named else ", where base is the checkpoint that it was made from"
        call = f"load({str(source)!r}, base={repr(named) if named else '...'})"
        command = f"esd-jax export --base={shlex.quote(named or 'BASE')} --delta={shlex.quote(str(source))} -o FOLDER"
        raise ValueError(f"{source} is {kind}, not a whole checkpoint: use {call}{which}; {command} makes it one")
    return opened(base if isinstance(base, Pipeline) else load(base, **reading), source)


def _checkpoint(source: str | Path, dtype: Any = "float32", **reading: Any) -> Pipeline:
    """A whole checkpoint."""
    folder = bed.folder if (bed := testbed.of(source)) else source
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype={dtype!r} is unknown; choose float32 or bfloat16") from None
    if dtype == jnp.float16:  # in which activations of SDXL's autoencoder overflow
        raise ValueError("dtype=float16 is not implemented: choose float32 or bfloat16; the files may have any")
    pipeline = diffusers.load(folder, dtype=dtype, **reading)
    return dataclasses.replace(pipeline, provenance=dataclasses.replace(pipeline.provenance, source=str(source)))


def _kind(source: str | Path) -> tuple[str, str | None]:
    """(What a source is that is no whole checkpoint, else ""; the base that it names).

    Of what does not exist or cannot be read, "": the reader of checkpoints raises.
    """
    if testbed.of(source):
        return "", None
    path = expanded(source)
    if is_run(path):
        return RUN, None
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        return UNET_FOLDER, None
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return "", None
    header = read_header(path)
    kind = _kind_of_file(header)
    return kind, next((e.base for e in reversed(_records(header)) if e.base), None) if kind else None


def _kind_of_file(header: Header) -> str:
    if flow_file.is_flow(header):
        return ALONE if flow_file.is_alone(header) else ""
    if is_difference(header):
        return "a difference"
    if is_lora(header):
        return "a LoRA"
    is_delta = recognised.described(map(files.unwrapped, header.entries)) in recognised.DELTAS
    return "a delta" if is_delta else ""


def _records(header: Header) -> tuple[Erasure, ...]:
    """The erasures that a file records, those within others first."""

    def flat(erasures: tuple[Erasure, ...]) -> tuple[Erasure, ...]:
        return tuple(one for e in erasures for one in (*flat(e.erased or ()), e))

    return flat(files.read_records(header))


def is_run(source: str | Path) -> bool:
    """Whether a source is a run's folder."""
    return run_folder.is_run(expanded(source))


def architecture(
    source: str | Path, *, variant: str | None = None, revision: str | None = None, config: str | Path | None = None
) -> tuple[Mapping[str, NetworkConfig], Schedule]:
    """The network configs and the schedule of what `load` takes, or of a published architecture ("sd14", "sdxl", ...).

    No weights are read, or downloaded.
    """
    if str(source) in ARCHITECTURES:
        return diffusers.read_architecture(architectures.folder(str(source)))
    source = bed.folder if (bed := testbed.of(source)) else source
    return diffusers.describe(source, variant=variant, revision=revision, config=config)


def opened(base: Pipeline, path: str | Path) -> Pipeline:
    """What was erased from a base, whatever it lies in.

    Args:
      base: what it was erased from.
      path: a run's folder, a diffusers folder (of a denoiser alone, or of all), or a .safetensors file: a delta, a
        difference, a LoRA, a single-file checkpoint, or the transformer of FLUX or SD3 in such a file.

    Raises FileNotFoundError, ValueError as their readers do.
    """
    path = expanded(path)
    if path.suffix.lower() != ".safetensors":
        refuse_pickle(path, OF_TENSORS)
        if is_run(path):
            return restore(path, base=base)
        if (path / "config.json").is_file():
            return diffusers.with_denoiser(base, path)
        return diffusers.load(path, dtype=base.dtype)
    header = read_header(path)
    if flow_file.is_flow(header):
        return diffusers.with_denoiser_file(base, path)
    if is_difference(header):
        return apply_difference(base, path)
    if is_lora(header):
        return merge_lora(base, path)
    if any(key.startswith(UNET) for key in header.entries):
        pipeline = diffusers.load(path, dtype=base.dtype, config=base.provenance.folder)
        return dataclasses.replace(pipeline, schedule=base.schedule)  # which a base's file may determine by itself
    return load_delta(base, path)


def check_base(base: str | Path, fit: str | None = None) -> None:
    """Raises ValueError for a run where a base belongs, with the base to give: `fit`, or what the run erased from."""
    if is_run(base):
        record, local = runs.read(expanded(base))
        fit = fit or local.get("base") or record.base or "what it was erased from"
        raise ValueError(f"{base} is a run, whose erasure would count as the other's: give its base, {fit}")


def _is_changed(base: Pipeline) -> bool:
    """Whether a pipeline has other tensors than its files."""
    return any(not np.array_equal(base.edits[name], value) for name, value in exact.before(base))


def base_of(
    plan: recipe.Recipe, folder: Path | None = None, base: str | Path | None = None, **reading: Any
) -> Pipeline:
    """The base of a recipe.

    Args:
      folder: of a run, or of runs of one base, whose records say how a single file was read (`config`, `ema`).
      base: where it lies now, if it has moved.
      **reading: of `load`, in place of what recipe and record say.
    """
    source = base or plan.base
    recorded = {"dtype": plan.dtype, "variant": plan.variant, "revision": plan.revision}
    if folder and expanded(source).is_file():
        there = [place for place in (folder, *(file.parent for file in folder.glob("*/run.json"))) if is_run(place)]
        recorded |= runs.reading(there[0]) if there else {}
    return load(source, **(recorded | reading))


def restore(
    folder: str | Path, step: int | None = None, *, base: Pipeline | str | Path | None = None, **reading: Any
) -> Pipeline:
    """The erased pipeline of a run's checkpoint, without the original process.

    Args:
      folder: the run's.
      step: of the checkpoint; by default the newest.
      base: where the run's base lies now, if it has moved; or the base itself.
      **reading: of `load`, to read the base otherwise than in the run's record (`dtype`), or with what the record
        lacks (`config` or `ema` of a single file).

    Raises:
      FileNotFoundError: the folder is not a run, or its record's base does not exist.
      ValueError: a record of another version, or a base with other weights, or from which something was erased.
    """
    folder = expanded(folder)
    if not is_run(folder):
        raise FileNotFoundError(f"{folder} is not a run: it has no run.json")
    record, local = runs.read(folder)
    try:
        if record.recipe is None or record.base_sha256 is None:
            raise ValueError("it has no 'recipe'" if record.recipe is None else "it has no 'base_sha256'")
        plan = recipe.make(**{**record.recipe, **local})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/run.json was not written by this version: {error}") from error
    if isinstance(base, Pipeline):
        if _is_changed(base):
            raise ValueError(f"the base has edits, which would count as those of {folder}: load {plan.base} alone")
        loaded, base = base, base.provenance.source
    else:
        if base is not None:
            check_base(base, plan.base)
        try:
            loaded = base_of(plan, folder, base, **reading)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} (if the base of {folder} has moved, say where it is: base)") from error
    if (actual := diffusers.source_hash(loaded)) != record.base_sha256:
        raise ValueError(f"{base or plan.base} is not the base of {folder}: its denoiser has sha256 {actual[:12]}...")
    names = setup.changed_names(plan, loaded.configs)
    with Checkpoints(folder / "checkpoints", {}, read_only=True) as checkpoints:
        state: State = checkpoints.restore(setup.saved_state(plan, loaded.configs), step, check=False)
    record = dataclasses.replace(record, step=int(state.step))
    return loaded.with_edits(runs.edits(loaded, plan, names, result(state)), record)
