"""One model's images, by prompt and seed, and the probe's classes for them; kept in a folder if there is one."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from esd_jax import results
from esd_jax.demo import probe, vocabulary
from esd_jax.demo.groups import Shot
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample

NUM_STEPS, GUIDANCE = 20, 3.0  # what the embedded model was tuned for
CHUNK = 320  # images that are lost if the program is stopped


class Shown(NamedTuple):
    """An image, and the classes that the probe recognises in it; None where it recognises nothing."""

    image: UInt8[np.ndarray, "height width 3"]
    object: str | None
    category: str | None
    style: str | None


class Gallery(dict[Shot, Shown]):
    """All images of one model. `folder`: where they are stored and read again; for this model alone."""

    def __init__(self, folder: Path | None = None):
        super().__init__()
        self.folder = folder
        if folder:
            for file in sorted(folder.glob("*.npz")):
                fields = results.read(file) or {}
                with results.intact(file):
                    shots, images = map(Shot, fields["prompts"].tolist(), fields["seeds"].tolist()), fields["images"]
                self._hang(list(shots), images)

    def add(self, shots: Sequence[Shot], images: UInt8[np.ndarray, "shots height width 3"]) -> None:
        """Hangs up what was drawn for some shots."""
        if self.folder:
            files = (self.folder / f"{number:06d}.npz" for number in itertools.count(len(self)))
            file = next(file for file in files if not file.exists())  # the first one may, if an older one was removed
            prompts, seeds = zip(*shots, strict=True)
            results.write(file, {"prompts": prompts, "seeds": seeds, "images": images})
        self._hang(shots, images)

    def _hang(self, shots: Sequence[Shot], images: UInt8[np.ndarray, "shots height width 3"]) -> None:
        verdict = probe.classify(images)
        heads = (
            (vocabulary.objects(), verdict.objects),
            (vocabulary.categories(), verdict.categories),
            (vocabulary.styles(), verdict.styles),
        )
        for i, shot in enumerate(shots):
            recognised = (names[int(classes[i])] if verdict.recognised[i] else None for names, classes in heads)
            self[shot] = Shown(images[i], *recognised)


def draw(pipeline: Pipeline, wanted: Iterable[Shot], gallery: Gallery, batch_size: int = 32, **options: Any) -> int:
    """Adds what is missing to a model's gallery, each image once. Returns how many were drawn.

    options: further arguments of `sample`; a gallery holds what is drawn with the same.
    """
    missing = [shot for shot in dict.fromkeys(wanted) if shot not in gallery]
    for start in range(0, len(missing), CHUNK):
        shots = missing[start : start + CHUNK]
        images = sample(
            pipeline,
            [shot.prompt for shot in shots],
            seed=[shot.seed for shot in shots],
            steps=NUM_STEPS,
            guidance_scale=GUIDANCE,
            batch_size=batch_size,
            **options,
        )
        gallery.add(shots, images)
    return len(missing)
