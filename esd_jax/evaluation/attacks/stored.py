"""Does an erasure survive what users do to weights? They store them in few bits, and merge them in parts.

    W = round(W_erased),    W = W_base + s (W_erased - W_base)

A small change of many weights may be rounded away; half of a change is what a merge of equal parts of the erased model
and its base leaves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from esd_jax.evaluation.attacks.adversary import BASE, ERASED, PLACEBO, Goal
from esd_jax.evaluation.attacks.prompts import OwnPrompts
from esd_jax.evaluation.attacks.scoring import Scored, score
from esd_jax.evaluation.attacks.settings import check
from esd_jax.io.exact import with_strength
from esd_jax.pipeline import Pipeline


def _int8(value: Array) -> Array:
    """Symmetric, with one scale for each output channel, which is the last axis."""
    if value.ndim < 2:
        return value
    scale = jnp.maximum(jnp.abs(value).max(axis=tuple(range(value.ndim - 1)), keepdims=True), 1e-30) / 127
    return jnp.round(value / scale) * scale


def _cast(dtype: Any) -> Callable[[Array], Array]:
    return lambda value: value.astype(dtype).astype(value.dtype)


FORMATS: Mapping[str, Callable[[Array], Array]] = {
    "bfloat16": _cast(jnp.bfloat16),
    "float8 e4m3": _cast(jnp.float8_e4m3fn),
    "int8": _int8,
}


@dataclass(frozen=True)
class StoredWeights:
    """Settings. formats: of `FORMATS`, of all of the denoiser's tensors. strengths: of the erasure's weight change.

    Raises ValueError for an unknown format.
    """

    NAME: ClassVar[str] = "stored weights"
    needs: ClassVar[frozenset[str]] = frozenset()
    MODELS: ClassVar[frozenset[str]] = frozenset({BASE, ERASED, PLACEBO})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "emoji": {}}

    formats: tuple[str, ...] = tuple(FORMATS)
    strengths: tuple[float, ...] = (0.5, 0.75, 1.25, 1.5)

    def __post_init__(self):
        check(self)
        for name in self.formats:
            _format(name)

    def probe(
        self, base: Pipeline, victim: Pipeline, goal: Goal, seeds: Sequence[int], seed: int = 0, **drawing: Any
    ) -> tuple[Scored, ...]:
        """The goal's prompts, sampled with each of the weights; with parts of a change only where there is one."""
        prompts = OwnPrompts().run(base, victim, goal, seed)
        variants = self._variants(victim)
        return tuple(replace(score(one, prompts, goal, seeds, **drawing), name=name) for name, one in variants)

    def _variants(self, victim: Pipeline) -> Iterator[tuple[str, Pipeline]]:
        for name in self.formats:
            yield f"target prompts, weights in {name}", rounded(victim, name)
        for strength in self.strengths if victim.edits else ():
            yield f"target prompts, {strength:g} of the change", with_strength(victim, strength)


def rounded(pipeline: Pipeline, name: str) -> Pipeline:
    """A pipeline whose denoiser's tensors hold what a format keeps of them. Raises ValueError for an unknown one."""
    keep = _format(name)
    tensors = {key: keep(value) for key, value in pipeline.params[pipeline.denoiser].items()}
    return replace(pipeline, params={**pipeline.params, pipeline.denoiser: tensors}, edits={})


def _format(name: str) -> Callable[[Array], Array]:
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown; choose of {', '.join(FORMATS)}")
    return FORMATS[name]
