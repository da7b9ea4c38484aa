"""Images laid out as one picture: every pixel where it belongs, captions that can be read."""

import jax.numpy as jnp
import numpy as np
import pytest
from messages import one_line
from PIL import Image

import esd_jax
from esd_jax.picture_grid import GAP

RNG = np.random.default_rng(0)


def images(n, height=10, width=16):
    return RNG.integers(0, 256, (n, height, width, 3), np.uint8)


def place(i, j, height=10, width=16, top=0, left=0):
    """Where the image of row i and column j lies, without captions."""
    y, x = top + i * (height + GAP), left + j * (width + GAP)
    return slice(y, y + height), slice(x, x + width)


def test_images_lie_row_by_row_on_white():
    source = images(5)
    picture = esd_jax.grid(source, rows=2, scale=1)
    assert isinstance(picture, Image.Image) and picture.mode == "RGB"
    assert picture.size == (3 * 16 + 2 * GAP, 2 * 10 + GAP)
    pixels, left = np.array(picture), np.full(picture.size[::-1], True)
    for i, image in enumerate(source):
        where = place(i // 3, i % 3)
        np.testing.assert_array_equal(pixels[where], image)
        left[where] = False
    assert (pixels[left] == 255).all()  # the gaps, and the place of the sixth


@pytest.mark.parametrize("n, size", [(1, (1, 1)), (6, (6, 1)), (7, (3, 3)), (8, (3, 3)), (16, (4, 4)), (20, (5, 4))])
def test_few_images_are_one_row_and_many_about_a_square(n, size):
    columns, rows = size
    expected = (columns * 16 + (columns - 1) * GAP, rows * 10 + (rows - 1) * GAP)
    assert esd_jax.grid(images(n), scale=1).size == expected


def test_small_images_are_enlarged_by_a_whole_factor():
    source = images(2, 64, 64)
    picture = np.array(esd_jax.grid(source))
    np.testing.assert_array_equal(picture[:, :128], source[0].repeat(2, 0).repeat(2, 1))
    assert esd_jax.grid(images(1, 128, 64)).size == (64, 128)
    assert esd_jax.grid(images(1, 50, 60)).size == (180, 150)
    assert esd_jax.grid(images(1, 4, 4), scale=5).size == (20, 20)


ONE = images(1)[0]
SAME = {  # forms of one image
    "uint8": ONE,
    "float32": ONE.astype(np.float32) / 255,
    "float64": ONE / 255,
    "jax": jnp.asarray(ONE, jnp.float32) / 255,
    "PIL": Image.fromarray(ONE),
    "RGBA": np.dstack([ONE, np.full(ONE.shape[:2], 255, np.uint8)]),
    "not contiguous": ONE[::-1][::-1],
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_of_an_image_is_the_same(form):
    for variant in (SAME[form], [SAME[form]], (SAME[form],)):
        np.testing.assert_array_equal(np.array(esd_jax.grid(variant, scale=1)), ONE)


def test_grey_and_transparent_images_become_rgb():
    grey = RNG.integers(0, 256, (10, 16), np.uint8)
    for picture in (grey, grey[..., None], [Image.fromarray(grey)]):
        np.testing.assert_array_equal(np.array(esd_jax.grid(picture, scale=1)), np.dstack([grey] * 3))
    clear = np.dstack([ONE, np.zeros(ONE.shape[:2], np.uint8)])
    assert (np.array(esd_jax.grid(clear, scale=1)) == 255).all()


def test_rows_may_differ_in_length_and_images_in_size():
    first, second = images(3), images(1, 8, 12)
    for pictures in ([first, second], [list(first), [second[0]]], (first, [Image.fromarray(second[0])])):
        pixels = np.array(esd_jax.grid(pictures, scale=1))
        assert pixels.shape == (24, 56, 3)
        for j in range(3):
            np.testing.assert_array_equal(pixels[place(0, j)], first[j])
        np.testing.assert_array_equal(pixels[14:22, :12], second[0])
        assert (pixels[14:, 16:] == 255).all() and (pixels[22:, :12] == 255).all()


def test_names_of_rows_stand_to_their_left():
    source, other = images(2, 64, 64), images(2, 64, 64)
    pixels = np.array(esd_jax.grid({"base": source, "erased": other}, scale=1))
    left = pixels.shape[1] - (2 * 64 + GAP)
    assert left > 20
    np.testing.assert_array_equal(pixels[place(0, 1, 64, 64, left=left)], source[1])
    np.testing.assert_array_equal(pixels[place(1, 0, 64, 64, left=left)], other[0])
    for top in (0, 64 + GAP):  # in the middle of its row
        ys, xs = np.nonzero((pixels[top : top + 64, :left] < 128).all(-1))
        assert abs(ys.mean() - 32) < 6 and xs.max() < left - GAP and np.ptp(ys) >= 8


def dark(pixels):
    """Where text is."""
    return np.nonzero((pixels < 128).all(-1))


def test_captions_stand_above_their_images():
    source = images(2, 128, 128)
    pixels = np.array(esd_jax.grid(source, captions=["a cat in neon style", "i"]))
    top = pixels.shape[0] - 128
    for j in range(2):
        np.testing.assert_array_equal(pixels[place(0, j, 128, 128, top=top)], source[j])
    ys, xs = dark(pixels[:top, :128])
    assert np.ptp(ys) >= 8 and 60 < np.ptp(xs) < 128 and abs(xs.mean() - 64) < 8  # letters of a readable size, centred
    assert 0 < len(dark(pixels[:top, 128 + GAP :])[0]) < len(ys) / 4


def test_captions_are_wrapped_and_never_leave_their_column():
    text = "an incomprehensibilities-and-more-and-more-and-more word among others that follow"
    one, many = (esd_jax.grid(images(2, 128, 128), captions=[words, ""]) for words in ("word", text))
    assert many.size[0] == one.size[0] and many.size[1] > one.size[1] + 2 * (one.size[1] - 128 - 4)
    pixels = np.array(many)
    assert (pixels[: many.size[1] - 128, 128:] == 255).all()


def test_captions_of_columns_stand_above_the_first_row_alone():
    rows = [images(3, 128, 128), images(3, 128, 128)]
    heads = esd_jax.grid(rows, captions=["a", "b", "c"])
    plain = esd_jax.grid(rows)
    top = heads.size[1] - plain.size[1]
    assert 12 <= top <= 30
    np.testing.assert_array_equal(np.array(heads)[top:], np.array(plain))
    each = esd_jax.grid(rows, captions=list("abcdef"))
    assert each.size[1] == plain.size[1] + 2 * top
    assert esd_jax.grid(images(1), captions="one").size[1] > 10


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"images": []}, ["there is no image"]),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, ["there is no image"]),
        ({"images": {}}, ["there is no image"]),
        ({"images": images(2) / 100}, ["floats must be 0 to 1", "x / 2 + 0.5"]),
        ({"images": np.full((1, 8, 8, 3), np.nan)}, ["floats must be 0 to 1", "nan"]),
        ({"images": images(2).astype(np.int32)}, ["uint8", "int32"]),
        ({"images": np.zeros((1, 8, 8, 5), np.uint8)}, ["[height, width, 3]", "[8, 8, 5]"]),
        ({"images": np.zeros((1, 3, 8, 8), np.uint8)}, ["[height, width, 3]", "[3, 8, 8]"]),
        ({"rows": 0}, ["rows=0 must be at least 1"]),
        ({"scale": 0}, ["scale=0 must be at least 1"]),
        ({"images": [images(2), images(2)], "rows": 3}, ["rows=3", "2 rows"]),
        ({"captions": ["a"]}, ["1 captions for 3 images"]),
        ({"images": [images(2), images(2)], "captions": ["a"] * 3}, ["3 captions for 4 images in 2 columns"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_laid_out_is_refused(arguments, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        esd_jax.grid(**{"images": images(3), **arguments})
