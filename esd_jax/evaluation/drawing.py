"""Samples a list of prompts with one model, into a folder with a manifest; images that exist are not sampled again."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from esd_jax import progress as tasks
from esd_jax import results
from esd_jax.evaluation.prompts import Case, PromptList
from esd_jax.io.images import read_image
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample

CHUNK = 64  # images that are lost if the program is stopped
MANIFEST = "manifest.json"
MOST_STEPS = 20  # of the family's, for images that are classified or seen at a glance


@dataclass(frozen=True)
class Drawing:
    """How images are drawn.

    num_steps, guidance_scale: None: those of the model's family.
    own_guidance: draw those prompts that bring a guidance scale with theirs; else `guidance_scale` is that of all.
    height, width: in pixels; None: those that the model was trained for.
    """

    num_steps: int | None = None
    guidance_scale: float | None = None
    own_guidance: bool = False
    sampler: str | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 8


def of_family(settings: Any, pipeline: Pipeline, most_steps: int | None = None) -> Any:
    """The same dataclass; where its num_steps or guidance_scale is None, it is the family's, of steps so many at most.

    settings: a `Drawing`, or any other dataclass with these fields.
    """
    changes: dict[str, Any] = {}
    if settings.num_steps is None:
        steps = pipeline.family.sampling(pipeline.configs).steps
        changes["num_steps"] = steps if most_steps is None else min(steps, most_steps)
    if settings.guidance_scale is None:
        changes["guidance_scale"] = pipeline.family.sampling(pipeline.configs).guidance_scale
    return replace(settings, **changes)


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `sample` as kept results name them, whose number of steps is num_steps."""
    return {"num_steps" if name == "steps" else name: value for name, value in options.items()}


def sampled(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same as `sample` names them."""
    return {"steps" if name == "num_steps" else name: value for name, value in options.items()}


class Drawn:
    """The images of a list of prompts, in its order, in a folder."""

    def __init__(self, folder: Path, cases: Sequence[Case]):
        self.folder, self.cases = folder, cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "height width 3"]:
        return np.asarray(read_image(_file(self.folder, self.cases[i])))

    def batches(self, size: int = 64) -> Iterator[UInt8[np.ndarray, "batch height width 3"]]:
        """All images, so many at a time."""
        for start in range(0, len(self), size):
            yield np.stack([self[i] for i in range(start, min(start + size, len(self)))])


def draw(
    pipeline: Pipeline,
    identity: Mapping[str, Any],
    cases: Sequence[Case],
    drawing: Drawing,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Drawn:
    """Samples what is missing in a folder: CASE.png for each case, and manifest.json.

    Each image depends on its prompt, seed and the settings alone: a folder that was begun is finished with the same
    images as one that is drawn at once, on any number of devices (but for rounding).

    Args:
      pipeline: the model. identity: what distinguishes it, for the manifest: hashes, what was erased.
      cases: the prompts. drawing: the settings; the batch size changes no image.
      progress: called with the number of images so far, and of all.

    Raises ValueError for a folder that was sampled with other settings.
    """
    how = of_family(drawing, pipeline)
    settings = _settings(identity, how)
    known, former = _recorded(folder, cases, settings)
    results.write(folder / MANIFEST, {"cases": list(known.values())}, **{**settings, **former})
    missing = [case for case in cases if not _file(folder, case).is_file()]
    done = len(cases) - len(missing)
    # The guidance scale is one number for a batch.
    own = lambda case: how.own_guidance and case.guidance is not None  # noqa: E731
    scale = lambda case: case.guidance if own(case) else how.guidance_scale  # noqa: E731
    chunks = [
        (guidance, alike[start : start + CHUNK], len(alike))
        for guidance, group in groupby(sorted(missing, key=scale), key=scale)
        for alike in [list(group)]
        for start in range(0, len(alike), CHUNK)
    ]
    with tasks.task("sampling", len(cases), done=done, unit="images", start="compiling, once") as task:
        for guidance, chunk, several in chunks:
            images = sample(
                pipeline,
                [case.prompt for case in chunk],
                seed=[case.seed for case in chunk],
                steps=how.num_steps,
                guidance_scale=guidance,
                sampler=how.sampler or "auto",
                height=how.height,
                width=how.width,
                batch_size=min(how.batch_size, several),
            )
            for case, image in zip(chunk, images, strict=True):
                with results.replacing(_file(folder, case)) as partial:
                    Image.fromarray(image).save(partial, format="png")
            done += len(chunk)
            progress(done, len(cases))
            task.advance(len(chunk))
    return Drawn(folder, cases)


def has_begun(folder: Path, identity: Mapping[str, Any], cases: Sequence[Case], drawing: Drawing) -> bool:
    """Whether a folder has images of a model that were sampled with the same settings, and none of other prompts.

    identity, cases, drawing: as in `draw`, but with the numbers of the model's family in place.
    """
    try:
        return (folder / MANIFEST).is_file() and bool(_recorded(folder, cases, _settings(identity, drawing))[0])
    except ValueError:
        return False


def name_of(prompts: PromptList, drawing: Drawing) -> str:
    """The name of a folder for the images of a list of prompts: it differs with the list and with the settings."""
    settings = {name: value for name, value in asdict(drawing).items() if value is not None and name != "batch_size"}
    digest = hashlib.sha256(json.dumps([prompts.sha256, settings], sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w-]+", "-", prompts.name.removesuffix(".csv"), flags=re.ASCII)
    return f"{name[:60]}-{digest[:8]}"


def _settings(identity: Mapping[str, Any], drawing: Drawing) -> dict[str, Any]:
    """What the images of a folder have in common."""
    return {"model": identity, "drawing": {k: v for k, v in asdict(drawing).items() if k != "batch_size"}}


def _recorded(
    folder: Path, cases: Sequence[Case], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cases of a folder's manifest, if there is one, and these, by number; and its settings, as they are stored.

    Raises ValueError for other settings, and for another case of the same number.
    """
    old = results.read(folder / MANIFEST, folder, **settings) or {"cases": []}
    with results.intact(folder):
        known = {case["case"]: case for case in old["cases"]}
    new = {case.case: case._asdict() for case in cases}
    if wrong := next((name for name, case in new.items() if known.get(name, case) != case), None):
        raise ValueError(f"{folder} holds another image {wrong}: {results.FIX}")
    return {**known, **new}, {name: old[name] for name in settings if name in old}


def _file(folder: Path, case: Case) -> Path:
    return folder / f"{case.case}.png"
