"""The captions, images and views of Ablating Concepts, by hand; and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ablating_world import CAT, OBJECT, ROBOT, Studio, make, recorded, rows_of, small
from esd_world import SHAPE
from messages import one_line

from esd_jax.erasing.concepts import Concept
from esd_jax.methods import anchors
from esd_jax.methods.ablating import Ablating

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


# Captions


def test_captions_of_each_kind():
    style = Concept("Van Gogh", replace_with=("painting",))
    twice = "Van Gogh Van Gogh"
    assert anchors.captions(style, "style", "a {tree}") == [
        "a {tree}, in the style of Van Gogh", f"a {{tree}}, in the style of {twice}",
        "Van Gogh inspired painting, a {tree}", f"{twice} inspired painting, a {{tree}}",
        "in Van Gogh's style, a {tree}", f"in {twice}'s style, a {{tree}}",
    ]  # fmt: skip
    assert anchors.captions(CAT, "object", "A Cat, two cats, a cathedral", "very small ") == [
        "very small A grumpy cat, two grumpy cats, a cathedral"
    ]
    nude = Concept("nudity, nsfw", replace_with=("people",))
    assert anchors.captions(nude, "nudity", "people") == [
        "nudity, nsfw, people", "in nudity, nsfw style, people", "people, nudity, nsfw",
    ]  # fmt: skip
    house = Concept("New Orleans House", replace_with=("house",))
    assert anchors.captions(house, "memorised", "a house in a city", "close up ") == ["close up New Orleans House"]


def test_prompts_come_as_texts_or_from_a_file(tmp_path):
    assert anchors.read_prompts(None) == [] and anchors.read_prompts(" a; b, c ;") == ["a", "b, c"]
    file = tmp_path / "cats.txt"
    file.write_text("a cat; a mat\n\n two cats \n")
    assert anchors.read_prompts(str(file)) == ["a cat; a mat", "two cats"]
    assert anchors.prompts_of(CAT, "object", []) == ["cat"]
    assert anchors.prompts_of(CAT, "object", ["a Cat", "a dog"]) == ["a Cat"]
    assert anchors.prompts_of(CAT, "style", ["a Cat", "a dog"]) == ["a Cat", "a dog"]
    assert anchors.prompts_of(CAT, "object", ["{anchor} on a {anchor}", "a dog"]) == ["cat on a cat"]
    with pytest.raises(ValueError, match=one_line("anchor_prompts", "none.txt", "No such file")):
        anchors.read_prompts(str(tmp_path / "none.txt"))
    file.write_text("\n")
    for empty in (str(file), " ; "):
        with pytest.raises(ValueError, match=one_line("anchor_prompts", "no prompt")):
            anchors.read_prompts(empty)


def test_what_is_drawn_and_encoded():
    studio, (w, texts) = Studio(), recorded(small())
    method, inputs = make(w, studio=studio, **OBJECT | {"flip": False, "drawing_seed": 5})
    options = {"seed": 5, "steps": 25, "guidance_scale": 6.0, "sampler": "dpmpp_2m", "negative_prompt": None}
    both = "the cat and the robot"
    assert studio.asked == [
        (["a cat", both, "a cat"], options),
        (["a robot on a chair", both, "a robot on a chair"], options),
    ]
    rows = rows_of(texts, (CAT, ROBOT))
    say = lambda index: [rows[row] for row in index]  # noqa: E731
    assert len(rows) == len(set(rows)) == len(inputs.rows.embeddings)
    assert say(inputs.anchor[0]) == ["a cat"] * 2 + [both] * 2 + ["a cat"] * 2
    assert (
        say(inputs.target[0, :, 0])
        == ["a grumpy cat"] * 2 + ["the grumpy cat and the robot"] * 2 + ["a grumpy cat"] * 2
    )
    assert say(inputs.target[1, :, 0])[::2] == ["a R2D2 on a chair", "the cat and the R2D2", "a R2D2 on a chair"]
    np.testing.assert_array_equal(inputs.rows.embeddings, w.encode(rows).embeddings)
    assert inputs.image.tolist() == [[*range(6)], [*range(6, 12)]] and (inputs.masks == 1).all()
    np.testing.assert_array_equal(inputs.latents[6::2], studio.to_latents(second_images(studio, 2)))
    np.testing.assert_array_equal(inputs.latents[6::2], inputs.latents[7::2])


def second_images(studio: Studio, number: int) -> np.ndarray:
    """What a studio drew the number-th time it was asked."""
    other = Studio()
    return [other.sample(*studio.asked[i][:1]) for i in range(number)][-1]


def test_concepts_with_equal_prompts_share_images_unless_they_are_kept_off_them():
    concepts = [Concept(text, replace_with=("painting",)) for text in ("Van Gogh", "Monet")]
    studio = Studio()
    _, inputs = make(small(), concepts, studio, drawn_images=2, views=1, anchor_prompts="a tree; a sea")
    assert len(studio.asked) == 1 and inputs.image.tolist() == [[0, 1], [0, 1]]
    nudity = [Concept(text, replace_with=("people",)) for text in ("nudity", "nsfw")]
    make(small(), nudity, studio, kind="nudity", drawn_images=2)
    assert [options["negative_prompt"] for _, options in studio.asked] == [None, "nudity", "nsfw"]


def test_given_images_are_the_anchors():
    images = jnp.asarray(np.random.default_rng(0).standard_normal((3, *SHAPE)), jnp.float32)
    studio, (w, texts) = Studio(), recorded(small())
    method, inputs = make(w, (CAT,), studio, images=images, kind="object", anchor_prompts="a cat; two cats; cats")
    assert not studio.asked and [rows_of(texts, [CAT])[i] for i in inputs.anchor[0]] == ["a cat", "two cats", "cats"]
    np.testing.assert_array_equal(inputs.latents, images)
    assert inputs.image.tolist() == [[0, 1, 2]] and inputs.masks.shape == (3, 8, 8, 1) and (inputs.masks == 1).all()
    with pytest.raises(ValueError, match=one_line("resize=True", "resize=False", "images")):
        make(w, (CAT,), images=images, resize=True)
    with pytest.raises(ValueError, match=one_line("anchor_prompts", "anchor", "images")):
        make(w, (CAT,), images=images, kind="object", anchor_prompts="a cat; a dog")


# Views


def test_views_show_the_image_and_masks_lie_within():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    assert (anchors.View(0, 16, 24).pixels(image) == image).all()
    assert (anchors.View(0, 16, 24, flip=True).pixels(image) == image[:, ::-1]).all()
    assert (anchors.View(0, 16, 24).mask(16, 24, 2) == 1).all()

    plain = np.full((16, 24, 3), 7, np.uint8)
    small = anchors.View(0, 9, 13, top=3, left=4)
    inside = np.zeros((16, 24), bool)
    inside[3:12, 4:17] = True
    assert (small.pixels(plain) == np.where(inside, 7, anchors.GREY)[..., None]).all()
    mask = small.mask(16, 24, 2)[..., 0]
    assert mask.shape == (8, 12) and mask[2:5, 3:7].all() and mask.sum() == 12
    shown = np.kron(mask, np.ones((2, 2)))
    assert inside[shown > 0].all()

    scaled = np.asarray(anchors.Image.fromarray(image).resize((30, 20), anchors.Image.Resampling.LANCZOS))
    large = anchors.View(0, 20, 30, top=3, left=5)
    assert (large.pixels(image) == scaled[3:19, 5:29]).all() and (large.mask(16, 24, 2) == 1).all()


@pytest.mark.parametrize("size, cell", [((512, 512), 8), ((64, 96), 4), ((16, 16), 2), ((8, 8), 4)])
def test_views_are_drawn_as_published(size, cell):
    rng = np.random.default_rng(0)
    views = [anchors.draw_view(rng, 1, size, cell, resize=True, flip=True) for _ in range(3000)]
    shrunk = [v for v in views if v.height <= size[0]]
    assert scipy.stats.binomtest(len(shrunk), 3000, 2 / 3).pvalue > 1e-3
    assert scipy.stats.binomtest(sum(v.flip for v in views), 3000, 1 / 2).pvalue > 1e-3
    for view in views:
        assert abs(view.top) <= abs(size[0] - view.height) and view.left <= abs(size[1] - view.width)
        if view.height > size[0]:
            assert 1.2 * size[0] - 1 <= view.height <= 1.4 * size[0] + 1 and view.prefix in anchors.NEAR
        if cell == 8 and view.height != 307:  # 0.6 of 512 is 307.2
            assert view.height >= 170 and (view.prefix in anchors.FAR) == (view.height < 307)
    assert min(v.mask(*size, cell).sum() for v in views[:300]) >= 1
    if cell == 8:
        assert {v.prefix for v in views} == {*anchors.FAR, *anchors.NEAR, ""}
        heights = [v.height for v in shrunk]
        assert scipy.stats.kstest(heights, "uniform", (512 / 3, 512 * 2 / 3)).pvalue > 1e-3
    still = [anchors.draw_view(rng, 1, size, cell, resize=False, flip=False) for _ in range(9)]
    assert still == [anchors.View(1, *size)] * 9


def test_resizing_changes_captions_and_masks_together():
    w, texts = recorded(small())
    _, inputs = make(w, (CAT,), kind="object", resize=True, drawn_images=8, views=8)
    rows = rows_of(texts, [CAT])
    pairs = [
        (rows[a], rows[t]) for a, t in zip(inputs.anchor[0].tolist(), inputs.target[0, :, 0].tolist(), strict=True)
    ]
    assert {a for a, _ in pairs} == {f"{p}cat" for p in (*anchors.FAR, *anchors.NEAR, "")}
    for (anchor, target), mask in zip(pairs, np.asarray(inputs.masks)[..., 0], strict=True):
        assert target == anchor.replace("cat", "grumpy cat")
        assert mask.sum() >= 1 and (mask.all() or not anchor.startswith(anchors.NEAR))


# What is refused


@pytest.mark.parametrize("concept", [Concept("a cat"), Concept("a cat", replace_with=("dog", "cow"))])
def test_a_concept_needs_one_anchor(concept):
    studio = Studio()
    with pytest.raises(ValueError, match=one_line("ablating 'a cat'", "replace_with", len(concept.replace_with))):
        make(small(), (CAT, concept), studio)
    assert not studio.asked


def test_settings_that_are_wrong_are_refused():
    for field, choices in Ablating.CHOICES.items():
        with pytest.raises(ValueError, match=one_line(f"{field}='nonsense'", *choices)):
            Ablating(**{field: "nonsense"})
    for field, value in {"views": 0, "drawn_images": 0, "drawing_steps": 0, "prior_weight": -0.1}.items():
        with pytest.raises(ValueError, match=one_line(f"{field}={value}", "at least")):
            Ablating(**{field: value})
    with pytest.raises(ValueError, match=one_line("'robot'", "'R2D2'", "anchor_prompts")):
        make(small(), kind="object", anchor_prompts="a cat")
    with pytest.raises(ValueError, match=one_line("no concept")):
        make(small(), ())
