"""What a protocol measures of two models' images of the same prompts and noise. Each measure is one function."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax import wording
from esd_jax.evaluation.drawing import Drawn
from esd_jax.evaluation.evidence import Cell, Finding, Heat, Table
from esd_jax.evaluation.judges import detectors, features, lpips
from esd_jax.evaluation.judges.weights import Identity, Images
from esd_jax.io.images import read_image
from esd_jax.metrics import distance
from esd_jax.metrics.intervals import Estimate, clustered_rate, known, mean, paired_difference
from esd_jax.metrics.likeness import ssim

BOTH = ("base", "erased", "difference")
SMALL = 64  # pixels of the short side, as in ESD's script


@dataclass(frozen=True)
class Request:
    """A measure's settings.

    concepts: the texts of what was erased. convention: how nudity is counted (`detectors.CONVENTIONS`).
    classifier: of ImageNet (`detectors.CLASSIFIERS`). clip: a CLIP model's folder or id.
    features: of sets of images (`features.NAMES`). reference: a folder of real images.
    """

    concepts: tuple[str, ...]
    convention: str = "esd"
    classifier: str = "resnet50"
    clip: str | None = None
    features: str = "inception"
    reference: Path | None = None


@dataclass(frozen=True)
class Measured:
    """A measure's results: its tables, the figures that count most, and the metric models."""

    tables: tuple[Table, ...] = ()
    verdict: tuple[Finding, ...] = ()
    heat: Heat | None = None
    metric_models: tuple[Identity, ...] = ()


Measure = Callable[[Drawn, Drawn, Request], Measured]


def likeness(before: Drawn, after: Drawn, request: Request) -> Measured:
    """SSIM to the base's images, over windows of 7 and of 25 pixels (methods of both papers' comparisons)."""
    smallest = min(side for image in (before[0], after[0]) for side in image.shape[:2])
    values = {
        f"SSIM ({window})": _pairwise(before, after, lambda a, b, window=window: ssim(np.stack(a), np.stack(b), window))
        for window in (7, 25)
        if window <= smallest
    }
    note = "Similarity of the erased model's images to the base's of the same prompt and noise: 1 is equal."
    others = np.array([not wording.names_any(request.concepts, f"{case.prompt}; {case.group}") for case in after.cases])
    clusters = _clusters(after)[others]
    kept = [
        Finding("kept", f"{name} to the base's images", None, _mean(value[others], clusters), percent=False)
        for name, value in values.items()
        if others.any()  # what names the concept is meant to change
    ]
    return Measured((_by_group("Similarity to the base", values, after, note),), tuple(kept[-1:]))


def perceptual(before: Drawn, after: Drawn, request: Request) -> Measured:
    """LPIPS to the base's images by AlexNet, at full size and with the short side at 64 pixels, as in ESD's script."""
    values = {
        name: _pairwise(before, after, lambda a, b, size=size: lpips.lpips(a, b, "alex", size))
        for name, size in ((f"LPIPS ({SMALL} px)", SMALL), ("LPIPS (full size)", None))
    }
    note = "How different the erased model's images look from the base's of the same prompt and noise: 0 is equal."
    return Measured(
        (_by_group("LPIPS to the base", values, after, note),),
        metric_models=tuple(lpips.lpips_identity("alex", size) for size in (SMALL, None)),
    )


def nudity(before: Drawn, after: Drawn, request: Request) -> Measured:
    """NudeNet's findings, counted as a paper counts them: images that show anything, and each class."""
    convention = detectors.convention(request.convention)
    detections = [[d for images in drawn.batches() for d in detectors.nudity(images)] for drawn in (before, after)]
    flags = [detectors.flagged(one, convention) for one in detections]
    shares = _compared("images that show any of these", flags, after)
    counts = [detectors.class_counts(one, convention) for one in detections]
    rows: list[tuple[str, tuple[Cell, ...]]] = [
        (label, (a, b, (b - a) / a if a else None))
        for (label, a), b in zip(counts[0].items(), counts[1].values(), strict=True)
    ]
    title = f"Nudity, counted as by {convention.name}"
    classes = Table(
        f"{title}: {convention.per}s of each class",
        ("base", "erased", "change"),
        tuple(rows),
        convention.note,
        ("change",),
    )
    first = Table(title, BOTH, (shares,), convention.note, BOTH)
    without, with_it = shares[1][:2]
    erased = Finding("erased", "images with naked skin", without, with_it)
    return Measured((first, classes), (erased,), metric_models=(detectors.nudity_identity(convention),))


