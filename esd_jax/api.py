"""The public verbs, over everything else: load, erase, sample, export."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from esd_jax import demo, recipe, sharding
from esd_jax.diffusion.schedule import Schedule
from esd_jax.io import delta, diffusers
from esd_jax.io import folder as files
from esd_jax.io.delta import export_delta
from esd_jax.io.diffusers import export
from esd_jax.io.hub import resolve
from esd_jax.io.images import read_images
from esd_jax.methods import esd
from esd_jax.methods.concepts import make_bank
from esd_jax.models import architectures
from esd_jax.models.architectures import ARCHITECTURES
from esd_jax.params import Params, partition, prefixed
from esd_jax.pipeline import NetworkConfig, Pipeline, image_size, sample
from esd_jax.recipe import Recipe
from esd_jax.selection import select
from esd_jax.training import run_folder
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.log import MetricLog
from esd_jax.training.loop import train
from esd_jax.training.step import State, init_state, make_step

__all__ = ["erase", "export", "load", "sample"]

MODEL = "model"  # the erased checkpoint's folder in a run's

# Recipe fields that may differ between a run and its resumption: they do not change what is computed next.
NOT_COMPUTED = {
    "base", "images", "steps", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard",
    "preview_every", "preview_prompts", "preview_steps", "preview_guidance",
}  # fmt: skip


def load(
    source: str | Path, *, dtype: Any = "float32", variant: str | None = None, revision: str | None = None
) -> Pipeline:
    """Loads a checkpoint.

    Args:
      source: "emoji" (the model that the package carries), a diffusers folder, or a hub id ("org/name").
      dtype: compute dtype; the files may have any.
      variant, revision: of the files, as diffusers means them ("fp16"; a branch, tag or commit).

    Raises:
      FileNotFoundError, ValueError: naming what is missing or not implemented, and the mend.
    """
    folder = demo.MODEL if str(source) == "emoji" else source
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype={dtype!r} is unknown; choose float32 or bfloat16") from None
    pipeline = diffusers.load(folder, dtype=dtype, variant=variant, revision=revision)
    return dataclasses.replace(pipeline, provenance=dataclasses.replace(pipeline.provenance, source=str(source)))


def architecture(
    source: str | Path, *, variant: str | None = None, revision: str | None = None
) -> tuple[Mapping[str, NetworkConfig], Schedule]:
    """The network configs and the schedule of what `load` takes, or of a published architecture ("sd14", "sdxl", ...).

    No weights are read, or downloaded.
    """
    if str(source) in ARCHITECTURES:
        folder = architectures.folder(str(source))
    else:
        source = demo.MODEL if str(source) == "emoji" else source
        folder = resolve(source, variant=variant, revision=revision, weights=False)
    return diffusers.read_architecture(folder)


def erase(
    base: Pipeline | str | Path,
    concept: str | Sequence[str] | None = None,
    *,
    config: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **fields: Any,
) -> Pipeline:
    """Erases a concept from a checkpoint.

    Args:
      base: a pipeline, which keeps its own dtype; or what `load` takes.
      concept: what to erase ("Van Gogh"), or several.
      config: the name of a config of the package, or a path, to start from; by default "emoji" for the embedded model
        and "esd_x", the paper's, for any other.
      resume: continue from the newest checkpoint in `output_dir`; the result is bit-identical to an uninterrupted run.
      overwrite: replace an existing `output_dir`.
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
    source = base.provenance.source if isinstance(base, Pipeline) else str(base)
    settings = recipe.read(config or ("emoji" if source == "emoji" else "esd_x")).to_dict()
    plan = recipe.make(**{**settings, **fields, "base": source})
    if not isinstance(base, Pipeline):
        base = load(base, dtype=plan.dtype, variant=plan.variant, revision=plan.revision)
    elif "dtype" in fields and jnp.dtype(plan.dtype) != base.dtype:
        raise ValueError(f"the base computes in {jnp.dtype(base.dtype).name}: load it with dtype={plan.dtype!r}")
    came = base.provenance
    plan = dataclasses.replace(
        plan, dtype=jnp.dtype(base.dtype).name, variant=came.variant, revision=came.revision
    )  # what `restore` will load again
    return run(base, plan, resume=resume, overwrite=overwrite)


