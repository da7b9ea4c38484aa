"""Before and after: an erased model's and its base's images of the same prompts at equal seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esd_jax import progress, several
from esd_jax.demo.picture import Column, before_after
from esd_jax.erasure import Erasure, texts_of
from esd_jax.evaluation import store, testbed
from esd_jax.evaluation.drawing import MOST_STEPS, Drawing, of_family, sampled
from esd_jax.evaluation.evidence import Evidence, Pair
from esd_jax.io.exact import unmodified
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample

PICTURE = "before_after.png"
PART = "examples"  # of the evidence of an erasure
MOST = 6  # prompts, of a model without a testbed
SEED = 1


def draw(erased: Pipeline) -> Evidence:
    """The base's and the erased model's images of a few prompts, at equal seeds.

    The prompts are the testbed's where the base has one that knows the concepts; else those of the recipe's previews,
    in which {} stands for the concept.
    """
    records = erased.provenance.erased
    record, concepts = (records[-1] if records else Erasure()), texts_of(records)
    base, bed, recipe = unmodified(erased), testbed.of(erased.provenance.source), record.recipe or {}
    groups = prompts_of(erased.provenance.source, concepts, recipe)
    own = of_family(Drawing(batch_size=1), erased, MOST_STEPS)
    how: Mapping[str, Any] = sampled(bed.sampling) if bed else _sampling(recipe, own)
    prompts = [prompt for _, texts in groups for prompt in texts]
    images = []
    with progress.task("before and after", 2 * len(prompts), unit="images", start="compiling, once") as task:
        for model in (base, erased):
            images.append(sample(model, prompts, seed=SEED, sampler="auto", **sampled(how)))
            task.advance(len(prompts))
    pairs = iter([Pair(*row) for row in zip(prompts, *images, strict=True)])
    return Evidence(
        ", ".join(concepts),
        record,
        measured_with={"examples": f"{len(prompts)} prompts at equal seeds ({SEED})", **how},
        pictures={title: tuple(next(pairs) for _ in texts) for title, texts in groups},
    )


def doubt(base: Pipeline, concepts: Sequence[str]) -> str:
    """Why a base may not draw some concepts at all, or "": a word that its testbed does not know may be misspelt.

    Of other models nobody knows: how far a concept's prediction is from the empty prompt's does not tell, since a word
    without a meaning moves it as far.
    """
    return unknown(base.provenance.source, concepts)


def unknown(source: str, concepts: Sequence[str]) -> str:
    """The same of a base that is not loaded."""
    bed = testbed.of(source)
    try:
        if bed and concepts:
            bed.detector(concepts)
    except ValueError as error:
        return str(error)
    return ""


def prompts_of(source: str, concepts: Sequence[str], recipe: Mapping[str, Any]) -> Sequence[tuple[str, Sequence[str]]]:
    """Titled groups of prompts that show an erasure: those of the base's testbed, or of the recipe's previews."""
    bed = testbed.of(source)
    return (bed.examples(concepts) if bed else None) or _previewed(recipe, concepts)


def write(examples: Evidence, picture: Path, evidence: Path) -> Path:
    """Writes the examples as one picture, and stores them with the evaluation results. Returns the picture."""
    save(examples, picture)
    store.save(examples, evidence, PART)
    return picture


def save(evidence: Evidence, picture: Path) -> None:
    """Writes the example pictures of an erasure as one, before above after."""
    columns = [
        (title, [Column(pair.prompt, pair.before, pair.after) for pair in pairs])
        for title, pairs in evidence.pictures.items()
    ]
    before_after(columns).save(picture)


def _previewed(recipe: Mapping[str, Any], concepts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The prompts of a recipe's previews: those that hold the concept, and the others."""
    templates = several.parts("preview_prompts", recipe.get("preview_prompts")) or ("{}",)
    own = several.filled([text for text in templates if "{}" in text] or ["{}"], concepts)[:MOST]
    others = [text for text in templates if "{}" not in text and text not in own][: MOST - len(own)]
    titled = [(f"erased: {', '.join(concepts)}", list(own)), ("others", others)]
    return [(title, texts) for title, texts in titled if texts]


def _sampling(recipe: Mapping[str, Any], own: Drawing) -> dict[str, Any]:
    """Of the recipe's previews, and what it does not say."""
    drawn_by = {"steps": own.num_steps, "guidance_scale": own.guidance_scale, "batch_size": own.batch_size}
    settings = {
        "steps": recipe.get("preview_steps"),
        "guidance_scale": recipe.get("preview_guidance"),
        "height": recipe.get("height"),
        "width": recipe.get("width"),
    }
    return drawn_by | {name: value for name, value in settings.items() if value is not None}