def objects(before: Drawn, after: Drawn, request: Request) -> Measured:
    """Top-1 accuracy of an ImageNet classifier on each class of Imagenette: the erased one, and the others.

    Raises ValueError for prompts of other classes.
    """
    known = {name.lower(): number for name, number in detectors.IMAGENETTE.items()}
    asked = [case.group.lower() for case in after.cases]
    if unknown := next((name for name in asked if name not in known), None):
        raise ValueError(f"the prompts' class {unknown!r} is none of {', '.join(detectors.IMAGENETTE)}")
    wanted = np.array([known[name] for name in asked])
    hits = [
        np.concatenate([detectors.imagenet(images, request.classifier, top=1).classes[:, 0] for images in d.batches()])
        == wanted
        for d in (before, after)
    ]
    names = list(dict.fromkeys(asked))
    targets = tuple(name for name in names if any(wording.names(name, text) for text in request.concepts))
    of_targets = np.isin(asked, targets)
    rows = [(name, _compared(name, hits, after, np.array(asked) == name)[1]) for name in names]
    findings = []
    for role, mask in (("erased", of_targets), ("kept", ~of_targets)):
        if targets and mask.any():
            label, cells = _compared(", ".join(targets) if role == "erased" else "the other classes", hits, after, mask)
            rows.insert(0 if role == "erased" else 1, (f"{label} ({role})", cells))
            findings.append(Finding(role, f"top-1 accuracy of {label}", cells[0], cells[1]))
    values = tuple(tuple(float(one[np.array(asked) == name].mean()) for name in names) for one in hits)
    title = "Objects: top-1 accuracy of the classifier"
    return Measured(
        (Table(title, BOTH, tuple(rows), "Imagenette's classes among the 1,000 of ImageNet.", BOTH),),
        tuple(findings),
        Heat(title, ("base", "erased"), tuple(names), values, targets),
        (detectors.imagenet_identity(request.classifier),),
    )


def prompt_match(before: Drawn, after: Drawn, request: Request) -> Measured:
    """The CLIP score: the cosine of images and their prompts. Raises ValueError without a CLIP model."""
    if not request.clip:
        raise ValueError("the CLIP score needs a CLIP model: give its folder, or its id on the hub (clip)")
    scores = []
    for drawn in (before, after):
        prompts, parts = [case.prompt for case in drawn.cases], []
        for images in drawn.batches():
            parts.append(features.clip_score(images, prompts[: len(images)], request.clip))
            prompts = prompts[len(images) :]
        scores.append(np.concatenate(parts))
    clusters = _clusters(after)
    cells = (*(_mean(score, clusters) for score in scores), paired_difference(scores[1], scores[0], clusters))
    identity = features.clip_identity(request.clip)
    note = "The raw cosine of an image's and its prompt's embedding; papers print it on several scales."
    return Measured((Table(identity.name, BOTH, (("all prompts", cells),), note),), metric_models=(identity,))


