"""The fields of a recipe by name and type, for editors and type checkers; `Recipe` and its parts document each.

`erase(**fields)` takes them. A test holds them equal to those of `Recipe`, of its parts and of every method.
"""

import os
from collections.abc import Collection, Sequence
from typing import Any, TypedDict

from esd_jax import suggest

# Several texts in one string have separators; those of a list are taken as they are.
Texts = str | os.PathLike[str] | Sequence[str | Sequence[str] | None] | None
Strengths = str | float | Sequence[str | float | None] | None
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None

# What other libraries and releases of ESD call a field.
ELSEWHERE = {
    "lr": "learning_rate", "iterations": "steps", "num_steps": "steps", "num_train_steps": "steps",
    "max_train_steps": "steps", "train_method": "subset", "negative_guidance": "eta", "start_guidance":
    "sampling_guidance", "num_inference_steps": "sampling_steps", "erase_from": "from_", "erase_concept": "concept",
    "prompt": "concept", "train_batch_size": "batch_size", "gradient_accumulation_steps": "accumulate",
    "mixed_precision": "dtype", "gradient_checkpointing": "remat", "save_path": "output_dir", "path": "output_dir",
}  # fmt: skip
# What is not the same number by its other name.
OTHERWISE = {
    "negative_guidance": " (in the release of 2025 it is eta + 1 with anchor='null', eta with anchor='from')",
}


def meant(name: str, known: Collection[str]) -> str:
    """The end of a message that refuses a field that is not known: which one it may be."""
    hint = suggest.did_you_mean(ELSEWHERE.get(name, name), known, "`esd-jax erase --help` lists them")
    return hint + OTHERWISE.get(name, "")


class RecipeFields(TypedDict, total=False):
    """Keyword arguments of `erase`: any field of a recipe but the base and the concept."""

    # Of `Recipe`.
    from_: Texts
    replace_with: Texts
    preserve: Texts
    strength: Strengths
    method: str
    subset: str
    steps_each: int
    rank: int
    preserve_weight: float
    preserve_images: int
    preserve_empty: float
    preserve_worst_every: int
    remaining_every: int
    null: str
    images: Paths
    dtype: str
    variant: str | None
    revision: str | None
    remat: bool
    fsdp: int
    height: int | None
    width: int | None
    output_dir: str | os.PathLike[str] | None
    preview_prompts: Texts
    preview_steps: int
    preview_guidance: float

    # Of `training.loop.Training`.
    steps: int
    batch_size: int
    accumulate: int
    seed: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    preview_every: int
    tensorboard: bool

    # Of `training.step.Optimizer`.
    optimizer: str
    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    warmup_steps: int
    max_grad_norm: float | None
    decay_steps: int
    decay_to: float
    decay: str
    hold: float

    # Of `methods.esd.ESD`.
    sample_with: str
    sampler: str
    anchor: str
    eta: float
    as_released: bool
    context_eta: float
    window: float
    train_guidance: float

    # Of `methods.all_but_one.AllButOne`.
    delta: str
    instructions: str | None
    replace_scale: float
    gamma_1: float
    gamma_2: float
    penalty: float
    delta_index: str
    window_start: float
    window_end: float
    delta_warmup: int
    kappa: float
    quantile_of: str
    token_scale: float

    # Of `methods.sdd.SDD`.
    concept_order: str
    steps_per_concept: int | None
    fix_k0: bool
    ema: float

    # Of `methods.ablating.Ablating`.
    objective: str
    target_from: str
    prior_weight: float
    detach_bos: bool
    resize: bool
    flip: bool
    views: int
    anchor_prompts: str | None

    # Of `methods.forget_me_not.ForgetMeNot`.
    eos_positions: str
    no_images: bool

    # Of `methods.stereo.STEREO`.
    search_rounds: int
    search_updates: int
    search_pace: float
    scale: float

    # Of `methods.uce.UCE`.
    tokens: str
    directions: int
    project: bool

    # Of `methods.rece.RECE`.
    epochs: int
    r: float

    # Of `methods.speed.SPEED`.
    rho: float
    filter: bool
    copies: int
    threshold: float
    centres: int

    # Of `methods.redirect.Redirect`.
    redirect_from: float
    redirect_spread: float
    redirect_between: float

    # Of `methods.oce.OCE`.
    corpus_scale: float

    # Of several methods.
    sample_prompt: str
    timestep_mode: str
    sampling_steps: int
    sampling_guidance: float
    updates_per_trajectory: int
    trajectory_buffer: int
    contexts: str | None
    rounds_every: int
    rounds_search: int
    rounds_warm: int
    rounds_rate: float
    rounds_batch: int
    rounds_tokens: str
    rounds_start: float
    rounds_radius: float
    rounds_from_t: int
    rounds_bank: int
    rounds_fresh: float
    rounds_weight: float
    rounds_follow: float
    rounds_images: int
    rounds_seed: int
    rounds_skip: float
    rounds_stop: int
    erase_scale: float
    expand: str
    retain: str | None
    template: str
    inversion_steps: int
    inversion_tokens: str
    inversion_learning_rate: float
    drawn_images: int
    drawing_sampler: str | None
    drawing_steps: int
    drawing_guidance: float
    drawing_seed: int
    lam: float
    preserve_scale: float


