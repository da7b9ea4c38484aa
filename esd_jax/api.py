"""The public verbs, over everything else: load, erase, sample, invert, purify, export."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from esd_jax import exports, kinds, recipe, runs
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasure import Concept
from esd_jax.evaluation import testbed
from esd_jax.inputs import expanded
from esd_jax.io import diffusers
from esd_jax.io.delta import load_delta
from esd_jax.io.difference import apply_difference, is_difference
from esd_jax.io.ldm import UNET
from esd_jax.io.lora_merge import is_lora, merge_lora
from esd_jax.io.safetensors import OF_TENSORS, read_header, refuse_pickle
from esd_jax.models import architectures
from esd_jax.models.architectures import ARCHITECTURES
from esd_jax.pipeline import NetworkConfig, Pipeline
from esd_jax.runs import setup
from esd_jax.sampling import invert, purify, sample
from esd_jax.several import FOR_EACH
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.step import State, result

__all__ = ["erase", "export", "invert", "load", "purify", "sample"]


def load(
    source: str | Path,
    *,
    dtype: Any = "float32",
    variant: str | None = None,
    revision: str | None = None,
    config: str | Path | None = None,
    ema: bool = False,
) -> Pipeline:
    """Loads a checkpoint.

    Args:
      source: "emoji" (the model that the package carries), a diffusers folder, a hub id ("org/name"), or the single
        `.safetensors` file that A1111 and ComfyUI open.
      dtype: compute dtype; the files may have any.
      variant, revision: of the files, as diffusers means them ("fp16"; a branch, tag or commit).
      config, ema: of a single file: the architecture ("sd14", "sd21", "sd21-base", "sdxl", or a diffusers folder of
        it), by default told from the file; and whether to read the UNet's moving average. See `io.diffusers.load`.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or not implemented, and the mend.
    """
    folder = bed.folder if (bed := testbed.of(source)) else source
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype={dtype!r} is unknown; choose float32 or bfloat16") from None
    pipeline = diffusers.load(folder, dtype=dtype, variant=variant, revision=revision, config=config, ema=ema)
    return dataclasses.replace(pipeline, provenance=dataclasses.replace(pipeline.provenance, source=str(source)))


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


def erase(
    base: Pipeline | str | Path,
    concept: str | Concept | Sequence[str | Concept] | None = None,
    *,
    kind: str | None = None,
    config: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    start_from: Pipeline | str | Path | None = None,
    stop_when: Callable[[Pipeline], bool] | None = None,
    stop_every: int = 50,
    **fields: Any,
) -> Pipeline:
    """Erases a concept from a checkpoint.

    Args:
      base: a pipeline, which keeps its own dtype; or what `load` takes, which needs less memory: its text encoders and
        VAE are not on the device in training.
      concept: what to erase ("Van Gogh"), or several: in one string, separated by ";", or as a list, whose items are
        taken as they are. A `Concept` brings its own from_, replace_with, preserve and strength; the config's are for
        texts.
      kind: of the concept: "style", "object", "person", "nudity" or "attribute". It decides the recipe. By default what
        the embedded model knows of the concept, or its own words say ("neon style", "nudity"), and else "style".
      config: the name of a config of the package, or a path, to start from, in place of the one for base, kind and
        `method` (see `kinds.config`).
      resume: continue from the newest checkpoint in `output_dir`; the result is bit-identical to an uninterrupted run.
      overwrite: replace an existing `output_dir`.
      start_from: weights to train on from in place of the base's, which remains the teacher: what `opened` takes, made
        by this package or any other. With steps=0 and an `output_dir` they become a checkpoint that can be resumed.
      stop_when: looks at the erased pipeline every `stop_every` updates, and ends training where it says so; see
        `esd_jax.evaluation.below`.
      **fields: any field of `Recipe`: subset=, steps=, learning_rate=, seed=, eta=, from_=, output_dir= ...
        With `output_dir`, the run's folder also gets the erased model and its delta.

    Returns:
      The erased pipeline: the base's tensors, with the trained ones in `edits`.

    Raises:
      ValueError: an unknown field or subset, a concept that is too long, a batch that does not fit, ...
      FileExistsError: `output_dir` exists, and neither `resume` nor `overwrite` is given.
      NotFinite, Stopped: see `training.loop`.
    """
    if concept is not None:
        fields["concept"] = concept
    named = concept if isinstance(concept, list | tuple) else (concept,)
    beside = [name for name in FOR_EACH if fields.get(name) is not None]
    if beside and any(isinstance(one, Concept) for one in named):
        raise ValueError(f"{beside[0]} is given beside a Concept, which has fields of its own: give it there")
    source = base.provenance.source if isinstance(base, Pipeline) else str(base)
    if config is None:
        config = kinds.config(
            source,
            _texts(fields.get("concept")),
            lambda: base.configs if isinstance(base, Pipeline) else architecture(base, **_files(fields))[0],
            kind=kind,
            fields=fields,
        )
    elif kind is not None:  # which some methods have as a setting of their own
        fields["kind"] = kind
    plan = recipe.read_previews(recipe.make(**{**recipe.read(config).to_dict(), **fields, "base": source}))
    plan.check_concepts()
    own = not isinstance(base, Pipeline) and stop_when is None
    if not isinstance(base, Pipeline):
        base = load(base, dtype=plan.dtype, variant=plan.variant, revision=plan.revision)
    elif "dtype" in fields and jnp.dtype(plan.dtype) != base.dtype:
        raise ValueError(f"the base computes in {jnp.dtype(base.dtype).name}: load it with dtype={plan.dtype!r}")
    came = base.provenance
    plan = dataclasses.replace(
        plan, dtype=jnp.dtype(base.dtype).name, variant=came.variant, revision=came.revision
    )  # what `restore` will load again
    if start_from is not None and not isinstance(start_from, Pipeline):
        start_from = opened(base, start_from)
    options = {"resume": resume, "overwrite": overwrite, "stop_when": stop_when, "stop_every": stop_every}
    return runs.run(base, plan, start_from=start_from, own=own, **options)


def _texts(concept: Any) -> tuple[str, ...]:
    """The texts of what `erase` is given as its concept; what is wrong with it, the recipe says."""
    if isinstance(concept, list | tuple):
        return tuple(one.text if isinstance(one, Concept) else str(one) for one in concept)
    return (concept.text,) if isinstance(concept, Concept) else tuple(filter(None, str(concept or "").split(";")))


def _files(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in ("variant", "revision") if name in fields}


def opened(base: Pipeline, path: str | Path) -> Pipeline:
    """What was erased from a base, whatever it lies in.

    Args:
      base: what it was erased from.
      path: a run's folder, a diffusers folder (of a UNet alone, or of all), or a .safetensors file: a delta, a
        difference, a LoRA, or a single-file checkpoint.

    Raises FileNotFoundError, ValueError as their readers do.
    """
    path = expanded(path)
    if path.suffix.lower() != ".safetensors":
        refuse_pickle(path, OF_TENSORS)
        if (path / "run.json").is_file():
            return restore(path, base=base)
        if (path / "config.json").is_file():
            return diffusers.with_denoiser(base, path)
        return diffusers.load(path, dtype=base.dtype)
    header = read_header(path)
    if is_difference(header):
        return apply_difference(base, path)
    if is_lora(header):
        return merge_lora(base, path)
    if any(key.startswith(UNET) for key in header.entries):
        found = diffusers.load(path, dtype=base.dtype, config=base.provenance.folder)
        return dataclasses.replace(found, schedule=base.schedule)  # which a base's file may have told by itself
    return load_delta(base, path)


def export(
    pipeline: Pipeline,
    path: str | Path,
    *,
    format: str = "folder",
    verify: bool = False,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    **options: Any,
) -> Path:
    """Writes a checkpoint: a diffusers folder, or another of `esd_jax.formats.FORMATS`.

        export(erased, "emoji-without-neon")
        export(erased, "lora.safetensors", format="lora", rank=4)

    Args: see `exports.export`, which also says what `verify` has found.
    """
    told = {"verify": verify, "overwrite": overwrite, "metadata": metadata}
    return exports.export(pipeline, path, format, **told, **options).path


def restore(folder: str | Path, step: int | None = None, *, base: Pipeline | str | Path | None = None) -> Pipeline:
    """The erased pipeline of a run's checkpoint, without the original process.

    Args:
      folder: the run's.
      step: of the checkpoint; by default the newest.
      base: where the run's base lies now, if it has moved; or the base itself, if `load` needs more to read it than
        the run's record says (`config` or `ema` of a single file).
    """
    folder = expanded(folder)
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} is not a run: it has no run.json")
    record, local = runs.read(folder)
    try:
        if record.recipe is None or record.base_sha256 is None:
            raise ValueError("it has no 'recipe'" if record.recipe is None else "it has no 'base_sha256'")
        plan = recipe.make(**{**record.recipe, **local})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/run.json was not written by this version: {error}") from error
    if isinstance(base, Pipeline):
        loaded, base = base, base.provenance.source
    else:
        try:
            loaded = load(base or plan.base, dtype=plan.dtype, variant=plan.variant, revision=plan.revision)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} (if the base of {folder} has moved, say where it is: base)") from error
    if (found := diffusers.source_hash(loaded)) != record.base_sha256:
        raise ValueError(f"{base or plan.base} is not the base of {folder}: its denoiser has sha256 {found[:12]}...")
    names = setup.changed_names(plan, loaded.configs)
    with Checkpoints(folder / "checkpoints", {}, read_only=True) as checkpoints:
        state: State = checkpoints.restore(setup.saved_state(plan, loaded.configs), step, check=False)
    record = dataclasses.replace(record, step=int(state.step))
    return loaded.with_edits(runs.edits(loaded, plan, names, result(state)), record)