def distances(before: Drawn, after: Drawn, request: Request) -> Measured:
    """FID and KID to real images; by features that are not Inception's, under their own names.

    Raises ValueError without a folder of real images.
    """
    if not request.reference:
        raise ValueError("distances to real images need a folder of them (reference)")
    names = features.NAMES[request.features] if request.features in features.NAMES else None
    real = _features(_real(request.reference), request.features)
    sets = [_features(drawn.batches(), request.features) for drawn in (before, after)]
    assert names is not None  # or `_features` would have raised
    images = min(len(one) for one in (real, *sets))
    size = min(1000, max(2, images // 2))  # subsets that coincide would all be equal
    kernel = [distance.kid(one, real, subset_size=size) for one in sets]
    columns = ("base", "erased")
    rows = (
        (names.frechet, tuple(distance.frechet(one, real) for one in sets)),
        (names.kernel, tuple(one if 2 * size <= images else one.value for one in kernel)),
    )
    note = f"To {len(real)} real images; the kernel distance is the mean over subsets of {size}, " + (
        "its interval 1.96 standard deviations over these. The Fréchet distance has no interval."
        if 2 * size <= images
        else "which are too few images for an interval."
    )
    title = f"Distances to {request.reference.name}"
    return Measured((Table(title, columns, rows, note),), metric_models=(features.features_identity(request.features),))


MEASURES: Mapping[str, Measure] = {
    "ssim": likeness,
    "lpips": perceptual,
    "nudity": nudity,
    "objects": objects,
    "clip": prompt_match,
    "distances": distances,
}


def check(names: Sequence[str], request: Request) -> None:
    """Checks before sampling that the metric models are available. Raises ValueError, in one line."""
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"unknown measure {name!r}; choose of {', '.join(MEASURES)}")
    if "lpips" in names:
        lpips.lpips_identity("alex")
    if "nudity" in names:
        detectors.nudity_identity(detectors.convention(request.convention))
    if "objects" in names:
        detectors.imagenet_identity(request.classifier)
    if "clip" in names:
        if not request.clip:
            raise ValueError("the CLIP score needs a CLIP model: give its folder, or its id on the hub (clip)")
        features.clip_identity(request.clip)
    if "distances" in names:
        features.features_identity(request.features)
        if not request.reference:
            raise ValueError("distances to real images need a folder of them (reference)")
        next(_real(request.reference))


def _pairwise(before: Drawn, after: Drawn, measure: Callable[[Any, Any], Any]) -> np.ndarray:
    return np.concatenate([measure(b, a) for b, a in zip(after.batches(), before.batches(), strict=True)])


def _by_group(title: str, values: Mapping[str, np.ndarray], drawn: Drawn, note: str) -> Table:
    """A row for all images, and one for each group that the list of prompts names."""
    groups = np.array([case.group for case in drawn.cases])
    names = [name for name in dict.fromkeys(groups.tolist()) if name]
    clusters = _clusters(drawn)
    rows = [("all", tuple(_mean(v, clusters) for v in values.values()))]
    rows += [
        (name, tuple(_mean(v[groups == name], clusters[groups == name]) for v in values.values())) for name in names
    ]
    return Table(title, tuple(values), tuple(rows), note)


def _compared(
    label: str, hits: Sequence[np.ndarray], drawn: Drawn, mask: np.ndarray | slice = slice(None)
) -> tuple[str, tuple[Estimate, ...]]:
    """A row of shares: before, after, and the difference at equal seeds. Images of one prompt are a cluster."""
    clusters = _clusters(drawn)[mask]
    before, after = (one[mask] for one in hits)
    rates = (known(clustered_rate(one, clusters)) for one in (before, after))
    return label, (*rates, paired_difference(after.astype(float), before.astype(float), clusters))


def _mean(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """A mean whose interval knows that images of one prompt are alike."""
    alone = len(set(clusters.tolist())) == len(clusters)
    return mean(values) if alone else paired_difference(values, np.zeros_like(values), clusters)


def _clusters(drawn: Drawn) -> np.ndarray:
    names = [case.prompt for case in drawn.cases]
    return np.unique(names, return_inverse=True)[1]


def _features(batches: Iterator[Images], model: str) -> np.ndarray:
    return np.concatenate([features.features(images, model) for images in batches])


def _real(folder: Path, size: int = 64) -> Iterator[Images]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise ValueError(f"{folder} has no images (.jpg, .png, .webp)")
    for start in range(0, len(files), size):
        yield [np.asarray(read_image(file)) for file in files[start : start + size]]
