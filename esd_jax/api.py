"""The public verbs, over everything else: load, erase, sample, invert, purify, export."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from esd_jax import compile_cache, conditionings, exports, kinds, loading, recipe, runs, sampling, several, suggest
from esd_jax.diffusion.rules import Rule
from esd_jax.erasure import Concept
from esd_jax.idle import check_idle
from esd_jax.inputs import expanded
from esd_jax.loading import architecture, load, opened, restore
from esd_jax.params import Conditioning
from esd_jax.pipeline import Pipeline
from esd_jax.recipe_fields import RecipeFields, completed
from esd_jax.runs import each, replacements
from esd_jax.sampling import invert, purify
from esd_jax.several import FOR_EACH

__all__ = [
    "architecture",
    "erase",
    "erase_each",
    "export",
    "invert",
    "load",
    "opened",
    "planned",
    "purify",
    "restore",
    "sample",
]


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
    on_step: Callable[[int, dict[str, float]], bool | None] | None = None,
    **recipe_fields: Unpack[RecipeFields],
) -> Pipeline:
    """Erases a concept from a checkpoint.

        erase("emoji", "neon style")
        erase("CompVis/stable-diffusion-v1-4", "Van Gogh", config="sd14_style", output_dir="runs/van_gogh")
        erase(base, ["a cat", "a dog"], subset="esd-u", steps=400, on_step=lambda step, metrics: print(step, metrics))

    Args:
      base: a pipeline, which keeps its own dtype; or what `load` takes, which needs less memory: its text encoders and
        VAE are not on the device in training.
      concept: what to erase ("Van Gogh"), or several: in one string, separated by ";", or as a list, whose items are
        taken as they are. A `Concept` brings its own from_, replace_with, preserve and strength; the config's are for
        texts.
      kind: of the concept: "style", "object", "person", "nudity" or "attribute". It decides the recipe. By default what
        the embedded model knows of the concept, or what its text says ("neon style", "nudity"), else "style".
      config: the name of a config of the package, or a path, to start from, in place of the one for base, kind and
        `method` (see `kinds.config`).
      resume: continue from the newest checkpoint in `output_dir`; the result is bit-identical to an uninterrupted run.
      overwrite: replace an existing `output_dir`.
      start_from: weights to train on from in place of the base's, which remains the teacher: what `opened` takes, made
        by this package or any other. With steps=0 and an `output_dir` they become a checkpoint that can be resumed.
      stop_when: called with the erased pipeline every `stop_every` updates; training ends when it returns true; see
        `esd_jax.evaluation.below`.
      on_step: called with (step, metrics) after each update, step counted from 1; metrics are "loss", "grad_norm", "t"
        (the timestep) and "seconds" since training began. It runs on the host when an update's numbers have arrived,
        while the next two updates are computed already: it changes no result and compiles nothing, but one that takes
        longer than an update delays training by the difference. To act on every tenth update, test `step`. Where it
        returns True, training stops as on Ctrl-C, after the updates that are under way (two): a checkpoint is saved,
        `training.loop.Stopped` raised, and `load(output_dir)` opens the model of that checkpoint. To stop at an exact
        update, give `steps`: a run continues with more of them. What it raises ends training at once. Of several
        processes, the primary one calls it. A method in closed form makes no updates.
      **recipe_fields: any field of `Recipe`: method=, subset=, steps=, learning_rate=, seed=, eta=, from_=,
        output_dir= ... (`RecipeFields` lists them). preserve="auto" preserves the nearest concepts, and
        replace_with="auto" chooses what changes other concepts the least. With `output_dir`, the run's folder also gets
        the erased model and its delta.

    Returns:
      The erased pipeline: the base's tensors, with the trained ones in `edits`.

    Raises:
      ValueError: an unknown field or subset, naming the closest known one; a concept that is too long, a batch that
        does not fit, ...
      FileExistsError: `output_dir` exists, and neither `resume` nor `overwrite` is set.
      NotFinite, Stopped: see `training.loop`.
    """
    if TYPE_CHECKING:
        completed(**recipe_fields)  # whence Jedi takes their names
    owned = not isinstance(base, Pipeline) and stop_when is None
    base, plan = begun(base, concept, kind, config, recipe_fields, resume)
    known = [*recipe_fields, *(["steps_each"] if plan.steps_each else [])]  # the caller's, or the config's
    if few := several.shared_steps(plan.training.steps, len(plan.concepts), known):
        warnings.warn(few, stacklevel=2)
    if start_from is not None and not isinstance(start_from, Pipeline):
        start_from = opened(base, start_from)
    options = {"resume": resume, "overwrite": overwrite, "stop_when": stop_when, "stop_every": stop_every}
    options |= {"on_step": on_step}
    return runs.run(base, plan, start_from=start_from, offload_base=owned, **options)


def erase_each(
    base: Pipeline | str | Path,
    concept: str | Sequence[str | Concept],
    *,
    kind: str | None = None,
    config: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    at_once: int | None = None,
    **recipe_fields: Unpack[RecipeFields],
) -> list[Pipeline]:
    """Erases several concepts, each for itself: a model for each, all trained in one compiled step.

        cat, rose = erase_each("emoji", ["a cat", "a rose"], rank=4, output_dir="runs/each")
        fused, outcome = esd_jax.fusion.fuse(load("emoji"), [cat, rose])

    Every model is the one that `erase` would make of its concept with the same recipe. The recipe is that of the list:
    its kind is the list's, and what names any of its concepts is not preserved. All of them share the base's weights in
    memory, the program, and what of an update does not depend on the concept; with `rank`, each adds a LoRA and the
    activations of its batch.

    Args:
      base, kind, config, **recipe_fields: as of `erase`. steps and steps_each: the updates of each concept.
        output_dir: the folder of the runs' folders, which are named after the concepts.
      concept: the concepts, as of `erase`.
      resume: the runs go on from the newest checkpoint that all of them have; later ones are made again.
      overwrite: replace existing runs.
      at_once: how many concepts are computed together; by default all. Fewer need less memory.

    Raises ValueError, beside what `erase` raises, for inversion rounds, and for concepts whose updates are not the same
    program: with other numbers of replacements, say.
    """
    if TYPE_CHECKING:
        completed(**recipe_fields)
    owned = not isinstance(base, Pipeline)
    base, plan = begun(base, concept, kind, config, recipe_fields, resume)
    options = {"resume": resume, "overwrite": overwrite, "at_once": at_once}
    return each.run_each(base, plan, offload_base=owned, **options)


def begun(
    base: Pipeline | str | Path, concept: Any, kind: str | None, config: str | None, fields: Any, resume: bool = False
) -> tuple[Pipeline, recipe.Recipe]:
    """The loaded base, and the recipe with what is chosen on it. resume: the base is read as the run's record says."""
    compile_cache.use()
    if not isinstance(base, Pipeline) and loading.is_run(base):
        base = load(base)
    plan = planned(base, concept, kind=kind, config=config, **fields)
    if not isinstance(base, Pipeline):
        base = loading.base_of(plan, expanded(plan.output_dir) if resume and plan.output_dir else None, base)
    elif "dtype" in fields and jnp.dtype(plan.dtype) != base.dtype:
        raise ValueError(f"the base computes in {jnp.dtype(base.dtype).name}: load it with dtype={plan.dtype!r}")
    came = base.provenance
    plan = dataclasses.replace(
        plan, dtype=jnp.dtype(base.dtype).name, variant=came.variant, revision=came.revision
    )  # what `restore` will load again
    return base, replacements.resolved(base, plan, resume)


