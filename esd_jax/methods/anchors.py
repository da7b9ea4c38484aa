"""What Ablating Concepts learns from, prepared before the first step: captions of both kinds, and views of the images.

*Ablating Concepts in Text-to-Image Diffusion Models* (Kumari et al., ICCV 2023), with the wording of its released code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from esd_jax import wording
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.images import in_batches
from esd_jax.erasing.method import Tools
from esd_jax.prompt_files import listed

# {p} is the anchor's caption, {s} the concept. The released code takes the templates alike, and a style's name twice
# half of the time.
STYLE = ("{p}, in the style of {s}", "{s} inspired painting, {p}", "in {s}'s style, {p}")
NUDITY = ("{s}, {p}", "in {s} style, {p}", "{p}, {s}")
KINDS = ("style", "object", "memorised", "nudity")

SMALL, LARGE = 0.6, 1.0  # captions call smaller views far away, and larger ones close
FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")
ANCHOR = "{anchor}"  # where the anchor stands in a prompt
GREY = 128  # around an image that does not fill its view
AT_ONCE = 8  # views encoded


def anchor_of(concept: Concept) -> str:
    """What takes a concept's place. Raises ValueError unless there is exactly one."""
    if len(concept.replace_with) != 1:
        raise ValueError(
            f"ablating {concept.text!r} needs one anchor, which takes its place: replace_with='cat' for 'grumpy cat', "
            f"'painting' for an artist's style; not {len(concept.replace_with)}"
        )
    return concept.replace_with[0]


def read_prompts(text: str | None) -> list[str]:
    """The prompts that a setting names: separated by ";", or those of a .txt or .csv file; none if it is None.

    Raises ValueError for a file that cannot be read, and where there is no prompt.
    """
    try:
        return [] if text is None else listed(text, "anchor_prompts")
    except OSError as error:
        raise ValueError(str(error)) from error


def prompts_of(concept: Concept, kind: str, prompts: list[str]) -> list[str]:
    """The prompts whose images a concept learns from: by default the anchor; of an object, those that name its anchor.

    In each, "{anchor}" becomes the concept's anchor. Raises ValueError if there is none.
    """
    anchor = anchor_of(concept)
    prompts = [prompt.replace(ANCHOR, anchor) for prompt in prompts]
    if kind != "object" or not prompts:
        return prompts or [anchor]
    if not (matches := [prompt for prompt in prompts if wording.names(anchor, prompt)]):
        raise ValueError(
            f"no prompt of anchor_prompts names {anchor!r}, in whose place {concept.text!r} is to be put: "
            "give some that do, or another replace_with or kind"
        )
    return matches


def captions(concept: Concept, kind: str, prompt: str, prefix: str = "") -> list[str]:
    """The captions under which an anchor's image is to be drawn in the concept's place; all are equally likely.

    An object takes the place of its anchor as a word; the released code puts it into longer ones too ("cathedral").

    prefix: of the view, before the prompt ("a far away ").
    """
    p = prefix + prompt
    if kind == "style":
        names = (concept.text, f"{concept.text} {concept.text}")
        return [template.format(p=p, s=name) for template in STYLE for name in names]
    if kind == "nudity":
        return [template.format(p=p, s=concept.text) for template in NUDITY]
    if kind == "memorised":
        return [prefix + concept.text]
    return [wording.replaced(p, anchor_of(concept), concept.text)]


