"""The public verbs, over everything else: load, erase, sample, export."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from esd_jax import demo, recipe, sharding
from esd_jax.diffusion.schedule import Schedule
from esd_jax.io import diffusers
from esd_jax.io.diffusers import export
from esd_jax.io.hub import resolve
from esd_jax.methods import esd
from esd_jax.methods.concepts import make_bank
from esd_jax.models import architectures
from esd_jax.models.architectures import ARCHITECTURES
from esd_jax.params import Params, partition, prefixed
from esd_jax.pipeline import NetworkConfig, Pipeline, sample
from esd_jax.recipe import Recipe
from esd_jax.selection import select
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.log import MetricLog
from esd_jax.training.loop import train
from esd_jax.training.step import State, init_state, make_step

__all__ = ["erase", "export", "load", "sample"]

# Recipe fields that may differ between a run and its resumption: they do not change what is computed next.
NOT_COMPUTED = {
    "base", "steps", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard",
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
    pipeline = diffusers.load(folder, dtype=jnp.dtype(dtype), variant=variant, revision=revision)
    return dataclasses.replace(pipeline, provenance=dataclasses.replace(pipeline.provenance, source=str(source)))


def architecture(
    source: str | Path, *, variant: str | None = None, revision: str | None = None
) -> tuple[Mapping[str, NetworkConfig], Schedule]:
    """The network configs and the schedule of what `load` takes, or of a published architecture ("sd14", "sdxl", ...).

    No weights are read.
    """
    if str(source) in ARCHITECTURES:
        folder = architectures.folder(str(source))
    else:
        folder = resolve(demo.MODEL if str(source) == "emoji" else source, variant=variant, revision=revision)
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
      base: a pipeline, or what `load` takes.
      concept: what to erase ("Van Gogh"), or several.
      config: the name of a config of the package, or a path, to start from; by default "emoji" for the embedded model
        and "esd_x", the paper's, for any other.
      resume: continue from the newest checkpoint in `output_dir`; the result is bit-identical to an uninterrupted run.
      overwrite: replace an existing `output_dir`.
      **fields: any field of `Recipe`: subset=, steps=, learning_rate=, seed=, eta=, from_=, output_dir= ...

    Returns:
      The erased pipeline: the base's tensors, with the trained ones in `edits`.

    Raises:
      ValueError: an unknown field or subset, a concept that is too long, a batch that does not fit, ...
      FileExistsError: `output_dir` exists, and neither `resume` nor `overwrite` is given.
      NotFinite, Stopped: see `training.loop`.
    """
    if concept is not None:
        fields["concept"] = concept if isinstance(concept, str) else "; ".join(concept)
    source = base.provenance.source if isinstance(base, Pipeline) else str(base)
    settings = recipe.read(config or ("emoji" if source == "emoji" else "esd_x"))
    plan = recipe.make(**{**settings, **fields, "base": source})
    if not isinstance(base, Pipeline):
        base = load(base, dtype=plan.dtype, variant=plan.variant, revision=plan.revision)
    elif "dtype" in fields and jnp.dtype(plan.dtype) != base.dtype:
        raise ValueError(f"the base computes in {jnp.dtype(base.dtype).name}: load it with dtype={plan.dtype!r}")
    return run(base, dataclasses.replace(plan, dtype=jnp.dtype(base.dtype).name), resume=resume, overwrite=overwrite)


def run(base: Pipeline, plan: Recipe, *, resume: bool = False, overwrite: bool = False) -> Pipeline:
    """Carries out a recipe on a loaded base; `erase` with everything said. See there."""
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
    record = describe(base, plan)
    folder = _run_folder(plan.output_dir, resume, overwrite, record)
    theta = diffusers.read_exact(base, [f"unet/{name}" for name in names])
    state = init_state(theta, tx, plan.training.seed)
    state, theta_0, frozen, inputs = sharding.replicate((state, theta_0, frozen, inputs), mesh)

    with contextlib.ExitStack() as stack:
        checkpoints = log = None
        if folder:
            meta = {k: v for k, v in record["recipe"].items() if k not in NOT_COMPUTED}
            meta["base_sha256"] = record["base_sha256"]
            keep = plan.training.keep_checkpoints
            checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", meta, keep=keep))
            if resume and checkpoints.latest is not None:
                state = checkpoints.restore(state)
            log = MetricLog(folder, start=int(state.step), tensorboard=plan.training.tensorboard)
            stack.callback(log.close)
        preview = _preview(base, plan, folder) if folder else None
        state = train(
            step, state, theta_0, frozen, inputs, plan.training, checkpoints=checkpoints, log=log, preview=preview
        )
    if folder:
        shutil.rmtree(_replaced(folder), ignore_errors=True)
    return base.with_edits(state.theta, record)