def planned(
    base: Pipeline | str | Path,
    concept: str | Concept | Sequence[str | Concept] | None = None,
    *,
    kind: str | None = None,
    config: str | None = None,
    **recipe_fields: Unpack[RecipeFields],
) -> recipe.Recipe:
    """The recipe that `erase` carries out with these arguments; no weights are read.

    Raises ValueError as `erase` does for what it is given.
    """
    fields: dict[str, Any] = {**recipe_fields}
    if "method" in fields:
        fields["method"] = recipe.method_name(fields["method"])
    if concept is not None:
        fields["concept"] = concept
    named = concept if isinstance(concept, list | tuple) else (concept,)
    beside = [name for name in FOR_EACH if fields.get(name) is not None]
    if beside and any(isinstance(one, Concept) for one in named):
        raise ValueError(f"{beside[0]} is given beside a Concept, which has fields of its own: give it there")
    source = base.provenance.source if isinstance(base, Pipeline) else str(base)
    settings, config = _settings(base, source, config, kind, fields)
    several.prefer_steps(settings, fields)
    plan = recipe.read_previews(recipe.make(**{**settings, **fields, "base": source}))
    check_idle(plan, fields)
    typed = {*fields, *FOR_EACH} if any(isinstance(one, Concept) for one in named) else {*fields}
    plan.check_concepts(config, typed)
    return plan


