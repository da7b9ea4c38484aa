"""Pictures as a viewer shows them: upright, on white, in 8 bit sRGB; what is damaged ends in one line."""

import numpy as np
import pytest
from messages import one_line
from paths import DATA
from PIL import Image, ImageCms

from esd_jax.evaluation import measures
from esd_jax.io.images import check_output, read_image, read_images, read_strip, write_strip

LEVELS = (0, 85, 170, 255)


def pixels(name):
    (image,) = read_images([DATA / name], (64, 64))
    return np.round((image + 1) * 127.5).astype(int)


def test_a_lying_picture_is_put_upright():
    """It was turned by its tag alone; JPEG is not exact."""
    assert np.abs(pixels("exif6.jpg") - np.rot90(pixels("plain.png"), -1)).mean() < 2


def test_what_is_transparent_is_white():
    np.testing.assert_array_equal(pixels("alpha_black.png"), pixels("plain.png"))


def test_sixteen_bits_are_scaled():
    ramp = pixels("gray16.png")
    assert tuple(ramp[0, [0, 21, 42, 63], 0]) == LEVELS and (ramp == ramp[:1, :, :1]).all()


def test_floating_point_numbers_are_refused():
    with pytest.raises(ValueError, match=one_line("float.tif", "floating-point", "8 or 16 bit")):
        pixels("float.tif")


def test_the_folder_of_an_evaluation_is_read_alike(tmp_path):
    for name in ("alpha_black.png", "plain.png"):
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    ((first, second),) = measures._real(tmp_path)
    np.testing.assert_array_equal(first, second)
    (tmp_path / "z.png").write_bytes((DATA / "plain.png").read_bytes()[:80])
    with pytest.raises(ValueError, match=one_line("z.png")):
        list(measures._real(tmp_path))


@pytest.mark.parametrize("shape", [(3, 64, 32, 3), (3, 48, 64, 3), (1, 8, 8, 3)])
def test_a_strip_says_how_many_images_it_has(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write_strip(images, tmp_path / "strip.png")
    np.testing.assert_array_equal(read_strip(tmp_path / "strip.png"), images)


def test_a_strip_of_an_earlier_version_has_square_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    Image.fromarray(np.concatenate(list(images), axis=1)).save(tmp_path / "strip.png")
    np.testing.assert_array_equal(read_strip(tmp_path / "strip.png"), images)
    Image.fromarray(np.zeros((8, 21, 3), np.uint8)).save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match=one_line("odd.png", "21 pixels", "2 images")):
        read_strip(tmp_path / "odd.png")


def test_names_that_were_given_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["imgs2;a.png", " lead.png", "~$pic.png"]
    for name in names:
        (tmp_path / name).write_bytes((DATA / "plain.png").read_bytes())
    assert len(read_images(names, (64, 64))) == 3
    with pytest.raises(ValueError, match=one_line("none;b.png", "No such file")):
        read_images(["none;b.png"], (64, 64))
    with pytest.raises(ValueError, match=one_line("~nouser/x.png", "no home folder")):
        read_images(["~nouser/x.png"], (64, 64))


def test_a_picture_too_narrow_to_be_cropped(tmp_path):
    Image.new("L", (100_000, 1), 7).save(tmp_path / "narrow.png")
    with pytest.raises(ValueError, match=one_line("narrow.png", "100000x1", "crop")):
        read_images([tmp_path / "narrow.png"], (64, 64))


def test_outputs_that_cannot_be_files(tmp_path):
    for name in (f"{'x' * 245}.png", "y" * 245):  # its name, but not that of what is written first
        with pytest.raises(OSError, match=one_line("cannot write", "too long")):
            check_output(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=one_line("cannot write", "file/x.png")):
        check_output(tmp_path / "file" / "x.png")
    check_output(tmp_path / "new" / "x.png")


def swapped_profile():
    """A profile of sRGB whose red and blue are exchanged, and which does not say that it is sRGB."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"tmp1").replace(b"bXYZ", b"rXYZ").replace(b"tmp1", b"bXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")).replace(b"sRGB", b"mine")


def test_colours_are_those_of_the_profile(tmp_path):
    image = Image.open(DATA / "plain.png").convert("RGB")
    image.save(tmp_path / "x.png", icc_profile=swapped_profile())
    expected, actual = (np.asarray(read_image(p)).astype(int) for p in (DATA / "plain.png", tmp_path / "x.png"))
    assert np.abs(actual - expected[..., ::-1]).max() <= 2
    for profile in (b"damaged", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        image.save(tmp_path / "x.png", icc_profile=profile)
        np.testing.assert_array_equal(read_image(tmp_path / "x.png"), expected)
