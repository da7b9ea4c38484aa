"""replace_with="auto": what takes a concept's place is the candidate that changes the rest of the model the least.

Each candidate takes the concept's place in a closed form of this one pair (`erasing.closed_form`),

    E = argmin sum_i |c_i (1 + E) - c*_i|^2 + lam |E|_F^2,    lam = SHRINKAGE mean_i |c_i|^2,

c_i and c*_i the vectors of concept and candidate from the first token in which they differ (of several text encoders
whose tokens follow one another, the larger mean). No weight is edited: the token vectors that layers read are
multiplied by 1 + E; a pooled vector stays. The damage is the mean squared change of the base's predictions for the
concept's neighbours. Adaptive Guided Erasure (Bui et al., ICLR 2025) has the idea that what a concept becomes be chosen
by what it costs others; it learns a mixture of words while it erases.

Candidates are the neighbours with no more words than the concept, or the user's: "auto | a painting | a photo". Those
that the base draws almost like the concept (a kitten for a cat) would leave it, and are passed over. Where the base has
a detector of the concept, so are those of whose images some show it (a flower for a rose).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esd_jax import wording
from esd_jax.erasing import closed_form
from esd_jax.erasing.images import in_batches
from esd_jax.erasure import AUTO, Concept
from esd_jax.evaluation import testbed
from esd_jax.inputs import expanded
from esd_jax.params import Conditioning
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe
from esd_jax.runs import neighbours
from esd_jax.runs.record import read
from esd_jax.training import run_folder

SHRINKAGE = 0.01
NOISES = 2
ALIKE = 0.5  # of the candidates' median distance from the concept: what is nearer shows the concept
IMAGES, DETECTED = 16, 0.1  # of a candidate's prompt, and in what part of them the concept may be


def resolved(base: Pipeline, plan: Recipe, resume: bool = False) -> Recipe:
    """The recipe with what stands for "auto": in `replace_with` a candidate, in `preserve` the neighbours.

    Unchanged without any. resume: what was chosen before is taken, see `recorded`. Raises ValueError as `damages` does.
    """
    plan = recorded(plan) if resume else plan
    texts = [concept.text for concept in plan.concepts]

    def least(text: str, own: Sequence[str]) -> list[str]:
        ranked = [*damages(base, text, texts, own)]
        free = (one for one in ranked if own or not shows(base, one, text))  # of the user's own, any may be taken
        return [next(free, ranked[0])]

    return neighbours.without_auto(neighbours.resolved(base, plan), "replace_with", least)


def recorded(plan: Recipe) -> Recipe:
    """The recipe with what the run in its folder, or the runs there, chose for "auto".

    On another device a near tie would be decided otherwise, and the run refused as another one. Where the texts beside
    "auto" are no longer those of the run, nothing is taken from it.
    """
    if not plan.output_dir:
        return plan
    folder = expanded(plan.output_dir)
    files = [folder / "run.json"] if run_folder.is_run(folder) else sorted(folder.glob("*/run.json"))
    before = {(one.text, one.from_): one for file in files for one in read(file.parent)[0].concepts}

    def chosen(concept: Concept) -> Concept:
        former = before.get((concept.text, concept.from_), concept)
        taken: dict[str, Any] = {}
        if AUTO in concept.preserve and former.preserve and {*concept.preserve} - {AUTO} <= {*former.preserve}:
            taken["preserve"] = former.preserve
        own = {*concept.replace_with} - {AUTO}
        if AUTO in concept.replace_with and former.replace_with and (not own or {*former.replace_with} <= own):
            taken["replace_with"] = former.replace_with
        return dataclasses.replace(concept, **taken)

    return dataclasses.replace(plan, concepts=tuple(map(chosen, plan.concepts)))


def shows(base: Pipeline, text: str, concept: str) -> bool:
    """Whether images of a text show the concept, where the base has a testbed that detects it; else False."""
    if not (bed := testbed.of(base.provenance.source)):
        return False
    try:
        question = bed.question([concept], IMAGES, bed.detector_name)
    except ValueError:  # it does not know the concept
        return False
    return dataclasses.replace(question, prompts=(text,)).rate(base).value > DETECTED


def counted(plan: Recipe) -> Recipe:
    """The recipe with one text in place of "auto" and its candidates: enough to count memory and updates."""
    return neighbours.without_auto(plan, "replace_with", lambda text, own: own[-1:] or [AUTO])


def damages(
    base: Pipeline, concept: str, erased: Sequence[str] = (), candidates: Sequence[str] = ()
) -> dict[str, float]:
    """Candidates for a concept's place -> the damage of each, the least first.

    erased: all that is erased, which is neither a candidate nor damaged. candidates: the user's.

    Raises ValueError where there is no candidate that is not erased itself.
    """
    texts = [*(candidates or neighbours.nearest(base, concept, erased, names=True))]
    texts = [text for text in texts if not any(wording.same(text, one) for one in (concept, *erased))]
    if not texts:
        raise ValueError(f"replace_with='auto' finds nothing that could take the place of {concept!r}: name it")
    if not candidates:
        apart = neighbours.predicted_apart(base, concept, texts)
        texts = [text for text, far in zip(texts, apart, strict=True) if far >= ALIKE * np.median(apart)]
    kept = neighbours.nearest(base, concept, erased) or texts
    encoded = in_batches(base.encode_prompts, kept, neighbours.AT_ONCE)
    if not hasattr(encoded, "embeddings"):
        raise ValueError(f"replace_with='auto' cannot edit what {base.family.name} reads of a prompt: name it")
    read = [encoded, *(changed(encoded, edit) for edit in edits(base, concept, texts))]
    stacked = _joined(read)
    before, *after = np.split(neighbours.predictions(base, stacked, NOISES), len(read))
    damage = [float(np.mean((one - before) ** 2)) for one in after]
    return dict(sorted(zip(texts, damage, strict=True), key=lambda one: one[1]))


def edits(base: Pipeline, concept: str, candidates: Sequence[str]) -> list[Float[Array, "context context"]]:
    """E of the module's docstring, for each candidate."""
    parts = neighbours.read(base, [concept, *candidates])
    solved = []
    for text in candidates:
        pairs = [(*closed_form.aligned(part[concept], part[text], "positions"), 1.0) for part in parts]
        lam = SHRINKAGE * max(float(jnp.mean(jnp.sum(old**2, axis=1))) for old, _, _ in pairs)
        with jax.default_matmul_precision("highest"):
            solved.append(closed_form.change(closed_form.edit(pairs, lam)))
    return solved


def changed(conditioning: Any, edit: Float[Array, "context context"]) -> Conditioning:
    """What layers read of encoded prompts, times 1 + E."""
    vectors = conditioning.embeddings
    return dataclasses.replace(conditioning, embeddings=(vectors + vectors @ edit).astype(vectors.dtype))


def _joined(conditionings: Sequence[Conditioning]) -> Conditioning:
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *conditionings)
