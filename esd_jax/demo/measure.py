"""What an erasure removed and what it retained: rates by the probe with 95% intervals, and similarity to the base.

Every model samples the same prompts from the same noise, so that rows differ by the model alone, except the row "seed":
the base model from other noise, which shows what chance does.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from esd_jax import progress as tasks
from esd_jax.demo.gallery import Gallery, Shown, draw
from esd_jax.demo.groups import Ask, Group, Shot, Target, shots
from esd_jax.evaluation.report.terms import term
from esd_jax.metrics.intervals import Estimate, known, mean, rate
from esd_jax.metrics.likeness import ssim
from esd_jax.pictures import check_not_blank
from esd_jax.pipeline import Pipeline

BASE, ERASED, PLACEBO, SEED = "base", "erased", "sham", "seed"  # keys of rows, also in files


@dataclass(frozen=True)
class Row:
    """One model's images of one group. An estimate is None where the prompts ask for nothing that it measures.

    target: the target's detection rate. subject, style: accuracy of the object (or, where none is named, of the
    category) and of the style that the prompt asks for; not measured where it asks for the target itself.
    unrecognised: share of images in which the probe recognises nothing; such images count as showing nothing.
    ssim, ssim25: to the base's image of the same prompt (and, but for the row "seed", of the same noise), over windows
      of 7 and of 25 pixels.
    seen: each class that was asked for -> (detections, images).
    """

    model: str
    n: int
    target: Estimate | None
    subject: Estimate | None
    style: Estimate | None
    unrecognised: Estimate
    ssim: Estimate | None
    ssim25: Estimate | None
    seen: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class GroupRows:
    """A group's table: a row for each model."""

    name: str
    title: str
    rows: tuple[Row, ...]


def measure(
    models: Mapping[str, Pipeline],
    groups: Sequence[Group],
    target: Target | None,
    *,
    num_images: int,
    seed: int = 1,
    other_seed: bool = True,
    control_share: float = 1.0,
    galleries: dict[str, Gallery] | None = None,
    also: Iterable[Shot] = (),
    batch_size: int = 32,
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    progress: Callable[[str], None] = lambda _: None,
) -> list[GroupRows]:
    """Samples every group with every model and classifies the images.

    Args:
      models: row name -> model; `BASE` is what the others are compared with.
      groups: see `groups.groups`.
      target: what was erased; None measures only retention.
      num_images: per group and model; a group's `share` may lower it.
      seed: of the noise.
      other_seed: add the row `SEED`.
      control_share: of a group's images, how many the rows `PLACEBO` and `SEED` are measured on.
      galleries: row name -> that model's images so far. They are added to, so that several calls share images.
      also: further images to sample in the same batches; they end in `galleries`.
      options: row name -> further arguments of `sample`, for guidance that erases without training.
      progress: called with a line after each model's images.

    Raises ValueError for a model all of whose images are blank.
    """
    if num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1")
    galleries = {} if galleries is None else galleries
    sizes = [group.size(num_images) for group in groups]
    fewer = [max(1, round(control_share * size)) for size in sizes]
    asked = [shots(group, size, seed) for group, size in zip(groups, sizes, strict=True)]
    controls = [drawn[:size] for drawn, size in zip(asked, fewer, strict=True)]
    others = [shots(group, size if other_seed else 0, seed + 1) for group, size in zip(groups, fewer, strict=True)]
    with tasks.task("measuring", len(models), unit="models", start="compiling, once") as task:
        for name, pipeline in models.items():
            mine = controls if name == PLACEBO else [*asked, *others] if name == BASE else asked
            wanted = [shot for group in mine for _, shot in group]
            started = time.monotonic()
            drawn = draw(
                pipeline, [*wanted, *also], galleries.setdefault(name, Gallery()), batch_size, **options.get(name, {})
            )
            check_not_blank((galleries[name][shot].image for shot in wanted), f"model {term(name)!r}")
            progress(f"{term(name)}: {drawn} images in {time.monotonic() - started:.0f} s")
            task.advance()
    tables = []
    for i, group in enumerate(groups):
        asks = [ask for ask, _ in asked[i]]
        base = [galleries[BASE][shot] for _, shot in asked[i]]
        columns = {
            name: [galleries[name][shot] for _, shot in (controls if name == PLACEBO else asked)[i]] for name in models
        }
        if other_seed:
            columns[SEED] = [galleries[BASE][shot] for _, shot in others[i]]
        rows = (
            row_of(name, asks[: len(shown)], shown, None if name == BASE else base[: len(shown)], target)
            for name, shown in columns.items()
        )
        tables.append(GroupRows(group.name, group.title, tuple(rows)))
    return tables


def row_of(
    model: str, asks: Sequence[Ask], shown: Sequence[Shown], base: Sequence[Shown] | None, target: Target | None
) -> Row:
    """One model's row, of what was asked for, its images, and the base's images in the same order."""
    recognised: dict[str, list[bool]] = {}
    kept: dict[str, list[bool]] = {"subject": [], "style": []}
    for ask, image in zip(asks, shown, strict=True):
        for part, kind in (("subject", "object"), ("subject", "category"), ("style", "style")):
            if (wanted := getattr(ask, kind)) is not None:
                hit = getattr(image, kind) == wanted
                recognised.setdefault(wanted, []).append(hit)
                if target is None or kind != target.kind or wanted not in target.names:
                    kept[part].append(hit)
    targets = [getattr(image, target.kind) in target.names for image in shown] if target else []
    likeness = {7: None, 25: None}
    if base is not None:
        pair = [np.stack([s.image for s in side]) for side in (shown, base)]
        likeness = {window: mean(ssim(*pair, window=window)) for window in likeness}
    return Row(
        model,
        len(shown),
        rate(targets),
        rate(kept["subject"]),
        rate(kept["style"]),
        known(rate([image.object is None for image in shown])),
        *likeness.values(),
        seen={name: (sum(hits), len(hits)) for name, hits in recognised.items()},
    )
