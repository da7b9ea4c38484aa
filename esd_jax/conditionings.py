"""The conditionings of each generated image: of the null prompt, the prompt, and a rule's prompts."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esd_jax.diffusion import prompt_to_prompt
from esd_jax.diffusion.programs import ScaledConditioning
from esd_jax.diffusion.rules import Rule
from esd_jax.params import Conditioning
from esd_jax.pipeline import Pipeline


def count(prompts: Sequence[str] | Conditioning) -> int:
    """How many images the prompts, or conditionings in place of them, ask for."""
    return len(jax.tree.leaves(prompts)[0]) if is_encoded(prompts) else len(prompts)


def is_encoded(prompts: Sequence[str] | Conditioning) -> bool:
    """Whether prompts are already encoded: conditionings in place of texts."""
    leaves = jax.tree.leaves(prompts)
    arrays = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    return bool(leaves) and arrays and all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)


def classifier_free(
    pipeline: Pipeline,
    guidance_scale: float,
    rule: Rule | None,
    negative_prompt: str | Sequence[str | None] | None,
    true_cfg: float | None,
) -> bool:
    """Whether sampling is guided classifier-free. Raises ValueError for what a model's guidance does not take."""
    family, configs = pipeline.family, pipeline.configs
    model, rules = family.called(configs), "" if rule is None else type(rule).__name__
    if family.guide is None:
        if true_cfg is not None:
            raise ValueError(f"true_cfg={true_cfg} is for guidance-distilled models: {model} takes a guidance_scale")
        if rules and guidance_scale <= 1:
            raise ValueError(f"guidance_scale={guidance_scale} switches guidance off, but {rules} needs it: above 1")
        return guidance_scale > 1
    if true_cfg is not None and not math.isfinite(true_cfg):
        raise ValueError(f"true_cfg={true_cfg} must be finite")
    what = rules or ("negative_prompt" if negative_prompt is not None else "")
    if family.sampling(configs).guidance_scale <= 1:
        if what or true_cfg is not None:
            what = what or f"true_cfg={true_cfg}"
            raise ValueError(f"{what} needs classifier-free guidance, which {model} does not have: leave it out")
        return False
    if what and (true_cfg is None or true_cfg <= 1):
        raise ValueError(f"{what} needs classifier-free guidance, and {model} is distilled: give true_cfg, above 1")
    return true_cfg is not None and true_cfg > 1


def note_unused(pipeline: Pipeline, guidance_scale: float) -> None:
    """Warns of a guidance scale for a model that was distilled to do without any."""
    family, configs = pipeline.family, pipeline.configs
    own = family.sampling(configs).guidance_scale
    if family.guide is not None and own <= 1 and guidance_scale != own:
        warnings.warn(
            f"{family.called(configs)} is sampled without guidance: guidance_scale={guidance_scale:g} changes nothing",
            stacklevel=4,  # who called `sample`, which checks its keywords first
        )


def make_conditioning(
    pipeline: Pipeline,
    prompts: Sequence[str] | Conditioning,
    size: tuple[int, int],
    rows: int,
    guided: bool,
    negative_prompt: str | Sequence[str | None] | None = None,
    rule: Rule | None = None,
    reweight: Mapping[str, float] | None = None,
    guidance_scale: float = 1.0,
) -> Callable[[np.ndarray], tuple[ScaledConditioning, ...]]:
    """Indices of `rows` examples -> their conditionings: of the null prompt (if guided), the prompt, the rule's.

    guidance_scale: what a guidance-distilled network takes as an input.
    """
    negatives = None if isinstance(negative_prompt, str | None) else negative_prompt
    if negatives is not None and len(negatives) != count(prompts):
        raise ValueError(f"{len(negatives)} negative prompts for {count(prompts)} prompts")
    encoded = is_encoded(prompts)
    if reweight:
        pipeline.family.require({"cross_attention"}, "reweight")
    if encoded and reweight:
        raise ValueError("reweight names words of prompts, and a Conditioning has none")
    scale = prompt_to_prompt.token_scale(pipeline.tokenizers[0], prompts, reweight) if reweight else None

    def for_all(encoded: Conditioning) -> Conditioning:
        return jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), encoded)

    others = [for_all(pipeline.encode_prompts([prompt], size=size)) for prompt in (rule.prompts if rule else ())]
    null = []
    if guided and isinstance(negative_prompt, str | None):
        null = [for_all(null_conditioning(pipeline, [negative_prompt], size))]

    def condition(index: np.ndarray) -> tuple[ScaledConditioning, ...]:
        own = []
        if guided and negatives is not None:
            own = [null_conditioning(pipeline, [negatives[int(i)] for i in index], size)]
        if encoded:
            prompt = jax.tree.map(lambda a: jnp.asarray(a)[index], prompts)
        else:
            prompt = pipeline.encode_prompts([prompts[int(i)] for i in index], size=size)
        conditionings = (*null, *own, prompt, *others)
        scales: list[Any] = [None] * len(conditionings)
        if scale is not None:
            scales = [jnp.ones((rows, scale.shape[1]), jnp.float32)] * len(conditionings)
            scales[len(null) + len(own)] = jnp.asarray(scale[index])
        if guide := pipeline.family.guide:
            conditionings = tuple(guide(one, jnp.full(rows, guidance_scale, jnp.float32)) for one in conditionings)
        return tuple(zip(conditionings, scales, strict=True))

    return condition


def null_conditioning(pipeline: Pipeline, negatives: Sequence[str | None], size: tuple[int, int]) -> Conditioning:
    """What guidance starts from: the negative prompts; where one is None, the empty prompt or, for SDXL, zeros."""
    null = pipeline.encode_prompts([negative or "" for negative in negatives], size=size)
    if not pipeline.zeros_for_empty_prompt:
        return null
    return pipeline.family.null(null, np.asarray([negative is None for negative in negatives]))