# fmt: off
def completed(
    *,
    from_: Texts = ..., replace_with: Texts = ..., preserve: Texts = ..., strength: Strengths = ..., method: str = ...,
    subset: str = ..., steps_each: int = ..., rank: int = ..., preserve_weight: float = ..., preserve_images: int = ...,
    preserve_empty: float = ..., preserve_worst_every: int = ...,
    remaining_every: int = ..., null: str = ..., images: Paths = ...,
    dtype: str = ..., variant: str | None = ..., revision: str | None = ..., remat: bool = ..., fsdp: int = ...,
    height: int | None = ..., width: int | None = ..., output_dir: str | os.PathLike[str] | None = ...,
    preview_prompts: Texts = ..., preview_steps: int = ..., preview_guidance: float = ..., steps: int = ...,
    batch_size: int = ..., accumulate: int = ..., seed: int = ..., log_every: int = ..., checkpoint_every: int = ...,
    keep_checkpoints: int = ..., preview_every: int = ..., tensorboard: bool = ..., optimizer: str = ...,
    learning_rate: float = ..., b1: float = ..., b2: float = ..., eps: float = ..., weight_decay: float = ...,
    warmup_steps: int = ..., max_grad_norm: float | None = ..., decay_steps: int = ...,
    decay_to: float = ..., decay: str = ..., hold: float = ..., sample_with: str = ..., sampler: str = ...,
    anchor: str = ..., eta: float = ..., as_released: bool = ...,
    context_eta: float = ..., window: float = ..., train_guidance: float = ...,
    delta: str = ..., instructions: str | None = ...,
    replace_scale: float = ..., gamma_1: float = ..., gamma_2: float = ..., penalty: float = ...,
    delta_index: str = ..., window_start: float = ..., window_end: float = ..., delta_warmup: int = ...,
    kappa: float = ..., quantile_of: str = ..., token_scale: float = ..., concept_order: str = ...,
    steps_per_concept: int | None = ..., fix_k0: bool = ..., ema: float = ..., objective: str = ...,
    target_from: str = ..., prior_weight: float = ..., detach_bos: bool = ..., resize: bool = ..., flip: bool = ...,
    views: int = ..., anchor_prompts: str | None = ..., eos_positions: str = ...,
    no_images: bool = ..., search_rounds: int = ..., search_updates: int = ..., search_pace: float = ...,
    scale: float = ..., tokens: str = ..., directions: int = ..., project: bool = ..., epochs: int = ...,
    r: float = ..., rho: float = ..., filter: bool = ..., copies: int = ..., threshold: float = ...,
    centres: int = ..., corpus_scale: float = ..., redirect_from: float = ...,
    redirect_spread: float = ..., redirect_between: float = ...,
    sample_prompt: str = ..., timestep_mode: str = ..., sampling_steps: int = ..., sampling_guidance: float = ...,
    updates_per_trajectory: int = ..., trajectory_buffer: int = ..., contexts: str | None = ...,
    rounds_every: int = ..., rounds_search: int = ..., rounds_warm: int = ..., rounds_rate: float = ...,
    rounds_batch: int = ..., rounds_tokens: str = ..., rounds_start: float = ..., rounds_radius: float = ...,
    rounds_from_t: int = ..., rounds_bank: int = ..., rounds_fresh: float = ..., rounds_weight: float = ...,
    rounds_follow: float = ..., rounds_images: int = ..., rounds_seed: int = ..., rounds_skip: float = ...,
    rounds_stop: int = ...,
    erase_scale: float = ..., expand: str = ..., retain: str | None = ..., template: str = ...,
    inversion_steps: int = ..., inversion_tokens: str = ..., inversion_learning_rate: float = ...,
    drawn_images: int = ..., drawing_sampler: str | None = ..., drawing_steps: int = ...,
    drawing_guidance: float = ..., drawing_seed: int = ..., lam: float = ..., preserve_scale: float = ...,
) -> Any:
    """The same names as plain keywords: Jedi, which completes in notebooks and many editors, reads no `Unpack`."""
    ...
# fmt: on
