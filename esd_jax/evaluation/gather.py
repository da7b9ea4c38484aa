"""What a run and its weights show by themselves: its course, its previews, and how much each tensor changed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from esd_jax import progress
from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Curve, Evidence, Moment, Plot
from esd_jax.inputs import parse_json
from esd_jax.io import exact
from esd_jax.io.exact import with_strength
from esd_jax.io.images import read_strip
from esd_jax.metrics.intervals import Estimate
from esd_jax.metrics.likeness import ssim
from esd_jax.pipeline import Pipeline

# Images of one prompt each -> the concept's detection rate.
Score = Callable[[UInt8[np.ndarray, "n height width 3"]], float]
# A model -> (the concept's detection rate, the retention of everything else, 0 to 1).
Metric = Callable[[Pipeline], tuple[Estimate, Estimate]]
Judge = Metric  # a former name


def course(folder: Path, record: Erasure, score: Score | None = None) -> Evidence:
    """The training curve and the previews of a run's folder.

    Args:
      folder: the run's. record: of its erasure.
      score: of the images of one preview; None where nothing scores them.
    """
    return Evidence("", record, timeline=timeline(folder / "previews", score), training=training(folder / "log.jsonl"))


def training(log: Path) -> Plot | None:
    """Loss over updates, each point the mean of a fiftieth of them: a step's loss depends on the timestep it drew."""
    if not log.is_file():
        return None
    *lines, _ = log.read_text().split("\n")  # a run that was killed may have begun one more
    if not (rows := [parse_json(line, log) for line in lines]):
        return None
    parts = np.array_split(np.array([(row["step"], row["loss"]) for row in rows]), min(50, len(rows)))
    steps, losses = zip(*(tuple(part.mean(axis=0).tolist()) for part in parts), strict=True)
    return Plot("Mean loss of neighbouring steps", "step", "loss", (Curve("loss", steps, losses),))


def timeline(folder: Path, score: Score | None) -> tuple[Moment, ...]:
    """A moment for each preview strip (step_000100.png)."""
    moments: list[Moment] = []
    for file in sorted(folder.glob("step_*.png")):
        images = read_strip(file)
        moment = Moment(int(file.stem.removeprefix("step_")), images)
        first = moments[0].images if moments else images
        alike = images.shape == first.shape and min(images.shape[1:3]) >= 7  # preview_prompts may have changed
        likeness = float(ssim(images, first).mean()) if alike else None
        moments.append(replace(moment, score=score(images) if score else None, ssim=likeness))
    return tuple(moments)


def weight_changes(erased: Pipeline) -> dict[str, float]:
    """||after - before|| / ||before|| of each tensor that was trained, by its diffusers name; 1 where it was zero."""
    changes = {}
    for name, before in exact.before(erased):
        old, new = (np.asarray(value, np.float64) for value in (before, erased.edits[name]))
        size, change = np.linalg.norm(old), np.linalg.norm(new - old)
        changes[name] = float(change / size) if size else float(change > 0)
    return changes


def front(metric: Metric, erased: Pipeline, strengths: Sequence[float]) -> Plot:
    """Erasure against retention, over the strength of the change.

    Args:
      metric: a model -> (the concept's detection rate, the retention of everything else, 0 to 1).
      strengths: 1 is the erasure itself.
    """
    points = []
    with progress.task("measuring", len(strengths), unit="strengths") as task:
        for strength in strengths:
            points.append(metric(with_strength(erased, strength)))
            task.advance(note=f"strength {strength:g}")
    curve = Curve(
        "strength of the change",
        tuple(detected.value for detected, _ in points),
        tuple(kept.value for _, kept in points),
        tuple(f"{strength:g}" for strength in strengths),
        **{
            f"{'xy'[axis]}_{end}": tuple(getattr(point[axis], end) for point in points)
            for axis in (0, 1)
            for end in ("low", "high")
        },
    )
    return Plot(
        "Erasure against retention", "target detection rate", "accuracy on other concepts", (curve,), percent=True
    )