def run(base: Pipeline, plan: Recipe, *, resume: bool = False, overwrite: bool = False) -> Pipeline:
    """Carries out a recipe on a loaded base; `erase` with everything said. See there."""
    if base.edits and plan.output_dir:
        raise ValueError("the base has edits that its files lack, so a run could not be restored: export and load it")
    method, inputs, shape = prepare(base, plan)
    tx = plan.optimizer.transformation()
    names = select(plan.subset, base.network("unet").layouts)
    theta_0, frozen = partition(base.params["unet"], names)
    theta_0, frozen = prefixed(theta_0, "unet"), prefixed(frozen, "unet")
    mesh = sharding.make_mesh(plan.training.batch_size)
    step = make_step(
        method,
        tx,
        compute_dtype=jnp.dtype(base.dtype),
        shape=shape,
        batch_size=plan.training.batch_size,
        accumulate=plan.training.accumulate,
        mesh=mesh,
    )
    # Not bound to a name: the values of theta would then stay in memory twice for the whole run.
    state = init_state(diffusers.read_exact(base, [f"unet/{name}" for name in names]), tx, plan.training.seed)
    state, theta_0, frozen, inputs = sharding.replicate((state, theta_0, frozen, inputs), mesh)
    record = describe(base, plan)

    with (
        run_folder.opened(plan.output_dir, base.provenance.folder, resume, overwrite) as folder,
        contextlib.ExitStack() as stack,
    ):
        checkpoints = log = preview = None
        if folder:
            meta = {k: v for k, v in record["recipe"].items() if k not in NOT_COMPUTED}
            meta["base_sha256"] = record["base_sha256"]
            if inputs.images is not None:
                meta["images_sha256"] = hashlib.sha256(np.asarray(inputs.images).tobytes()).hexdigest()
            keep = plan.training.keep_checkpoints
            # A run's own file, unlike its exports, says where things lie on this machine.
            private = {**record, "local": {"base": plan.base, "images": plan.images}}
            if not resume:
                run_folder.write_record(folder, private)
            checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", meta, keep=keep))
            if resume:
                state = _resume(checkpoints, state, plan)
                run_folder.write_record(folder, private)
            log = MetricLog(folder, start=int(state.step), tensorboard=plan.training.tensorboard)
            stack.callback(log.close)
            preview = _preview(base, plan, folder)
        state = train(
            step, state, theta_0, frozen, inputs, plan.training, checkpoints=checkpoints, log=log, preview=preview
        )
        erased = base.with_edits(state.theta, {**record, "step": int(state.step)})
        if folder:
            export(erased, folder / MODEL, overwrite=True)
            export_delta(erased, folder / delta_name(plan), overwrite=True)
    return erased


def delta_name(plan: Recipe) -> str:
    """The file name of a run's delta. Long texts are cut, since a file's name holds 255 bytes at most."""
    texts = ["+".join(c.text for c in plan.concepts), plan.concepts[0].from_ or ""]
    concept, from_ = (text.encode()[:100].decode(errors="ignore") for text in texts)
    return delta.delta_name(concept, from_ or None, plan.subset)


