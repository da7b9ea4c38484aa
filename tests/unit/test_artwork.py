"""The embedded artwork: its pixels, its vocabulary, its placement and styles, and how it is built from its packages."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from esd_jax.demo import artwork, build, drawing, vocabulary
from esd_jax.demo.artwork import Placement, draw, random_placement

OBJECTS, STYLES = vocabulary.objects(), vocabulary.styles()


@pytest.fixture(scope="module")
def drawn():
    """(object, style) -> the picture in the middle, as floats."""
    return {(name, style): draw(name, style).astype(np.float32) for name in OBJECTS for style in STYLES}


def test_the_sheet_is_the_one_that_is_pinned():
    sheet = Image.open(artwork.FILE)
    assert sheet.mode == "RGBA" and sheet.size == (64 * len(artwork.SETS), 64 * len(OBJECTS))
    assert hashlib.sha256(np.asarray(sheet).tobytes()).hexdigest() == build.PIXELS_SHA256
    assert tuple(package.set for package in build.PACKAGES) == artwork.SETS
    for (name, source), sprite in artwork._sprites().items():
        assert 0.15 < np.asarray(sprite)[..., 3].mean() / 255 < 0.9, f"{name} of {source} is empty or full"


def test_the_vocabulary_is_consistent():
    assert len(OBJECTS) == len(set(OBJECTS)) == 44 and len(STYLES) == len(set(STYLES)) == 8
    for field in ("hexcode", "label"):
        assert len({getattr(entry, field) for entry in vocabulary.OBJECTS}) == 44
    assert all(chr(int(entry.hexcode, 16)) for entry in vocabulary.OBJECTS)
    assert tuple(drawing.STYLES) == STYLES and {style.source for style in drawing.STYLES.values()} == set(artwork.SETS)
    kinds = vocabulary.categories()
    assert set(kinds) == set(vocabulary.KEYWORDS) and not set(kinds) & {*OBJECTS, *STYLES}
    assert all(len(vocabulary.members(kind)) >= 2 for kind in kinds)
    # The members of all categories, in order, are the objects.
    assert tuple(name for kind in kinds for name in vocabulary.members(kind)) == OBJECTS
    assert all(name in vocabulary.members(vocabulary.category(name)) for name in OBJECTS)
    with pytest.raises(KeyError):
        vocabulary.category("zebra")


def test_pairs_and_those_held_out():
    held = vocabulary.held_out()
    assert len(held) == 24 and len({name for name, _ in held}) == 24
    assert Counter(style for _, style in held) == dict.fromkeys(STYLES, 3)
    assert set(vocabulary.categories()) - {vocabulary.category(name) for name, _ in held} == {"building"}
    everything = vocabulary.pairs()
    assert everything == [(name, style) for style in STYLES for name in OBJECTS] and held < set(everything)
    assert vocabulary.pairs(unseen=False) == [pair for pair in everything if pair not in held]
    without = vocabulary.pairs(("neon", "ink"), unseen=False)
    assert without == [p for p in everything if p not in held and p[1] not in ("neon", "ink")]


def test_pictures_are_uint8_and_the_same_every_time():
    rng = np.random.default_rng(3)
    for style in STYLES:
        placement = random_placement(rng)
        picture = draw("owl", style, placement)
        assert picture.dtype == np.uint8 and picture.shape == (64, 64, 3)
        np.testing.assert_array_equal(picture, draw("owl", style, placement))
    for unknown in (("zebra", "neon"), ("owl", "baroque")):
        with pytest.raises(KeyError):
            draw(*unknown)


def test_every_style_and_every_object_looks_different(drawn):
    for name in OBJECTS:
        for one, other in combinations(STYLES, 2):
            assert np.abs(drawn[name, one] - drawn[name, other]).mean() > 20, (name, one, other)
    for style in STYLES:
        for one, other in combinations(OBJECTS, 2):
            assert np.abs(drawn[one, style] - drawn[other, style]).mean() > 5, (style, one, other)


def placements(n=20):
    rng = np.random.default_rng(8)
    return [random_placement(rng) for _ in range(n)]


def test_pixel_art_is_constant_on_the_latents_grid():
    for placement in placements():
        blocks = draw("fox", "pixel", placement).reshape(16, 4, 16, 4, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()
        levels = np.round(np.arange(8) / 7 * 255)
        assert np.isin(blocks, levels).all()


def test_halftone_mixes_two_colours_alone():
    cream, red = np.array([255, 248, 220]), np.array([200, 20, 60])
    for name in ("skull", "pizza", "whale"):
        for placement in placements(5):
            picture = draw(name, "halftone", placement).astype(np.float64)
            share = (picture - cream) @ (red - cream) / ((red - cream) @ (red - cream))
            assert share.min() > -0.01 and share.max() < 1.01 and share.max() > 0.9
            assert np.abs(picture - (cream + share[..., None] * (red - cream))).max() <= 0.6  # rounding to uint8


def test_blueprint_rules_its_paper_every_eight_pixels():
    picture = draw("star", "blueprint", Placement(0.5))
    corner = picture[:16, :16]
    ruled = np.arange(16) % 8 == 0
    lines = ruled[:, None] | ruled[None]
    assert (corner[lines] == (48, 90, 178)).all() and (corner[~lines] == (24, 62, 150)).all()


def test_placement_moves_and_scales_the_picture():
    middle = draw("car", "cartoon", Placement(0.5))
    np.testing.assert_array_equal(
        draw("car", "cartoon", Placement(0.5, 5, -7)),
        np.roll(middle, (-7, 5), axis=(0, 1)),
        "x: right, y: down",
    )
    assert (middle[:16] == 255).all() and (middle[48:] == 255).all() and (middle[:, :16] == 255).all()
    large = draw("car", "cartoon", Placement(1.0))
    assert (large != 255).any(axis=-1).sum() > 3 * (middle != 255).any(axis=-1).sum()


def test_random_placements_cover_their_range_and_never_cut_the_sprite():
    rng = np.random.default_rng(0)
    square = Image.new("RGBa", (64, 64), (255,) * 4)
    placements = [random_placement(rng) for _ in range(3000)]
    rows, columns = np.zeros(64, bool), np.zeros(64, bool)
    for placement in placements:
        opaque = artwork._place(square, placement)[..., 3] == 1
        assert opaque.sum() == round(64 * placement.scale) ** 2, placement
        rows, columns = rows | opaque.any(axis=1), columns | opaque.any(axis=0)
    assert rows.all() and columns.all(), "some of the picture is never reached"
    scale, x, y = np.array(placements).T
    room = 32 * (1 - scale)
    for values in ((scale - 0.85) / 0.07, x / room, y / room):  # uniform in [-1, 1]: Kolmogorov-Smirnov at 1e-4
        values = np.sort((values + 1) / 2)
        assert values[0] >= 0 and values[-1] <= 1
        assert np.abs(values - np.arange(3000) / 3000).max() < np.sqrt(np.log(2 / 1e-4) / 6000)
    assert np.abs(np.corrcoef([scale, x / room, y / room]) - np.eye(3)).max() < 0.08


CAT, STAR = (entry for entry in vocabulary.OBJECTS if entry.name in ("cat", "star"))
# The cat by its code point, through two aliases, one of which mirrors; the star by its Unicode name. Both lie off 0, 0.
DRAWINGS = {
    "icons": {
        "half": {"body": '<path fill="#f00" d="M10 20h8v16h-8z"/>'},
        "star": {"body": '<path fill="currentColor" d="M10 20h16v8h-16z"/>'},
    },
    "aliases": {"mirrored": {"parent": "half", "hFlip": True}, "kitty": {"parent": "mirrored"}},
    "left": 10,
    "top": 20,
}
CHARACTERS = {"1f431-fe0f": "kitty", "1f600": "half"}


def pack(folder, name, files):
    """An npm package's archive in `folder`, as a `Package` that pins it."""
    path = folder / f"{name}-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return build.Package(name, f"@{name}", "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest())