def _settings(
    base: Pipeline | str | Path, source: str, config: str | None, kind: str | None, fields: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """The fields of the config that is named, or chosen by base and kind, and its name.

    A method's own `kind` becomes a field.
    """
    if config is None:
        if not (texts := several.texts_of(fields.get("concept"))):
            recipe.make().check_concepts()  # raises: there is none
        configs = lambda: base.configs if isinstance(base, Pipeline) else architecture(base, **_files(fields))[0]  # noqa: E731
        config = kinds.config(source, texts, configs, kind=kind, fields=fields)
        return kinds.fitted(recipe.read(config).to_dict(), texts), config
    settings = recipe.read(config).to_dict()
    settings = kinds.fitted(settings, several.texts_of(fields.get("concept") or settings.get("concept")))
    if kind is not None:
        kinds.as_field(kind, str(fields.get("method", settings.get("method", "esd"))))
        fields["kind"] = kind
    return settings, config


def _files(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in ("variant", "revision") if name in fields}


@suggest.keywords(sampling.ELSEWHERE, sampling.RENAMED)
def sample(
    pipeline: Pipeline | str | Path,
    prompts: str | Sequence[str] | Conditioning,
    *,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | Sequence[str | None] | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    latents: Float[Array | np.ndarray, "batch h w channel"] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    rule: Rule | None = None,
    reweight: Mapping[str, float] | None = None,
    true_cfg: float | None = None,
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Samples one image per prompt.

        sample(pipeline, "a cat in neon style", steps=20)
        sample(pipeline, ["a cat in neon style"] * 4, steps=20)
        sample(pipeline, "a cat in neon style", steps=20, rule=SLD.preset("strong", "neon style"))
        sample(pipeline, "a cat in neon style", steps=20, reweight={"neon": 0.5})

    Args:
      pipeline: the checkpoint, erased or not; or what `load` takes, which is loaded for this call alone.
      prompts: one per image, or one string for one image; or the conditioning in their place (what
        `Pipeline.encode_prompts` returns), a row per image, where no text expresses it.
      seed: image i depends on (seed, i) alone, or on seed[i] alone if several are given; never on the batch size.
      steps: sampler steps (num_inference_steps in diffusers); by default 50, or what the model family is used with.
      guidance_scale: eps_null + scale (eps_c - eps_null), 1 or less samples without guidance; of a guidance-distilled
        model the scale that it takes as an input. By default 7.5, or what the model family is used with.
      negative_prompt: takes the place of the empty prompt; one for all, or one or None per image. Without one (None), a
        checkpoint configured so, as SDXL's are, is guided from zeros; "" is encoded.
      sampler: one of `samplers.SAMPLERS`; by default the one that the checkpoint names. "auto" is that one, too, but
        "ddim", with a warning, where it is not implemented: for images whose sampler does not matter.
      eta: DDIM's stochasticity, 0 to 1.
      latents: the initial noise, unit Gaussian, NHWC, in place of `seed`'s.
      height, width: in pixels, multiples of the VAE's factor (and of what the UNet halves).
      batch_size: images per call of the network, spread over as many of this host's devices as divide it.
      rule: further guidance, `SLD` or `SEGA` of `esd_jax.guidance`; it needs a guidance_scale above 1.
      reweight: words or phrases of the prompts -> what the attention to them is multiplied with, in every
        cross-attention and step (Hertz et al. 2022, Prompt-to-Prompt, "attention re-weighting", without a source
        image); not renormalised, and for the prompt alone, not for the negative prompt or a rule's. The word
        "<|endoftext|>" is what follows a prompt, which also holds the whole of it: see `prompt_to_prompt.token_scale`.
      true_cfg: of FLUX.1 [dev], the scale of classifier-free guidance beside its own (diffusers: true_cfg_scale). Above
        1 a negative_prompt and a rule act, and every step evaluates the network for each of their prompts, too.

    Returns:
      uint8 [n, height, width, 3], one image too; `esd_jax.grid` puts them side by side.

    Raises:
      TypeError: an unknown argument, naming the one that was probably meant.
      ValueError: a number out of range, a size that the VAE cannot make, a word of `reweight` that no prompt holds, an
        image that comes out as NaN, ...
    """
    compile_cache.use()
    pipeline = pipeline if isinstance(pipeline, Pipeline) else load(pipeline)
    if guidance_scale is not None:
        conditionings.note_unused(pipeline, guidance_scale)
    return sampling.sample(
        pipeline, prompts, seed=seed, steps=steps,
        guidance_scale=guidance_scale, negative_prompt=negative_prompt, sampler=sampler, eta=eta, latents=latents,
        height=height, width=width, batch_size=batch_size, rule=rule, reweight=reweight, true_cfg=true_cfg,
    )  # fmt: skip


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

    Args: see `exports.export`, which also explains `verify`.
    """
    settings = {"verify": verify, "overwrite": overwrite, "metadata": metadata}
    return exports.export(pipeline, path, format, **settings, **options).path
