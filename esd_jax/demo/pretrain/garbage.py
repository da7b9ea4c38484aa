"""Pictures that show nothing: what the probe learns to refuse, since broken diffusion models draw such things."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter

from esd_jax.demo import artwork, vocabulary
from esd_jax.demo.drawing import SIZE, STYLES

Picture = UInt8[np.ndarray, "64 64 3"]


def draw(rng: np.random.Generator, kinds: tuple[str, ...], n: int) -> UInt8[np.ndarray, "n 64 64 3"]:
    """`n` pictures, of the named kinds in turn. Raises KeyError for a kind that is not in `KINDS`."""
    return np.stack([KINDS[kinds[i % len(kinds)]](rng) for i in range(n)])


def noise(rng: np.random.Generator) -> Picture:
    """White noise about a random colour, normal or uniform, in colour or grey."""
    shape = (SIZE, SIZE, int(rng.choice([1, 3])))
    white = rng.normal(size=shape) if rng.random() < 0.5 else rng.uniform(-1.7, 1.7, size=shape)
    return _clip(rng.uniform(0, 255, 3) + rng.uniform(20, 120) * white)


def smooth_noise(rng: np.random.Generator) -> Picture:
    """Clouds of colour."""
    return _clip(rng.uniform(40, 215, 3) + rng.uniform(20, 90) * _clouds(rng, int(rng.choice([2, 3, 5, 8, 16, 24]))))


def empty(rng: np.random.Generator) -> Picture:
    """Paper: any colour, a ramp between two colours, or a style's own with its ruling, if it has one."""
    kind = rng.random()
    if kind < 0.4:
        return _paper(rng)
    ramp = np.linspace(0, 1, SIZE)[:, None, None] if kind < 0.6 else np.zeros((SIZE, 1, 1))
    picture = _clip((1 - ramp) * rng.uniform(0, 255, 3) + ramp * rng.uniform(0, 255, 3) + np.zeros((SIZE, SIZE, 3)))
    return picture if rng.random() < 0.5 else picture.swapaxes(0, 1)


def doodle(rng: np.random.Generator) -> Picture:
    """Random strokes, ellipses and polygons in a style, as if they were an object."""
    drawn = Image.new("RGBA", (2 * SIZE, 2 * SIZE))
    pen, palette = ImageDraw.Draw(drawn), _palette(rng, 3)
    for _ in range(rng.integers(1, 9)):
        ink = tuple(int(c) for c in palette[rng.integers(len(palette))]) + (255,)
        points = (rng.uniform(0.15, 0.85) + rng.uniform(-0.35, 0.35, size=(rng.integers(3, 7), 2))) * 2 * SIZE
        flat = [tuple(p) for p in points.tolist()]
        match rng.integers(3):
            case 0:
                pen.line(flat, fill=ink, width=int(rng.integers(3, 14)), joint="curve")
            case 1:
                pen.polygon(flat, fill=ink)
            case _:
                pen.ellipse([*points[:2].min(axis=0), *(points[:2].max(axis=0) + 4)], fill=ink)
    return _in_style(rng, drawn.resize((SIZE, SIZE), Image.Resampling.BOX))


def scraps(rng: np.random.Generator) -> Picture:
    """Patches of one picture strewn over a style's paper."""
    image, result = _artwork(rng), _paper(rng)
    for _ in range(rng.integers(2, 14)):
        height, width = rng.integers(3, 18, size=2)
        y, x, v, u = (rng.integers(SIZE - side) for side in (height, width, height, width))
        result[y : y + height, x : x + width] = image[v : v + height, u : u + width]
    return result


def blend(rng: np.random.Generator) -> Picture:
    """The mean of three to six pictures, of which none outweighs the others."""
    count = rng.integers(3, 7)
    weights = rng.uniform(0.7, 1.3, size=count)
    return _clip(np.tensordot(weights / weights.sum(), np.stack([_artwork(rng) for _ in range(count)]), axes=1))


def shuffled(rng: np.random.Generator) -> Picture:
    """A picture whose tiles of 8 or 16 px have changed places."""
    high, wide = rng.choice([8, 16], size=2)
    rows, columns = SIZE // high, SIZE // wide
    tiles = _artwork(rng).reshape(rows, high, columns, wide, 3).swapaxes(1, 2).reshape(-1, high, wide, 3)
    tiles = tiles[rng.permutation(len(tiles))].reshape(rows, columns, high, wide, 3)
    return tiles.swapaxes(1, 2).reshape(SIZE, SIZE, 3)


def scrambled(rng: np.random.Generator) -> Picture:
    """A picture with its spectrum's phases drawn anew: its colours and textures, but no shapes."""
    image = _artwork(rng).astype(np.float64)
    spectrum, phases = (
        np.fft.fft2(image, axes=(0, 1)),
        np.angle(np.fft.fft2(rng.normal(size=(SIZE, SIZE, 1)), axes=(0, 1))),
    )
    phases[0, 0] = 0  # the mean colour stays
    return _clip(np.fft.ifft2(spectrum * np.exp(1j * phases), axes=(0, 1)).real)