def pack_drawings(folder, drawings=DRAWINGS):
    files = {"icons.json": drawings, "chars.json": CHARACTERS}
    return pack(folder, "drawings", {name: json.dumps(value).encode() for name, value in files.items()})


def pack_renders(folder, *codes):
    image = Image.new("RGBA", (128, 128), (0, 0, 255, 255))
    image.paste((0, 0, 0, 0), (0, 0, 128, 64))
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=True)
    return pack(folder, "renders", {f"assets/{code}.webp": encoded.getvalue() for code in codes})


@pytest.fixture
def two_objects(monkeypatch):
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(vocabulary, "OBJECTS", (CAT, STAR))


def test_build_renders_every_kind_of_package(tmp_path, monkeypatch, two_objects):
    monkeypatch.setattr(build, "PACKAGES", (pack_drawings(tmp_path), pack_renders(tmp_path, "1f431", "2b50-fe0f")))
    sheet = np.asarray(build.build(tmp_path, fetch=False))
    assert sheet.shape == (128, 128, 4)
    cat, star, cat_3d, star_3d = sheet[:64, :64], sheet[64:, :64], sheet[:64, 64:], sheet[64:, 64:]
    assert (cat[:, 36:] == (255, 0, 0, 255)).all() and (cat[:, :28, 3] == 0).all(), "mirrored: red on the right"
    assert (star[:28] == (0, 0, 0, 255)).all() and (star[36:, :, 3] == 0).all()
    for render in (cat_3d, star_3d):
        assert (render[:28, :, 3] == 0).all() and (render[36:] == (0, 0, 255, 255)).all()


