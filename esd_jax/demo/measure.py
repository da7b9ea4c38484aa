"""What an erasure removed and what it kept: rates by the probe with 95% intervals, and likeness to the base's images.

Every model draws the same prompts from the same noise, so that rows differ by the model alone, except the row "seed":
the base model from other noise, which shows what chance does.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from esd_jax.demo.gallery import Gallery, Shown, draw
from esd_jax.demo.groups import Ask, Group, Shot, Target, shots
from esd_jax.pipeline import Pipeline

BASE, ERASED, SHAM, SEED = "base", "erased", "sham", "seed"  # names of rows
Z = 1.959964  # the normal distribution holds 95% within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A mean over n images and its 95% interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Row:
    """One model's images of one group. An estimate is None where nothing was asked that it could judge.

    target: share in which the target is seen. subject, style: share in which the object (or, where none is named, the
    category) and the style that the prompt asks for are seen; not judged where the target itself is asked for.
    unrecognised: share in which the probe recognises nothing; such images count as showing nothing.
    ssim, ssim25: to the base's image of the same prompt (and, but for the row "seed", of the same noise), over windows
      of 7 and of 25 pixels.
    seen: all that was asked for -> how often it was seen, and of how many images.
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
class Judged:
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
) -> list[Judged]:
    """Draws every group with every model and judges the images.

    Args:
      models: row name -> model; `BASE` is what the others are compared with.
      groups: see `groups.groups`.
      target: what was erased; None judges only what is kept.
      num_images: per group and model; a group's `share` may lower it.
      seed: of the noise.
      other_seed: add the row `SEED`.
      control_share: of a group's images, how many the rows `SHAM` and `SEED` are measured on.
      galleries: row name -> what that model has drawn already. It is added to, so that several calls share images.
      also: further images to draw in the same batches; they end in `galleries`.
      options: row name -> further arguments of `sample`, for guidance that erases without training.
      progress: is told of each model once it is drawn.
    """
    if num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1")
    galleries = {} if galleries is None else galleries
    sizes = [group.size(num_images) for group in groups]
    fewer = [max(1, round(control_share * size)) for size in sizes]
    asked = [shots(group, size, seed) for group, size in zip(groups, sizes, strict=True)]
    controls = [drawn[:size] for drawn, size in zip(asked, fewer, strict=True)]
    others = [shots(group, size if other_seed else 0, seed + 1) for group, size in zip(groups, fewer, strict=True)]
    for name, pipeline in models.items():
        mine = controls if name == SHAM else [*asked, *others] if name == BASE else asked
        wanted = [shot for group in mine for _, shot in group]
        started = time.monotonic()
        drawn = draw(
            pipeline, [*wanted, *also], galleries.setdefault(name, Gallery()), batch_size, **options.get(name, {})
        )
        progress(f"{name}: {drawn} images in {time.monotonic() - started:.0f} s")
    judged = []
    for i, group in enumerate(groups):
        asks = [ask for ask, _ in asked[i]]
        base = [galleries[BASE][shot] for _, shot in asked[i]]
        columns = {
            name: [galleries[name][shot] for _, shot in (controls if name == SHAM else asked)[i]] for name in models
        }
        if other_seed:
            columns[SEED] = [galleries[BASE][shot] for _, shot in others[i]]
        rows = (
            judge(name, asks[: len(shown)], shown, None if name == BASE else base[: len(shown)], target)
            for name, shown in columns.items()
        )
        judged.append(Judged(group.name, group.title, tuple(rows)))
    return judged


def judge(
    model: str, asks: Sequence[Ask], shown: Sequence[Shown], base: Sequence[Shown] | None, target: Target | None
) -> Row:
    """One model's row: what was asked, what is seen, and the base's images in the same order."""
    seen: dict[str, list[bool]] = {}
    kept: dict[str, list[bool]] = {"subject": [], "style": []}
    for ask, image in zip(asks, shown, strict=True):
        for part, kind in (("subject", "object"), ("subject", "category"), ("style", "style")):
            if (wanted := getattr(ask, kind)) is not None:
                hit = getattr(image, kind) == wanted
                seen.setdefault(wanted, []).append(hit)
                if target is None or kind != target.kind or wanted not in target.names:
                    kept[part].append(hit)
    targets = [getattr(image, target.kind) in target.names for image in shown] if target else []
    likeness = {7: None, 25: None}
    if base is not None:
        pair = [np.stack([s.image for s in side]) for side in (shown, base)]
        likeness = {window: mean(ssim(*pair, window)) for window in likeness}
    return Row(
        model,
        len(shown),
        rate(targets),
        rate(kept["subject"]),
        rate(kept["style"]),
        rate([image.object is None for image in shown]),
        *likeness.values(),
        {name: (sum(hits), len(hits)) for name, hits in seen.items()},
    )


def rate(hits: Sequence[bool]) -> Estimate | None:
    """The share of hits, with Wilson's interval; None of nothing."""
    return Estimate(sum(hits) / len(hits), *wilson(sum(hits), len(hits)), len(hits)) if hits else None


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): unlike hits/n +- 1.96 sd, it also holds at shares of 0 and 1."""
    share, z2 = hits / n, Z * Z
    middle = share + z2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Rounding leaves about 1e-17 where the bound is 0 or 1.
    low = 0.0 if hits == 0 else (middle - half) / (1 + z2 / n)
    return low, 1.0 if hits == n else (middle + half) / (1 + z2 / n)


def mean(values: Float[np.ndarray, " n"]) -> Estimate:
    """A mean with its normal 95% interval; of a single value the interval is all that SSIM can be, -1 to 1."""
    value, n = float(np.mean(values)), len(values)
    half = Z * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(value, max(value - half, -1.0), min(value + half, 1.0), n)


def ssim(
    a: UInt8[np.ndarray, "n height width 3"], b: UInt8[np.ndarray, "n height width 3"], window: int = 7
) -> Float[np.ndarray, " n"]:
    """Structural similarity of image pairs: 1 is equal (Wang et al. 2004, eq. 13).

    Uniform square windows that lie within the image, unbiased variances, K = 0.01 and 0.03; the mean over windows and
    the three channels, so that a change of colour at equal brightness counts.
    """
    return np.asarray(_ssim(a, b, window), np.float64)


@partial(jax.jit, static_argnums=2)
def _ssim(a: jax.Array, b: jax.Array, window: int) -> jax.Array:
    c1, c2 = 0.01**2, 0.03**2

    def average(x: jax.Array) -> jax.Array:
        # Rows, then columns: fewer sums, and shorter ones, which round less.
        for shape in ((window, 1, 1), (1, window, 1)):
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, (1, 1, 1), "VALID") / window
        return x

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        # About 0, where the variances of float32 are most exact.
        x, y = (image.astype(jnp.float32) / 255 - 0.5 for image in pair)
        mx, my = average(x), average(y)
        unbiased = window**2 / (window**2 - 1)
        vx, vy, cov = (unbiased * (average(p * q) - average(p) * average(q)) for p, q in ((x, x), (y, y), (x, y)))
        mx, my = mx + 0.5, my + 0.5
        return jnp.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))

    return jax.lax.map(one, (a, b), batch_size=32)