def prepare(base: Pipeline, plan: Recipe) -> tuple[esd.Method, esd.Inputs, tuple[int, int, int]]:
    """The method of a recipe over a base, its traced inputs, and the shape of one example's latents."""
    factor = base.configs["vae"].factor
    size = (plan.height or base.default_size[0], plan.width or base.default_size[1])
    if any(side % factor for side in size):
        raise ValueError(f"image size {size[0]}x{size[1]} is not a multiple of {factor} pixels, the VAE's factor")
    method = esd.make_method(plan.esd, base.network("unet", remat=plan.remat), base.schedule, plan.concepts)
    bank = make_bank(lambda p: base.encode_prompts(p, size=size, strict=True), plan.concepts, plan.esd.roles())
    images = base.encode(read_images(plan.images, size)) if plan.images else None
    shape = (size[0] // factor, size[1] // factor, base.configs["unet"].in_channels)
    return method, esd.make_inputs(plan.esd, bank, images), shape


def describe(base: Pipeline, plan: Recipe) -> dict[str, Any]:
    """What was erased, from what, how and with which versions: the record that travels with every export."""
    packages = ("esd-jax", "jax", "jaxlib", "flax", "optax")
    return {
        "concepts": [dataclasses.asdict(concept) for concept in plan.concepts],
        "base": base.provenance.source,
        "base_sha256": diffusers.source_hash(base, "unet"),
        # Where the run lies says nothing about the model, and a machine's paths do not belong in its files.
        "recipe": {name: value for name, value in plan.flat().items() if name != "output_dir"},
        "versions": {package: version(package) for package in packages},
    }


def restore(folder: str | Path, step: int | None = None) -> Pipeline:
    """The erased pipeline of a run's checkpoint (the newest, or that of `step`), without the original process."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} is not a run: it has no run.json")
    record = json.loads((folder / "run.json").read_text())
    plan = recipe.make(**record["recipe"])
    base = load(plan.base, dtype=plan.dtype, variant=plan.variant, revision=plan.revision)
    if (found := diffusers.source_hash(base, "unet")) != record["base_sha256"]:
        raise ValueError(f"{plan.base} is no longer the base of {folder}: its UNet has sha256 {found[:12]}...")
    names = [f"unet/{name}" for name in select(plan.subset, base.network("unet").layouts)]
    like = init_state(diffusers.read_exact(base, names), plan.optimizer.transformation(), plan.training.seed)
    with Checkpoints(folder / "checkpoints", {}) as checkpoints:
        state: State = checkpoints.restore(like, step, check=False)
    return base.with_edits(state.theta, {**record, "step": int(state.step)})


def read_images(paths: str, size: tuple[int, int]) -> np.ndarray:
    """Image files, separated by ";", scaled and centre-cropped to `size`: float32 [n, height, width, 3] in [-1, 1]."""
    images = []
    for path in filter(None, (p.strip() for p in paths.split(";"))):
        try:
            image = Image.open(path).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError(f"{path} is not an image") from None
        scale = max(size[0] / image.height, size[1] / image.width)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
        images.append(np.asarray(image.crop((left, top, left + size[1], top + size[0])), np.float32))
    return np.stack(images) / 127.5 - 1


def _run_folder(output_dir: str | None, resume: bool, overwrite: bool, record: Mapping[str, Any]) -> Path | None:
    """Makes the run's folder, or refuses to touch an existing one. A replaced run is kept until the new one stands."""
    if output_dir is None:
        if resume:
            raise ValueError("resume needs output_dir, the folder of the run to be continued")
        return None
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; output_dir must be a folder")
    if resume and not (folder / "run.json").is_file():
        raise FileNotFoundError(f"there is no run to resume in {folder}")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} exists: resume it, overwrite it, or choose another output_dir")
        if not (folder / "run.json").is_file():
            raise FileExistsError(f"{folder} is not a run of ours, so it is not overwritten; choose another output_dir")
        shutil.rmtree(_replaced(folder), ignore_errors=True)
        folder.rename(_replaced(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}") from None
    return folder


def _replaced(folder: Path) -> Path:
    """Where a run that is being overwritten waits until the new one has ended well."""
    return folder.with_name(f".{folder.name}.replaced")


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
