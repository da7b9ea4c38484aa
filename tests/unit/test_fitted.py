"""What a config's fields become for other concepts than its own."""

import pytest

from esd_jax import kinds, recipe


@pytest.mark.parametrize(
    ("replace_with", "concepts", "method", "expected"),
    [
        ("a dog | a fox", ["a dog"], "esd", "a fox"),
        ("a dog | a fox", ["Dog"], "esd", "a fox"),
        ("a dog | a fox", ["the dog"], "esd", "a fox"),
        ("a dog | a fox", ["a cat"], "esd", "a dog"),  # and nothing of what is not used
        ("a dog | a fox", ["a cat", "a dog"], "uce", "a fox"),  # one for both
        ("a dog | a bird; a cat | a bird", ["a cat", "a dog"], "esd", "a dog; a cat"),  # each its own
        ("a dog | a bird", ["a dog"], "all_but_one", "a bird"),
        ("a dog | a bird", ["a cat"], "all_but_one", "a dog | a bird"),  # both count
        ("a dog | a bird", ["a cat"], "stereo", "a dog | a bird"),
        ("a dog", ["a dog"], "esd", "a dog"),  # the recipe refuses it, and names the config
        ("auto | a cat | a dog", ["a cat"], "esd", "auto | a cat | a dog"),
        ("auto", ["a cat"], "esd", "auto"),
        (["a dog", "a fox"], ["a cat", "a rose"], "esd", ["a dog", "a fox"]),  # a text for each, not its letters
        ([("a dog", "a fox"), None], ["a dog", "a cat"], "esd", "a fox; "),
        (5, ["a cat"], "esd", 5),  # the recipe refuses it
        ([5], ["a cat"], "esd", [5]),
        (None, ["a cat"], "esd", None),
    ],
)
def test_replacements(replace_with, concepts, method, expected):
    fitted = kinds.fitted({"method": method, "replace_with": replace_with}, concepts)
    assert fitted["replace_with"] == expected


def test_safe_prompts_of_double_projection_all_count():
    config = {"method": "uce", "project": True, "replace_with": "a dog | a lion | a bee"}
    assert kinds.fitted(config, ["a dog"])["replace_with"] == "a lion | a bee"
    assert kinds.fitted(config, ["a cat"]) == config


@pytest.mark.parametrize(
    ("preserve", "expected"),
    [
        ("a dog | a fox | two dogs in a car", "a fox"),
        (["a dog", "a fox"], "; a fox"),
        ("a fox; a dog | a cow", "a fox; a cow"),  # each concept keeps its own
        ("a fox | a cow", "a fox | a cow"),
    ],
)
@pytest.mark.parametrize("concept", ["a dog", "the dog", "dog"])
def test_preserved_prompts(preserve, expected, concept):
    assert kinds.fitted({"preserve": preserve}, [concept, "a cat"])["preserve"] == expected


def test_a_wrong_type_is_refused_by_the_recipe():
    with pytest.raises(ValueError, match="replace_with=5"):
        recipe.make(**kinds.fitted({"replace_with": 5, "concept": "a cat"}, ["a cat"]))
