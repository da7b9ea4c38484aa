"""The runs in a folder: what their records, checkpoints and previews say, without any model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from esd_jax import recipe
from esd_jax.erasure import Erasure
from esd_jax.io.images import read_strip
from esd_jax.recipe import Recipe
from esd_jax.runs import LORA, MODEL, delta_name
from esd_jax.runs.record import read as read_record


@dataclass(frozen=True)
class Run:
    """A run's folder. plan: its recipe, with its base as it lies here. step: of its newest checkpoint."""

    folder: Path
    record: Erasure
    plan: Recipe
    step: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> tuple[Path, int, int, int]:
        """What a later run in a folder of the same name, or more updates of this one, do not share."""
        file = (self.folder / "run.json").stat()
        return self.folder, self.step, file.st_mtime_ns, file.st_ino

    @property
    def finished(self) -> bool:
        """Whether its erased model is written, or its change alone."""
        return (self.folder / MODEL).is_dir() or any(
            (self.folder / name).is_file() for name in (LORA, delta_name(self.plan))
        )

    @property
    def label(self) -> str:
        """In a few words what it is, and how far: "cat · a cat from emoji, 120 of 400 updates"."""
        so_far = "" if self.finished else f", {self.step} of {self.plan.training.steps} updates"
        return f"{self.name} · {', '.join(self.record.texts)} from {self.record.base}{so_far}"

    @property
    def preview_files(self) -> list[Path]:
        """The strips of its previews, the first one first."""
        return sorted((self.folder / "previews").glob("step_*.png"))

    def previews(self) -> dict[int, list[UInt8[np.ndarray, "_ _ 3"]]]:
        """Update -> an image of each of `plan.previews`, of the first preview and the newest.

        Raises ValueError for a file that is damaged, or only being written.
        """
        images, files = {}, self.preview_files
        for file in dict.fromkeys([*files[:1], *files[-1:]]):
            images[int(file.stem.removeprefix("step_"))] = list(read_strip(file))
        return images

    def thumbnail(self) -> UInt8[np.ndarray, "_ _ 3"]:
        """Its first four preview prompts, the first preview above the newest; grey where it has none."""
        rows = [np.concatenate(images[:4], axis=1) for images in self.previews().values()]
        rows = [row for row in rows if row.shape == rows[-1].shape]  # preview_prompts may have changed
        return np.concatenate(rows) if rows else np.full((64, 128, 3), 200, np.uint8)


def read(folder: Path) -> Run | None:
    """A run's folder; None for what is none, or has no recipe that this version reads."""
    try:
        record, local = read_record(folder)
        plan = recipe.make(**{**(record.recipe or {}), **local, "output_dir": str(folder)})
    except (OSError, TypeError, ValueError):
        return None
    steps = (int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit())
    return Run(folder, record, plan, max(steps, default=0)) if record.recipe else None


def listed(folder: Path) -> list[Run]:
    """The runs in a folder, the newest first."""
    files = sorted(folder.glob("*/run.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [run for file in files if (run := read(file.parent))]
