"""Builds `artwork.png` from the artwork's own packages, and checks that its pixels are those the model was trained on.

    pip install 'esd-jax[artwork]' && python -m esd_jax.demo.build --output=artwork.png

Needs `npm`, for `npm pack`. The packages and the renderer are pinned; so is the digest of the pixels.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esd_jax.demo import vocabulary
from esd_jax.demo.drawing import SIZE

PIXELS_SHA256 = "41a309b853a8762690073ad409faebc072fbf4710554cc0143f70dd6ac6ae731"


@dataclass(frozen=True)
class Package:
    """An npm package that holds one set of artwork, and the digest of its archive."""

    set: str
    name: str
    version: str
    sha256: str


PACKAGES = (
    Package("noto", "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    Package(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    Package(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    Package(
        "fluent-3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    Package(
        "line-art",
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("artwork.png"))
    parser.add_argument("--packages", type=Path, help="a folder with the packages' archives; else they are fetched")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sheet = build(arguments.packages or Path(folder), fetch=arguments.packages is None)
    sheet.save(arguments.output, optimize=True)
    digest = hashlib.sha256(np.asarray(sheet).tobytes()).hexdigest()
    print(f"{arguments.output}: {len(vocabulary.OBJECTS)} objects in {len(PACKAGES)} sets, pixels sha256 {digest}")
    if digest != PIXELS_SHA256:
        sys.exit(f"these are not the pixels of the embedded artwork, whose digest is {PIXELS_SHA256}")


def build(folder: Path, *, fetch: bool = True) -> Image.Image:
    """The sheet, RGBA: a row of 64 px per object of the vocabulary, a column per package.

    Args:
      folder: where the packages' archives lie, or are put.
      fetch: get them with `npm pack`.

    Raises:
      FileNotFoundError: an archive is missing; ValueError: it is not the one that is pinned; KeyError: an icon.
    """
    sheet = Image.new("RGBA", (SIZE * len(PACKAGES), SIZE * len(vocabulary.OBJECTS)))
    for j, package in enumerate(PACKAGES):
        icons = _read(package, folder, fetch)
        for i, entry in enumerate(vocabulary.OBJECTS):
            icon = icons.render(entry).convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            sheet.paste(icon.convert("RGBA"), (SIZE * j, SIZE * i))
    return sheet


def _read(package: Package, folder: Path, fetch: bool) -> "Drawings | Renders":
    archive = folder / f"{package.name.replace('@', '').replace('/', '-')}-{package.version}.tgz"
    if fetch:
        subprocess.run(["npm", "pack", "--silent", f"{package.name}@{package.version}"], cwd=folder, check=True)
    if (digest := hashlib.sha256(archive.read_bytes()).hexdigest()) != package.sha256:
        raise ValueError(f"{archive} has sha256 {digest}, not {package.sha256}")
    with tarfile.open(archive) as tar:
        files = {member.name.partition("/")[2]: member for member in tar.getmembers() if member.isfile()}
        if "icons.json" not in files:
            wanted = {entry.hexcode for entry in vocabulary.OBJECTS}
            members = {_code(Path(name).stem): files[name] for name in files if name.endswith(".webp")}
            return Renders({code: tar.extractfile(members[code]).read() for code in wanted})  # type: ignore[union-attr]
        icons, characters = (
            json.load(tar.extractfile(files[name])) if name in files else {}  # type: ignore[arg-type]
            for name in ("icons.json", "chars.json")
        )
    return Drawings(icons, characters)


@dataclass(frozen=True)
class Drawings:
    """A set of SVG icons in Iconify's JSON format, found by code point or by Unicode name."""

    icons: Mapping[str, Any]
    characters: Mapping[str, str]

    def render(self, entry: vocabulary.Object) -> Image.Image:
        import resvg_py

        aliases, name, flipped = self.icons.get("aliases", {}), self._name(entry), False
        while name in aliases:
            alias = aliases[name]
            if unknown := sorted(alias.keys() - {"parent", "hFlip"}):
                raise ValueError(f"the icon {name!r} is an alias with {unknown[0]}, which is not implemented")
            flipped ^= bool(alias.get("hFlip"))
            name = alias["parent"]
        icon = self.icons["icons"][name]
        width, height, left, top = (
            icon.get(key, self.icons.get(key, default))
            for key, default in (("width", 16), ("height", 16), ("left", 0), ("top", 0))
        )
        body = icon["body"].replace("currentColor", "#000")
        if flipped:
            body = f'<g transform="translate({width + 2 * left} 0) scale(-1 1)">{body}</g>'
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIZE, height=4 * SIZE)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    def _name(self, entry: vocabulary.Object) -> str:
        codes = {_code(key): name for key, name in self.characters.items()}
        if entry.hexcode in codes:
            return codes[entry.hexcode]
        names = {_letters(name): name for name in (*self.icons["icons"], *self.icons.get("aliases", {}))}
        return names[_letters(entry.label)]


@dataclass(frozen=True)
class Renders:
    """A set of rendered images: code point -> WebP."""

    files: Mapping[str, bytes]

    def render(self, entry: vocabulary.Object) -> Image.Image:
        return Image.open(io.BytesIO(self.files[entry.hexcode])).convert("RGBA")


def _code(text: str) -> str:
    """A code point as the vocabulary writes it: without the selector of the coloured variant."""
    return text.upper().removesuffix("-FE0F")


def _letters(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())


if __name__ == "__main__":
    main()