def test_build_refuses_other_archives_and_missing_icons(tmp_path, monkeypatch, two_objects):
    drawings, renders = pack_drawings(tmp_path), pack_renders(tmp_path, "1f431")

    def attempt(package):
        monkeypatch.setattr(build, "PACKAGES", (package,))
        build.build(tmp_path, fetch=False)

    with pytest.raises(KeyError, match="2B50"):
        attempt(renders)
    with pytest.raises(ValueError, match=f"drawings-1.0.0.tgz has sha256 {drawings.sha256}, not 000"):
        attempt(build.Package("drawings", "@drawings", "1.0.0", "0" * 64))
    with pytest.raises(FileNotFoundError, match="absent-1.0.0.tgz"):
        attempt(build.Package("absent", "@absent", "1.0.0", "0" * 64))
    attempt(drawings)
    without_star = {**DRAWINGS, "icons": {"half": DRAWINGS["icons"]["half"]}}
    with pytest.raises(KeyError, match="star"):
        attempt(pack_drawings(tmp_path, without_star))
    turned = {**DRAWINGS, "aliases": {**DRAWINGS["aliases"], "kitty": {"parent": "half", "rotate": 1}}}
    with pytest.raises(ValueError, match="kitty.*rotate.*not implemented"):
        attempt(pack_drawings(tmp_path, turned))


def test_build_fails_unless_the_pixels_are_those_of_the_model(tmp_path, monkeypatch, two_objects, capsys):
    monkeypatch.setattr(build, "PACKAGES", (pack_drawings(tmp_path),))
    output = tmp_path / "sheet.png"
    monkeypatch.setattr("sys.argv", ["build", f"--packages={tmp_path}", f"--output={output}"])
    with pytest.raises(SystemExit, match=build.PIXELS_SHA256):
        build.main()
    digest = hashlib.sha256(np.asarray(Image.open(output)).tobytes()).hexdigest()
    assert f"2 objects in 1 sets, pixels sha256 {digest}" in capsys.readouterr().out
    monkeypatch.setattr(build, "PIXELS_SHA256", digest)
    build.main()


def test_the_notice_names_every_source_and_travels_in_the_package():
    notice = (ROOT / "NOTICE").read_text()
    assert (artwork.FILE.parent / "NOTICE").read_text() == notice
    for package in build.PACKAGES:
        assert f"{package.name} {package.version}" in notice
    for style in STYLES:
        assert f'"{style}"' in notice
    for holder in (
        "Google LLC, Apache-2.0",
        "Twitter, Inc and other contributors, CC-BY",
        "Microsoft Corporation, MIT",
    ):
        assert holder in notice
    assert "by/4.0" in notice and "Changes were made" in notice and "Permission is hereby granted" in notice
