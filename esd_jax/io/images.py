"""Image files: reading those to learn from, writing those that were drawn."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from esd_jax.io.safetensors import writing


def read_images(paths: str, size: tuple[int, int]) -> Float[np.ndarray, "images height width 3"]:
    """Reads pictures to learn from.

    Args:
      paths: of the files, separated by ";".
      size: (height, width) in pixels, to which each is scaled and centre-cropped.

    Returns:
      float32 in [-1, 1].

    Raises:
      ValueError: there is none, or a file that is missing, no image, cut short or too large.
    """
    images = []
    for path in filter(None, (p.strip() for p in paths.split(";"))):
        try:
            image = Image.open(Path(path).expanduser()).convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"images: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        scale = max(size[0] / image.height, size[1] / image.width)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
        images.append(np.asarray(image.crop((left, top, left + size[1], top + size[0])), np.float32))
    if not images:
        raise ValueError(f"images={paths!r} names no file")
    return np.stack(images) / 127.5 - 1


def check_output(output: Path) -> None:
    """Refuses an output that is not to be replaced by images, before they are drawn."""
    suffix = output.suffix.lower()
    if suffix == ".png":
        if output.is_dir():
            raise FileExistsError(f"{output} is a folder where a file should be; choose another")
    elif suffix in Image.registered_extensions():
        raise ValueError(f"{output}: images are written as .png, or into a folder")
    elif output.exists():
        if not output.is_dir():
            raise FileExistsError(f"{output} is a file where a folder should be; choose another")
        if other := [path.name for path in output.iterdir() if not re.fullmatch(r"\d{5}\.png", path.name)]:
            raise FileExistsError(f"{output} holds more than images ({other[0]}), so it stays; choose another")


def write_images(images: UInt8[np.ndarray, "images height width 3"], output: Path) -> None:
    """Writes images side by side into a .png file, or one by one into a folder; it appears complete or not at all.

    Raises OSError in one line: no permission, no space left, ...
    """
    partial = output.absolute().with_name(f".{output.absolute().name}.{os.getpid()}.partial")
    with writing(output):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            if output.suffix.lower() == ".png":
                Image.fromarray(np.concatenate(list(images), axis=1)).save(partial, format="png")
                partial.replace(output)
                return
            partial.mkdir()
            for i, image in enumerate(images):
                Image.fromarray(image).save(partial / f"{i:05d}.png")
            if output.exists():
                shutil.rmtree(output)
            partial.rename(output)
        finally:
            partial.unlink() if partial.is_file() else shutil.rmtree(partial, ignore_errors=True)
