"""Where a text names a phrase."""

import pytest

from esd_jax import wording


@pytest.mark.parametrize(
    "phrase, text",
    [
        ("cat", "A Cat sits"),
        ("cat", "two cats"),
        ("cat", "the cat's tail"),
        ("church", "churches, at noon"),
        ("Van Gogh", "in van  gogh’s style"),
        ("café", "a cafe\u0301 in Paris"),
        ("C++", "written in C++."),
        ("<toy>", "a photo of<toy>"),
        ("猫", "黒猫の絵"),
        ("Monet", "Monet風の絵"),
        ("potato", "two potatoes"),
        ("24", "number 24"),
    ],
)
def test_named(phrase, text):
    assert wording.names(phrase, text)


@pytest.mark.parametrize(
    "phrase, text",
    [
        ("cat", "a cathedral"),
        ("cat", "a bobcat"),
        ("church", "Winston Churchill"),
        ("art", "party"),
        ("24", "1245"),
        ("neon style", "neon and style"),
        ("C++", "vitamin C"),
        ("cat", "the cates"),
        ("cat", "cat5"),
        ("", "a cat"),
        (" ", "a cat"),
    ],
)
def test_not_named(phrase, text):
    assert not wording.names(phrase, text)
    with pytest.raises(ValueError, match="does not name"):
        wording.around(text, phrase)


def test_replaced_and_cut_out():
    assert wording.replaced("Cats, a cat and a cathedral", "cat", "grumpy cat") == (
        "grumpy cats, a grumpy cat and a cathedral"
    )
    assert wording.replaced("a cat", "cat", r"\1 dog") == r"a \1 dog"
    assert wording.replaced("two glasses, a glass's rim", "glass", "cup") == "two cups, a cup's rim"
    assert wording.replaced("two cats", "cat", "fox") == "two foxes"
    assert wording.around("two Cats on a cat", "cat") == ("two ", " on a cat")


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [("the cat", "cat"), ("An  owl", "owl"), ("a", "a"), ("theatre", "theatre"), ("Van Gogh", "Van Gogh"), ("", "")],
)
def test_a_phrase_without_its_article(phrase, expected):
    assert wording.bare(phrase) == expected
