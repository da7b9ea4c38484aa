"""The protocol of the embedded model: its probe classifies images of groups of prompts around the target."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from esd_jax.demo import groups, probe, table, vocabulary
from esd_jax.demo.gallery import GUIDANCE, NUM_STEPS, Gallery
from esd_jax.demo.groups import Shot, Target
from esd_jax.demo.measure import BASE, ERASED, PLACEBO, SEED, GroupRows, Row, measure
from esd_jax.evaluation.evidence import Evidence, Finding, Heat, Pair, Table
from esd_jax.evaluation.gather import Metric
from esd_jax.evaluation.report.terms import CONCEPTS, term
from esd_jax.evaluation.seen import Question, detector
from esd_jax.metrics.intervals import Estimate, known
from esd_jax.pipeline import Pipeline

COLUMNS = {**table.MEASURES, "ssim": "SSIM (7)", "ssim25": "SSIM (25)"}
PERCENT = ("target", "subject", "style", "unrecognised")
CAVEATS = (
    "The model is a small one that draws emoji. Its detector is a classifier, which makes mistakes.",
    "An erased model may still draw the concept for prompts that were not tested.",
)
NOTE = (
    "Detection rate: share of images in which the probe finds the target. Accuracy: the probe recognises the object "
    "(or category), or the style, that the prompt asks for. Unrecognised: the probe recognises nothing; such an image "
    "counts as showing nothing. SSIM: similarity to the base's image of the same prompt and noise, over windows of 7 "
    "and of 25 pixels; 1 is equal. A group is all prompts of its kind: the intervals are for these prompts and other "
    "seeds. "
)


def evaluate(
    models: Mapping[str, Pipeline],
    target: Target,
    *,
    num_images: int,
    seed: int = 1,
    control_share: float = 1.0,
    batch_size: int = 32,
    galleries: dict[str, Gallery] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Evidence:
    """Samples and classifies the groups of a target.

    Args:
      models: `BASE` and `ERASED`, and `PLACEBO` if there is one.
      target: what was erased.
      num_images: of each group and model; see `measure` for this and the other arguments.
      galleries: model -> its images so far; they are added to.
    """
    galleries = {} if galleries is None else galleries
    wanted = {title: [Shot(prompt, seed) for prompt in prompts] for title, prompts in groups.examples(target)}
    measured = measure(
        models,
        groups.groups(target),
        target,
        num_images=num_images,
        seed=seed,
        other_seed=PLACEBO in models,
        control_share=control_share,
        galleries=galleries,
        also=list(dict.fromkeys(shot for shots in wanted.values() for shot in shots)),
        batch_size=batch_size,
        progress=progress,
    )
    before, after = galleries[BASE], galleries[ERASED]
    return Evidence(
        target.concept,
        measured_with={
            "protocol": f"emoji, {num_images} images of each group (a quarter or half of the smaller groups)",
            "sampler": f"the checkpoint's own, {NUM_STEPS} steps, guidance scale {GUIDANCE:g}",
            "seed": seed,
            "detector": f"the embedded probe, sha256 {probe.sha256()[:16]}; it rejects what it does not recognise",
        },
        pictures={
            title: tuple(Pair(shot.prompt, before[shot].image, after[shot].image) for shot in shots)
            for title, shots in wanted.items()
        },
        verdict=verdict(measured, target),
        tables=(as_table(measured, target),),
        heat=heat(measured, target),
        caveats=CAVEATS,
    )


def as_table(measured: Sequence[GroupRows], target: Target) -> Table:
    """The groups as the report shows them."""
    headings = {**COLUMNS, "target": f"{target.label} detection rate"}
    rows: list[tuple[str, tuple[Any, ...]]] = []
    for group in measured:
        rows.append((group.title, ()))
        rows += [(term(row.model), (row.n, *(getattr(row, measure) for measure in headings))) for row in group.rows]
    shares = tuple(headings[measure] for measure in PERCENT)
    controls = table.NOTES[1] if any(row.model == PLACEBO for group in measured for row in group.rows) else ""
    title = "Target, related and unrelated concepts"
    return Table(title, ("images", *headings.values()), tuple(rows), (NOTE + controls).strip(), shares)


def verdict(measured: Sequence[GroupRows], target: Target) -> tuple[Finding, ...]:
    """What was erased, and the retention of everything else: of object and style, the one that drops more."""
    rows = {(group.name, row.model): row for group in measured for row in group.rows}
    findings = [
        Finding("erased", f"{target.label} detection rate on {prompts}", rows[name, BASE].target, known(after.target))
        for name, prompts in (("own", "target prompts"), ("implicit", "implicit prompts"))
        if (after := rows.get((name, ERASED)))
    ]
    for name, concepts in CONCEPTS.items():
        if (name, ERASED) in rows:
            before, after = rows[name, BASE], rows[name, ERASED]
            parts = [p for p in ("subject", "style") if getattr(before, p) is not None]
            part = min(parts, key=lambda p: getattr(after, p).value - getattr(before, p).value)
            seed = rows.get((name, SEED))
            pair = (getattr(before, part), getattr(after, part), seed and getattr(seed, part))
            findings.append(Finding("kept", f"{concepts}: {'object' if part == 'subject' else part} accuracy", *pair))
    return tuple(findings)


def question(target: Target, num_images: int, by: str = "probe") -> Question:
    """Whether a `detector` finds the target in images of its prompts, other images than those of `evaluate`."""
    (own,) = (group for group in groups.groups(target) if group.name == "own")
    asked = tuple(ask.prompt for ask, _ in groups.shots(own, num_images, 0))
    detect, named = detector(by, target.concepts)
    return Question(asked, detect, named, num_images=num_images, num_steps=NUM_STEPS, guidance_scale=GUIDANCE)


def metric(target: Target, num_images: int, seed: int = 1) -> Metric:
    """A model -> (the target's detection rate on target prompts, the accuracy on the others, 0 to 1).

    Where a long list leaves no others, the accuracy is that on what is left: related concepts, or unrelated ones.
    """
    named = {group.name: group for group in groups.groups(target)}
    wanted = [named["own"], next(named[name] for name in ("others", "nearest", "unrelated") if name in named)]

    def measured(model: Pipeline) -> tuple[Estimate, Estimate]:
        own, others = measure({BASE: model}, wanted, target, num_images=num_images, seed=seed, other_seed=False)
        kept = (getattr(others.rows[0], part) for part in ("subject", "style"))
        return known(own.rows[0].target), min((part for part in kept if part is not None), key=lambda part: part.value)

    return measured


def heat(measured: Sequence[GroupRows], target: Target) -> Heat:
    """The accuracy on each style, or each object, of the base and of the erased model."""
    counts: dict[str, dict[str, tuple[int, int]]] = {BASE: {}, ERASED: {}}
    for group in measured:
        if group.name not in ("own", "nearest", "others"):
            continue
        for row in group.rows:
            if row.model in counts:
                _add(counts[row.model], row, target)
    names = list(counts[BASE])
    values = tuple(tuple(counts[model][name][0] / counts[model][name][1] for name in names) for model in counts)
    title = f"Accuracy on each {target.kind}"
    # Few images are of some of many targets alone.
    return Heat(title, tuple(counts), tuple(names), values, tuple(name for name in target.names if name in names))


def _add(counts: dict[str, tuple[int, int]], row: Row, target: Target) -> None:
    known = vocabulary.styles() if target.kind == "style" else vocabulary.objects()
    for name, (hits, n) in row.seen.items():
        if name in known:
            old_hits, old_n = counts.get(name, (0, 0))
            counts[name] = old_hits + hits, old_n + n