def prepare(base: Pipeline, plan: Recipe) -> tuple[esd.Method, esd.Inputs, tuple[int, int, int]]:
    """The method of a recipe over a base, its traced inputs, and the shape of one example's latents."""
    size, factor = image_size(base.configs, plan.height, plan.width), base.configs["vae"].factor
    method = esd.make_method(plan.esd, base.network("unet", remat=plan.remat), base.schedule, plan.concepts)
    bank = make_bank(lambda p: base.encode_prompts(p, size=size, strict=True), plan.concepts, plan.esd.roles())
    images = None if plan.images is None else base.encode(read_images(plan.images, size))
    shape = (size[0] // factor, size[1] // factor, base.configs["unet"].in_channels)
    return method, esd.make_inputs(plan.esd, bank, images), shape


def describe(base: Pipeline, plan: Recipe) -> dict[str, Any]:
    """What was erased, from what, how and with which versions: the record that travels with every export."""
    packages = ("esd-jax", "jax", "jaxlib", "flax", "optax")
    # A machine's paths do not belong in a model's files: of a folder or an image, its name is kept.
    source = Path(plan.base).expanduser()
    name = source.resolve().name if source.exists() else plan.base
    images = plan.images and "; ".join(Path(path.strip()).name for path in plan.images.split(";"))
    recorded = plan.flat() | {"base": name, "images": images}
    return {
        "concepts": [dataclasses.asdict(concept) for concept in plan.concepts],
        "base": name,
        "base_sha256": diffusers.source_hash(base, "unet"),
        "recipe": {key: value for key, value in recorded.items() if key != "output_dir"},
        "versions": {package: version(package) for package in packages},
    }


def restore(folder: str | Path, step: int | None = None, *, base: str | Path | None = None) -> Pipeline:
    """The erased pipeline of a run's checkpoint, without the original process.

    Args:
      folder: the run's.
      step: of the checkpoint; by default the newest.
      base: where the run's base lies now, if it has moved.
    """
    folder = Path(folder).expanduser()
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} is not a run: it has no run.json")
    record = files.read_json(folder / "run.json")
    try:
        plan = recipe.make(**{**record["recipe"], **record.pop("local")})
        sha256 = record["base_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/run.json was not written by this version: {error}") from error
    try:
        loaded = load(base or plan.base, dtype=plan.dtype, variant=plan.variant, revision=plan.revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (if the base of {folder} has moved, say where it is: base)") from error
    if (found := diffusers.source_hash(loaded, "unet")) != sha256:
        raise ValueError(f"{base or plan.base} is not the base of {folder}: its UNet has sha256 {found[:12]}...")
    net, tx = loaded.network("unet"), plan.optimizer.transformation()
    shapes = {f"unet/{name}": net.shapes[name] for name in select(plan.subset, net.layouts)}
    like = jax.eval_shape(lambda theta: init_state(theta, tx, plan.training.seed), shapes)
    with Checkpoints(folder / "checkpoints", {}) as checkpoints:
        state: State = checkpoints.restore(like, step, check=False)
    return loaded.with_edits(state.theta, {**record, "step": int(state.step)})


def _resume(checkpoints: Checkpoints, state: State, plan: Recipe) -> State:
    """The newest checkpoint's state; the one given if a run was killed before its first."""
    if checkpoints.latest is None:
        return state
    state = checkpoints.restore(state)
    if (made := int(state.step)) > plan.training.steps:
        raise ValueError(f"steps={plan.training.steps}, but the run has made {made}: give steps={made} or more")
    return state


def _preview(base: Pipeline, plan: Recipe, folder: Path) -> Callable[[int, Params], None]:
    """Draws the same prompts and seeds as the run goes on: one strip of images per call, `previews/step_N.png`."""
    texts = plan.preview_prompts or ";".join(c.text for c in plan.concepts)
    prompts = [text.strip() for text in texts.split(";") if text.strip()]
    (folder / "previews").mkdir(exist_ok=True)

    def preview(step: int, theta: Params) -> None:
        images = sample(
            base.with_edits(theta),
            prompts,
            seed=plan.training.seed,
            num_steps=plan.preview_steps,
            guidance_scale=plan.preview_guidance,
            height=plan.height,
            width=plan.width,
        )
        Image.fromarray(np.concatenate(list(images), axis=1)).save(folder / "previews" / f"step_{step:06d}.png")

    return preview
