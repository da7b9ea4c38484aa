"""Image files: reading those to learn from, writing generated ones."""

import contextlib
import io
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from esd_jax.inputs import expanded
from esd_jax.io import leftovers
from esd_jax.results import writing

COUNT = "esd_jax.images"  # of a PNG's texts: how many images of one size stand side by side
WHITE = (255, 255, 255)  # what stands behind a picture that is transparent, as on a page
# Of PNG: depths at which Pillow does not find the one transparent colour that a file names.
KEY_DEPTHS = ("L;2", "L;4", "I;16B", "RGB;16B")
BITS, PHOTOMETRIC, FORMAT = 258, 262, 339  # tags of TIFF; 0 of the second: white is zero
SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # Pillow's modes -> the colours of a profile


def read_images(paths: Sequence[str | Path], size: tuple[int, int]) -> Float[np.ndarray, "images height width 3"]:
    """Reads pictures to learn from, as `read_image` does.

    Args:
      paths: of the files.
      size: (height, width) in pixels, to which each is scaled and centre-cropped.

    Returns:
      float32 in [-1, 1].

    Raises:
      ValueError: there is none, or a file that is missing, no image, damaged, too large or too narrow.
    """
    images = []
    for path in paths:
        image = read_image(path)
        scale = max(size[0] / image.height, size[1] / image.width)
        height, width = round(image.height * scale), round(image.width * scale)
        if height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            narrow = f"{image.width}x{image.height} pixels are too narrow for {size[1]}x{size[0]}"
            raise ValueError(f"images: cannot read {path}: {narrow}: crop it first")
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
        images.append(np.asarray(image.crop((left, top, left + size[1], top + size[0])), np.float32))
    if not images:
        raise ValueError(f"images={paths!r} names no file")
    return np.stack(images) / 127.5 - 1


def read_image(path: str | Path) -> Image.Image:
    """A picture in 8 bit RGB as a viewer shows it: upright, its colours in sRGB, on white where it is transparent.

    Of an animation it is the first frame.

    Raises ValueError, naming the file: it is missing, no image, damaged, cut short, too large, or of a kind for which
    it is not known what a viewer shows (floating-point numbers, say).
    """
    path = expanded(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError("it is a device or a pipe: give a file")
        with path.open("rb") as file, Image.open(file) as image:
            image.verify()  # a PNG's checksums
        with Image.open(path) as image:
            return _shown(image)
    except Exception as error:  # each of Pillow's readers has its own: SyntaxError, struct.error, zlib.error, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "cannot identify it as an image: it is of an unknown kind, or damaged"
        raise ValueError(f"images: cannot read {path}: {' '.join(reason.split())}") from error


def write_strip(images: UInt8[np.ndarray, "images height width 3"], path: str | Path) -> None:
    """Writes images of one size side by side as a PNG that says how many they are."""
    text = PngImagePlugin.PngInfo()
    text.add_text(COUNT, str(len(images)))
    Image.fromarray(np.concatenate(list(images), axis=1)).save(path, format="PNG", pnginfo=text)


def read_strip(path: str | Path) -> UInt8[np.ndarray, "images height width 3"]:
    """The images of a strip; of one that does not say how many they are, square ones. Raises ValueError as
    `read_image` does, and for a width that does not divide."""
    strip = np.asarray(read_image(path))
    with Image.open(path) as image:
        text = str(image.info.get(COUNT, ""))
    count = int(text) if text.isdecimal() else max(1, strip.shape[1] // strip.shape[0])
    if not count or strip.shape[1] % count:
        raise ValueError(f"images: cannot read {path}: {strip.shape[1]} pixels of width are no {count} images")
    return np.stack(np.split(strip, count, axis=1))


def _shown(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, of which nobody knows the white: save it with 8 or 16 bit")
    tile = getattr(image, "tile", None)  # of an image that comes from a file
    if image.format == "PNG" and "transparency" in image.info and tile and tile[0][3] in KEY_DEPTHS:
        raise ValueError("one of its colours is transparent, which only 8 bit may be: save it with an alpha channel")
    if image.mode.startswith("I"):
        tags = getattr(image, "tag_v2", {})  # of TIFF
        image = _in_8_bit(ImageOps.exif_transpose(image), *_range(image), inverted=tags.get(PHOTOMETRIC) == 0)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("La", "RGBa"):  # colours that their alpha has multiplied
        image = image.convert(image.mode.replace("a", "A"))
    if image.mode not in ("P", "PA", "LA", "RGBA") and "transparency" not in image.info:
        return _in_srgb(image)
    image = image.convert("RGBA")
    return Image.composite(_in_srgb(image), Image.new("RGB", image.size, WHITE), image.getchannel("A"))


def _range(image: Image.Image) -> tuple[int, bool]:
    """How many bits the numbers of a grey picture of more than 8 bit have, and whether one is a sign."""
    if tags := getattr(image, "tag_v2", None):
        return tags.get(BITS, (1,))[0], tags.get(FORMAT, (1,))[0] == 2
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError(f"it holds whole numbers, of which a {image.format} does not say the white: save it as PNG")
    return 16, False


def _in_8_bit(image: Image.Image, bits: int, signed: bool, inverted: bool) -> Image.Image:
    """Grey numbers of 16 or 32 bit -> 0..255."""
    values = np.asarray(image).astype(np.int64)
    values = values if signed else values % 2**bits  # Pillow's are signed
    levels = np.round(values * (255 / (2 ** (bits - signed) - 1))).astype(np.int64)
    if values.min() < 0:
        raise ValueError("it holds numbers below 0, which are darker than black: save it with 8 or 16 bit")
    if values.max() and not levels.max():
        raise ValueError(f"its brightest number, {values.max()}, is black in {bits} bit: save it with 8 or 16 bit")
    grey = Image.fromarray((255 - levels if inverted else levels).astype(np.uint8))
    grey.info = image.info
    return grey


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours alone, in sRGB. A profile that is damaged, or of other colours, is passed over, as by viewers."""
    own = image if image.mode in SPACES else image.convert("RGB")
    with contextlib.suppress(ImageCms.PyCMSError, ImportError, OSError):
        if profile := image.info.get("icc_profile"):
            theirs: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            fits = theirs.profile.xcolor_space.strip() == SPACES[own.mode]
            if fits and "sRGB" not in ImageCms.getProfileDescription(theirs):
                shown = ImageCms.profileToProfile(own, theirs, ImageCms.createProfile("sRGB"), outputMode="RGB")
                assert shown is not None  # it is in place alone that there is none
                return shown
    return own.convert("RGB")


def check_output(output: Path) -> None:
    """Refuses an output that is not to be replaced by images, or cannot be a file, before they are drawn."""
    with writing(output), contextlib.suppress(FileNotFoundError):  # a name that is too long, a file for a folder
        os.lstat(leftovers.partial(output.absolute()))
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
    partial = leftovers.partial(output.absolute())
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
