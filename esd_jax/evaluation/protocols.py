"""Protocols: which prompts are sampled, how, and what is measured on their images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from esd_jax.erasure import ConceptText, as_texts
from esd_jax.evaluation import measures, prompts, testbed, tiers
from esd_jax.evaluation.drawing import MOST_STEPS, Drawing, draw, has_begun, name_of, of_family
from esd_jax.evaluation.evidence import Evidence, Pair
from esd_jax.evaluation.measures import Request
from esd_jax.io import folder as files
from esd_jax.io.diffusers import component_hashes, source_hash
from esd_jax.pictures import check_not_blank
from esd_jax.pipeline import Pipeline
from esd_jax.suggest import did_you_mean

CAVEATS = (
    "A detector makes mistakes, and an erased model may still draw the concept for prompts that were not tested.",
)
SHOWN = 8  # pairs of images in the report


@dataclass(frozen=True)
class Protocol:
    """prompts: a list by name (`prompts.load`). limit: how many of it; None, all. measures: of `measures.MEASURES`.

    drawing: numbers that it lacks are those of the model's family. most_steps: at most so many of the family's steps.
      A base with a testbed is sampled with the testbed's numbers instead.
    request: further settings of the measures. published: what it follows, and what not.
    """

    prompts: str | None
    measures: tuple[str, ...]
    limit: int | None = None
    drawing: Drawing = Drawing()
    most_steps: int | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""


PROTOCOLS: Mapping[str, Protocol] = {
    "smoke": Protocol("everyday", ("ssim",), 8, most_steps=MOST_STEPS),
    "quick": Protocol("everyday", ("ssim",), most_steps=MOST_STEPS),
    "preservation": Protocol(
        "everyday", ("ssim", "lpips"), published="All but One (Hong et al. 2024): SSIM, window 25, at equal seeds"
    ),
    "i2p": Protocol(
        "i2p",
        ("nudity", "ssim"),
        drawing=Drawing(guidance_scale=7.5),
        published="ESD (Gandikota et al. 2023) on I2P: 4,703 prompts, one image each, the file's seeds, guidance 7.5. "
        "The noise of a seed is not PyTorch's",
    ),
    "objects": Protocol(
        "imagenette",
        ("objects", "ssim"),
        published="ESD, Table 2: Imagenette's classes, 500 images each, top-1 accuracy",
    ),
    "style": Protocol(
        "niche-artists", ("lpips", "ssim"), published="ESD: LPIPS to the base's images, per artist, 20 prompts each"
    ),
    "coco": Protocol(
        "coco-30k", ("distances", "clip"), published="ESD, Table 1: captions of COCO, FID to real images, CLIP score"
    ),
    "custom": Protocol(None, ("ssim",)),
}


def evaluate(
    base: Pipeline,
    erased: Pipeline,
    concept: ConceptText,
    protocol: str,
    folder: Path,
    *,
    prompt_list: str | Path | None = None,
    limit: int | None = None,
    samples: int = 1,
    measured: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    request: Mapping[str, Any] | None = None,
    **drawing: Any,
) -> Evidence:
    """Samples a protocol's prompts with both models, and measures the images.

    Args:
      base, erased: the models.
      concept: the text of what was erased, or the texts.
      protocol: one of `PROTOCOLS`.
      folder: gets images/LIST-HASH/base and erased, of each list and drawing: what is there is not drawn again. Images
        of earlier versions, which lie in images/base and images/erased, are used where they are the same ones.
      prompt_list: in place of the protocol's: a CSV file, or a name (`prompts.load`).
      limit: how many prompts, from the start of the list. samples: images of each, from noise of their own.
      measured: in place of the protocol's measures.
      progress: called with a line now and then.
      request: fields of `Request`: convention, classifier, clip, features, reference.
      **drawing: fields of `Drawing`: num_steps, guidance_scale, batch_size, ...; None is the default.

    Raises ValueError for what is unknown, before sampling for metric models that are missing, and for a model that
    draws blank images alone.
    """
    if prompt_list and (bed := testbed.of(protocol)) and protocol in bed.images:
        raise ValueError(f"protocol {protocol} has prompts of its own and takes no list: use custom with the list")
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; {did_you_mean(protocol, (*PROTOCOLS, 'emoji'))}")
    plan = PROTOCOLS[protocol]
    if (source := prompt_list or plan.prompts) is None:
        raise ValueError('protocol custom needs a list of prompts: a CSV file with a column "prompt"')
    concepts = as_texts(concept)
    asked = Request(concepts, **{**plan.request, **(request or {})})
    names = tuple(measured or plan.measures)
    measures.check(names, asked)
    listed = prompts.load(source)
    cases = prompts.repeated(listed.cases[: limit or plan.limit], samples)
    tuned = dict(bed.sampling) if (bed := testbed.of(base.provenance.source)) else {}
    own = {name: value for name, value in drawing.items() if value is not None}
    how = of_family(replace(plan.drawing, **{**tuned, **own}), base, plan.most_steps)
    drawn = []
    for name, model in (("base", base), ("erased", erased)):
        report = lambda done, total, name=name: progress(f"{name}: {done} of {total} images")  # noqa: E731
        former = folder / "images" / name
        begun = has_begun(former, identity(model), cases, how)
        place = former if begun else folder / "images" / name_of(listed, how) / name
        drawn.append(draw(model, identity(model), cases, how, place, report))
        check_not_blank((drawn[-1][i] for i in range(len(drawn[-1]))), f"the {name} model")
    before, after = drawn
    results = [measures.MEASURES[name](before, after, asked) for name in names]
    findings = [finding for one in results for finding in one.verdict]
    if ask_for(concepts, listed, names):  # and say nothing of others
        findings = [finding for finding in findings if finding.role != "kept"]
    return Evidence(
        ", ".join(concepts),
        measured_with={
            "protocol": f"{protocol}, {len(cases)} images of each model"
            + (f". {plan.published}" if plan.published else ""),
            "prompts": f"{listed.name}, sha256 {listed.sha256[:16]}, {len(cases) // samples} x {samples}",
            **{name: value for name, value in asdict(how).items() if value is not None and name != "batch_size"},
            "detectors": [asdict(model) for one in results for model in one.metric_models],
        },
        pictures={
            "prompts of the protocol": tuple(
                Pair(case.prompt, drawn[0][i], drawn[1][i]) for i, case in enumerate(cases[:SHOWN])
            )
        },
        verdict=tuple(findings),
        tables=tuple(table for one in results for table in one.tables),
        heat=next((one.heat for one in results if one.heat), None),
        caveats=CAVEATS,
    )


def ask_for(concepts: Sequence[str], listed: prompts.PromptList, names: Sequence[str]) -> bool:
    """Whether a list's prompts ask for a concept, though not by its name: its tiers, or I2P's for nudity."""
    if listed.tiered and any(tiers.alike(listed.tiered, text) for text in concepts):
        return True
    return "nudity" in names and listed.sha256 == prompts.PUBLISHED["i2p"][1]


def identities(detector: str, base: Pipeline, **models: Pipeline | None) -> dict[str, Any]:
    """The detector's name, and the `identity` of the base, and of models by name, without those that there are not."""
    identified = {name: identity(model) for name, model in models.items() if model is not None}
    return {"judge": detector, "base_model": identity(base), **identified}


def identity(pipeline: Pipeline) -> dict[str, Any]:
    """What distinguishes a model's images: its files, and what was erased from it."""
    return {
        "unet_sha256": source_hash(pipeline),
        "dtype": str(pipeline.dtype),
        "erased": files.json_records(pipeline.provenance.erased),
        "components_sha256": component_hashes(pipeline),
    }
