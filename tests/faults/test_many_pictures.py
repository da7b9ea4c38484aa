"""Two thousand pictures, made from a seed: unusual ones, whose right values are known, and damaged ones."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from esd_jax.io.images import read_image


class Refused(Exception):
    """Raised with the file that is to be refused."""


def smooth(rng, channels=3):
    """A picture that every format can hold nearly: a gradient between random corners, never black all over."""
    height, width = rng.randrange(8, 24), rng.randrange(8, 24)
    corners = np.array([rng.randrange(40, 256) for _ in range(4 * channels)], float).reshape(2, 2, channels)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    return np.round(
        (1 - y) * ((1 - x) * corners[0, 0] + x * corners[0, 1]) + y * ((1 - x) * corners[1, 0] + x * corners[1, 1])
    ).astype(np.uint8)


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(array, depth, colour, *chunks):
    """A PNG of our own making. array: big-endian, [height, width * channels]."""
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    head = struct.pack(
        ">IIBBBBB", array.shape[1] // {0: 1, 2: 3, 4: 2, 6: 4}[colour], len(array), depth, colour, 0, 0, 0
    )
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def on_white(rgb, alpha):
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def tags_changed(content, **tags):
    """A little-endian TIFF with the value of some 16 bit tags changed."""
    content, (start,) = bytearray(content), struct.unpack("<I", content[4:8])
    for i in range(*struct.unpack("<H", content[start : start + 2])):
        place = start + 2 + 12 * i
        if (value := tags.get(f"t{struct.unpack('<H', content[place : place + 2])[0]}")) is not None:
            content[place + 8 : place + 10] = struct.pack("<H", value)
    return bytes(content)


# Each of these: rng -> (content, suffix, the right values, by how much they may differ).


def colour(rng):
    kind, options = rng.choice([
        ("png", {}), ("bmp", {}), ("tiff", {}), ("tiff", {"compression": "tiff_lzw"}), ("webp", {"lossless": True}),
        ("ppm", {}), ("tga", {}), ("jpeg2000", {"irreversible": False}), ("png", {"optimize": True}),
    ])  # fmt: skip
    array = smooth(rng)
    suffix = kind if rng.random() < 0.7 else "png"  # many a file has another's suffix
    return saved(Image.fromarray(array), kind, **options), suffix, array, 0


def grey(rng):
    array = smooth(rng, 1)[..., 0]
    return saved(Image.fromarray(array), rng.choice(["png", "bmp", "tiff", "ppm"])), "png", array[..., None], 0


def black_and_white(rng):
    array = smooth(rng, 1)[..., 0] > 140
    image = Image.fromarray((array * 255).astype(np.uint8)).convert("1", dither=Image.Dither.NONE)
    return saved(image, rng.choice(["png", "bmp", "tiff"])), "png", array[..., None] * 255, 0


def jpeg(rng):
    array = smooth(rng)
    options = {"quality": 98, "subsampling": 0, "progressive": rng.random() < 0.5}
    return saved(Image.fromarray(array), "jpeg", **options), "jpg", array, 6


def alpha(rng):
    array, kind = smooth(rng, 4), rng.choice([("png", {}), ("webp", {"lossless": True, "exact": True}), ("tiff", {})])
    array[: len(array) // 2, :, 3] = rng.choice([0, 255, 77])
    return saved(Image.fromarray(array), kind[0], **kind[1]), kind[0], on_white(array[..., :3], array[..., 3]), 1


def grey_alpha(rng):
    array = smooth(rng, 2)
    array[: len(array) // 2, :, 1] = rng.choice([0, 255, 77])
    content = saved(Image.fromarray(array, "LA"), rng.choice(["png", "tiff"]))
    return content, "png", on_white(array[..., :1], array[..., 1]), 1


def palette(rng):
    """With and without transparency: of one entry, or of each."""
    height, width, n = rng.randrange(8, 24), rng.randrange(8, 24), 8
    index = (np.arange(height)[:, None] + np.arange(width)) % n
    colours = np.array([rng.randrange(256) for _ in range(3 * n)]).reshape(n, 3)
    image, opaque = Image.fromarray(index.astype(np.uint8), "P"), np.full(n, 255)
    image.putpalette(colours.astype(np.uint8).tobytes())
    kind = rng.choice(["png", "gif", "plain png", "each"])
    options = {}
    if kind in ("png", "gif"):
        options["transparency"] = rng.randrange(n)
        opaque[options["transparency"]] = 0
    elif kind == "each":
        opaque = np.array([rng.randrange(256) for _ in range(n)])
        options["transparency"] = opaque.astype(np.uint8).tobytes()
    content = saved(image, "gif" if kind == "gif" else "png", **options)
    return content, "gif" if kind == "gif" else "png", on_white(colours[index], opaque[index]), 1


def sixteen_grey(rng):
    deep = smooth(rng, 1)[..., 0].astype(np.uint16) * 257 - rng.randrange(200)
    kind = rng.choice(["png", "tiff", "big-endian tiff", "own png", "white is 0"])
    if kind == "own png":
        content = png(deep.astype(">u2"), 16, 0)
    elif kind == "big-endian tiff":
        content = saved(Image.frombytes("I;16B", deep.shape[::-1], deep.astype(">u2").tobytes()), "tiff")
    else:
        content = saved(Image.fromarray(deep), "png" if kind == "png" else "tiff")
        if kind == "white is 0":
            content, deep = tags_changed(content, t262=0), 65535 - deep
    return content, "tif" if "tif" in kind else "png", deep[..., None] / 257, 0.51


def sixteen_colour(rng):
    """Pillow takes the upper half of each number, which is within one level."""
    deep = smooth(rng).astype(np.uint16) * 257 - rng.randrange(200)
    return png(deep.reshape(len(deep), -1).astype(">u2"), 16, 2), "png", deep / 257, 1


def sixteen_alpha(rng):
    deep = smooth(rng, 4).astype(np.uint16) * 257
    content = png(deep.reshape(len(deep), -1).astype(">u2"), 16, 6)
    return content, "png", on_white(deep[..., :3] / 257, deep[..., 3] / 257), 1


def thirty_two(rng):
    deep = smooth(rng, 1)[..., 0].astype(np.int64) * 2**23
    content = saved(Image.fromarray(deep.astype(np.int32)), "tiff")
    if rng.random() < 0.5:
        return tags_changed(content, t339=1), "tif", deep[..., None] * (255 / (2**32 - 1)), 0.51
    return content, "tif", deep[..., None] * (255 / (2**31 - 1)), 0.51


def turned(rng):
    array, number = smooth(rng), rng.randrange(10)  # 0 and 9 mean nothing
    how = {2: "[:, ::-1]", 3: "[::-1, ::-1]", 4: "[::-1]", 5: ".swapaxes(0, 1)", 6: "[::-1].swapaxes(0, 1)"}
    how |= {7: "[::-1, ::-1].swapaxes(0, 1)", 8: "[:, ::-1].swapaxes(0, 1)"}
    exif = Image.Exif()
    exif[274] = number
    kind, options = rng.choice([("jpeg", {"quality": 98, "subsampling": 0}), ("png", {}), ("webp", {"lossless": True})])
    content = saved(Image.fromarray(array), kind, exif=exif, **options)
    return content, kind, eval("array" + how.get(number, "")), 6 if kind == "jpeg" else 0


def cmyk(rng):
    array = smooth(rng, 4).astype(np.int64)
    array[..., 3] //= 3
    image = Image.frombytes("CMYK", array.shape[1::-1], array.astype(np.uint8).tobytes())
    kind, options, near = rng.choice([("tiff", {}, 1), ("jpeg", {"quality": 98, "subsampling": 0}, 8)])
    ink, black = array[..., :3], array[..., 3:]
    return saved(image, kind, **options), "jpg", np.maximum((255 - ink) * (255 - black) / 255, 0), near


def animated(rng):
    """The first frame of several."""
    array, kind = smooth(rng), rng.choice(["png", "webp", "gif"])
    first, later = Image.fromarray(array), [Image.fromarray(255 - array) for _ in range(2)]
    options = {"lossless": True} if kind == "webp" else {}
    content = saved(first, kind, save_all=True, append_images=later, **options)
    return (
        content,
        kind,
        np.asarray(first.quantize(256).convert("RGB")) if kind == "gif" else array,
        40 * (kind == "gif"),
    )


def with_more_behind_it(rng):
    content, *rest = rng.choice([colour, jpeg, alpha])(rng)
    return content + rng.randbytes(rng.randrange(1, 99)), *rest


def key(rng):
    """One transparent grey, in 8 bit."""
    array, chosen = smooth(rng, 1)[..., 0], rng.randrange(40, 256)
    array[0] = chosen
    content = png(array, 8, 0, chunk(b"tRNS", struct.pack(">H", chosen)))
    return content, "png", np.where(array == chosen, 255, array)[..., None], 0


# And these raise `Refused`.


def floats(rng):
    raise Refused(saved(Image.fromarray(smooth(rng, 1)[..., 0].astype(np.float32)), "tiff"), "tif")


def negative(rng):
    raise Refused(saved(Image.fromarray(-smooth(rng, 1)[..., 0].astype(np.int32)), "tiff"), "tif")


def dark(rng):
    """It would be black: small numbers, in 32 bit."""
    raise Refused(saved(Image.fromarray(smooth(rng, 1)[..., 0].astype(np.int32)), "tiff"), "tif")


def deep_key(rng):
    deep = smooth(rng).astype(np.uint16) * 257
    transparent = chunk(b"tRNS", struct.pack(">HHH", *map(int, deep[0, 0])))
    raise Refused(png(deep.reshape(len(deep), -1).astype(">u2"), 16, 2, transparent), "png")


def huge(rng):
    content = bytearray(colour_png(rng))
    sides = rng.choice([(2**31 - 1, 2**31 - 1), (100_000, 100_000), (0, 10), (10, 0), (2**32 - 1, 1), (30_000, 30_000)])
    content[16:24] = struct.pack(">II", *sides)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    raise Refused(bytes(content), "png")


def no_image(rng):
    content = rng.choice(
        [b"", b"\0" * 100, rng.randbytes(500), b"GIF89a", b"\xff\xd8\xff", b"<svg></svg>", b"II*\0" * 9]
    )
    raise Refused(content, rng.choice(["png", "jpg", "gif", "tif", "webp"]))


def colour_png(rng):
    return saved(Image.fromarray(smooth(rng)), "png")


# And these damage one that is right: it is refused, unless what was lost is no part of the picture.


def cut(rng):
    content, *rest = rng.choice([
        colour, grey, jpeg, alpha, palette, sixteen_grey, sixteen_colour, turned, cmyk, animated, thirty_two,
    ])(rng)  # fmt: skip
    return content[: rng.randrange(len(content))], *rest


def flipped(rng):
    """A bit of a PNG, whose checksums tell."""
    content, *rest = rng.choice([png_of, sixteen_colour, sixteen_alpha, key])(rng)
    content = bytearray(content)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content), *rest


def png_of(rng):
    array = smooth(rng)
    return saved(Image.fromarray(array), "png"), "png", array, 0


UNUSUAL = (
    colour, grey, black_and_white, jpeg, alpha, grey_alpha, palette, sixteen_grey, sixteen_colour, sixteen_alpha,
    thirty_two, turned, cmyk, animated, with_more_behind_it, key,
)  # fmt: skip
DAMAGED = (cut, cut, cut, flipped, flipped)
OTHERS = (floats, negative, dark, deep_key, huge, no_image)


@pytest.mark.filterwarnings("ignore")  # of Pillow, that a file is odd
def test_two_thousand_pictures(tmp_path):
    wrong = []
    for number in range(2000):
        rng = random.Random(number)
        make = rng.choice(UNUSUAL + DAMAGED + OTHERS)
        expected = None
        try:
            content, suffix, expected, near = make(rng)
        except Refused as refused:
            content, suffix = refused.args
        (file := tmp_path / f"x.{suffix}").write_bytes(content)
        label = f"{number}, {make.__name__}"
        try:
            actual = np.asarray(read_image(file)).astype(float)
            if make in OTHERS:
                wrong.append(f"{label}: read")
            elif actual.shape != np.broadcast_shapes(expected.shape, actual.shape):
                wrong.append(f"{label}: {actual.shape}, not {expected.shape}")
            elif (worst := np.abs(actual - expected).max()) > near:
                wrong.append(f"{label}: wrong by {worst}")
        except ValueError as error:
            if make in UNUSUAL or "\n" in str(error) or file.name not in str(error):
                wrong.append(f"{label}: {error}")
        except Exception as error:  # what the test is for
            wrong.append(f"{label}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join([f"{len(wrong)} of 2000", *wrong[:30]])