@dataclass(frozen=True)
class View:
    """How an image is shown: scaled to (height, width), and placed in, or cut to, the size that all views have.

    image: which one. top, left: of the image in the view; where it is larger than the view, of the view in the image.
    """

    image: int
    height: int
    width: int
    top: int = 0
    left: int = 0
    flip: bool = False
    prefix: str = ""

    def pixels(self, image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
        """The view of an image; what it leaves free is grey."""
        height, width = image.shape[:2]
        image = image[:, ::-1] if self.flip else image
        if (self.height, self.width) != (height, width):
            scaled = Image.fromarray(np.ascontiguousarray(image)).resize(
                (self.width, self.height), Image.Resampling.LANCZOS
            )
            image = np.asarray(scaled)
        if self.height > height:
            return image[self.top : self.top + height, self.left : self.left + width]
        view = np.full((height, width, 3), GREY, np.uint8)
        view[self.top : self.top + self.height, self.left : self.left + self.width] = image
        return view

    def mask(self, height: int, width: int, cell: int) -> Float[np.ndarray, "h w 1"]:
        """1 for the latents that show the image alone. height, width: of the view, in pixels. cell: pixels a latent."""
        mask = np.ones((height // cell, width // cell, 1), np.float32)
        if self.height >= height:
            return mask
        rows, columns = (
            slice(start // cell + 1, (start + side) // cell - 1)
            for start, side in ((self.top, self.height), (self.left, self.width))
        )
        inside = np.zeros_like(mask)
        inside[rows, columns] = 1
        return inside


def draw_view(
    rng: np.random.Generator, image: int, size: tuple[int, int], cell: int, *, resize: bool, flip: bool
) -> View:
    """A random view: of two thirds, a third of the size up to all of it, else 1.2 to 1.4 times; half are mirrored.

    Args:
      image: which one.
      size: (height, width) of all images, in pixels.
      cell: pixels a latent. An image covers at least three, so that one of them shows nothing else.
    """
    flipped = bool(flip and rng.random() < 0.5)
    if not resize:
        return View(image, *size, flip=flipped)
    least = min(1.0, max(1 / 3, 3 * cell / min(size)))
    scale = rng.uniform(least, 1.0) if rng.random() < 2 / 3 else rng.uniform(1.2, 1.4)
    height, width = sides = [max(round(scale * side), min(3 * cell, side)) for side in size]
    top, left = (int(rng.integers(abs(side - length) + 1)) for side, length in zip(sides, size, strict=True))
    prefixes = FAR if scale < SMALL else NEAR if scale > LARGE else ("",)
    return View(image, height, width, top, left, flipped, prefixes[rng.integers(len(prefixes))])


class Pool:
    """The latents and masks of the views that concepts learn from; concepts with equal prompts share theirs.

    Args:
      draw: (prompts, negative prompt) -> images, the prompts in turn. Images that the user gives take their place, as
        they are.
      views: of each drawn image. resize, flip: see `draw_view`. seed: of the views.
    """

    def __init__(
        self,
        tools: Tools,
        draw: Callable[[list[str], str | None], UInt8[np.ndarray, "images height width 3"]],
        views: int,
        resize: bool,
        flip: bool,
        seed: int,
    ):
        self.tools, self.draw, self.count, self.how = tools, draw, views, {"resize": resize, "flip": flip}
        self.rng = np.random.default_rng(seed)
        self.latents: list[Array] = []
        self.masks: list[Array] = []
        self.known: dict[tuple[tuple[str, ...], str | None], list[tuple[int, View]]] = {}

    def views(self, prompts: list[str], negative: str | None) -> list[tuple[int, View]]:
        """The views of some prompts' images, and where each lies in the arrays."""
        key = (tuple(prompts), negative) if self.tools.images is None else ((), None)
        if key not in self.known:
            start = sum(map(len, self.latents))
            views = self._supplied() if self.tools.images is not None else self._drawn(prompts, negative)
            self.known[key] = list(enumerate(views, start))
        return self.known[key]

    def arrays(self) -> tuple[Float[Array, "views h w channel"], Float[Array, "views h w 1"]]:
        """Latents and masks of all views."""
        return jnp.concatenate(self.latents), jnp.concatenate(self.masks)

    def _supplied(self) -> list[View]:
        latents = self.tools.images
        assert latents is not None  # or they would be sampled
        number, height, width = latents.shape[:3]
        self.latents.append(latents)
        self.masks.append(jnp.ones((number, height, width, 1), jnp.float32))
        return [View(i, height, width) for i in range(number)]

    def _drawn(self, prompts: list[str], negative: str | None) -> list[View]:
        images = self.draw(prompts, negative)
        size, cell = images.shape[1:3], images.shape[1] // self.tools.shape[0]
        numbers = [i for i in range(len(images)) for _ in range(self.count)]
        views = [draw_view(self.rng, i, size, cell, **self.how) for i in numbers]

        def encode(batch: Sequence[View]) -> Array:
            return self.tools.to_latents(np.stack([view.pixels(images[view.image]) for view in batch]))

        self.latents.append(in_batches(encode, views, AT_ONCE))
        self.masks.append(jnp.asarray(np.stack([view.mask(*size, cell=cell) for view in views])))
        return views