def blurred(rng: np.random.Generator) -> Picture:
    """A picture out of focus."""
    return np.asarray(Image.fromarray(_artwork(rng)).filter(ImageFilter.GaussianBlur(rng.uniform(6, 14))))


def drowned(rng: np.random.Generator) -> Picture:
    """A picture under white or coarse noise, as a sampler leaves it that stops early."""
    image = _artwork(rng).astype(np.float32) - 128
    if rng.random() < 0.4:
        return _clip(128 + 0.35 * image + rng.uniform(70, 120) * rng.normal(size=image.shape))
    share = rng.uniform(0.15, 0.35)  # a latent is 4 px wide
    return _clip(128 + share * image + rng.uniform(50, 90) * _clouds(rng, int(rng.choice([16, 32]))))


def stripes(rng: np.random.Generator) -> Picture:
    """A picture whose rows, four at a time, have changed places."""
    return _artwork(rng).reshape(16, 4, SIZE, 3)[rng.permutation(16)].reshape(SIZE, SIZE, 3)


def warped(rng: np.random.Generator) -> Picture:
    """A picture torn by a random field of displacements."""
    field = np.moveaxis(_clouds(rng, 10)[..., :2], -1, 0)
    y, x = np.clip(np.mgrid[:SIZE, :SIZE] + 14 * field, 0, SIZE - 1).astype(int)
    return _artwork(rng)[y, x]


def quarters(rng: np.random.Generator) -> Picture:
    """The quarters of four pictures, put together with their corners outside, where little was."""
    a, b, c, d = (np.roll(_artwork(rng), SIZE // 2, axis=(0, 1)) for _ in range(4))
    half = SIZE // 2
    top = np.concatenate([a[:half, :half], b[:half, half:]], axis=1)
    return np.concatenate([top, np.concatenate([c[half:, :half], d[half:, half:]], axis=1)])


def letters(rng: np.random.Generator) -> Picture:
    """A capital letter or a digit in a style: an object that the artwork does not have."""
    tile = Image.new("RGBA", (11, 12))
    ink = tuple(int(c) for c in _palette(rng, 1)[0]) + (255,)
    ImageDraw.Draw(tile).text((3, 0), str(rng.choice(list("ABEFGHKMNPRSTWXYZ2345679"))), fill=ink)
    sprite, side = Image.new("RGBA", (SIZE, SIZE)), int(rng.integers(40, 62))
    left, top = (int(c) for c in rng.integers(0, SIZE - side + 1, size=2))
    sprite.paste(tile.resize((side, side), Image.Resampling.BICUBIC), (left, top))
    return _in_style(rng, sprite)


KINDS: dict[str, Callable[[np.random.Generator], Picture]] = {
    f.__name__: f
    for f in (
        *(noise, smooth_noise, empty, doodle, scraps, blend, shuffled, scrambled, blurred, drowned),
        *(stripes, warped, quarters, letters),
    )
}
UNSEEN = ("stripes", "warped", "quarters", "letters")  # kept out of training: does refusal carry over to other kinds?
TRAINED = tuple(kind for kind in KINDS if kind not in UNSEEN)


def _artwork(rng: np.random.Generator) -> Picture:
    pairs = vocabulary.pairs()
    return artwork.draw(*pairs[rng.integers(len(pairs))], artwork.random_placement(rng))


def _paper(rng: np.random.Generator) -> Picture:
    return _in_style(rng, Image.new("RGBA", (SIZE, SIZE))).copy()


def _in_style(rng: np.random.Generator, sprite: Image.Image) -> Picture:
    paint = STYLES[str(rng.choice(vocabulary.STYLES))].draw
    return _clip(255 * np.clip(paint(np.asarray(sprite.convert("RGBa"), np.float32) / 255), 0, 1))


def _palette(rng: np.random.Generator, n: int) -> UInt8[np.ndarray, "n 3"]:
    """Colours of the artwork's own objects; any colour, where its corner is paper."""
    image = artwork.draw(str(rng.choice(vocabulary.objects())), str(rng.choice(["cartoon", "pixel", "clay"])))
    y, x = rng.integers(SIZE // 4, 3 * SIZE // 4, size=(2, n))
    return image[y, x]


def _clouds(rng: np.random.Generator, side: int) -> Float[np.ndarray, "64 64 3"]:
    """Normal noise on a grid of `side`, interpolated."""
    coarse = rng.normal(size=(3, side, side)).astype(np.float32)
    channels = [np.asarray(Image.fromarray(c).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for c in coarse]
    return np.stack(channels, axis=-1)


def _clip(x: np.ndarray) -> Picture:
    return (np.clip(x, 0, 255) + 0.5).astype(np.uint8)
