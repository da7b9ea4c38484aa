"""What is suggested for a name that nobody knows."""

import inspect

import pytest

from esd_jax import suggest

FIELDS = ("learning_rate", "steps", "seed", "subset", "batch_size", "preview_steps", "preview_every", "base")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("stpes", "steps"),
        ("Steps", "steps"),
        ("learning-rate", "learning_rate"),
        ("lr", "learning_rate"),
        ("learn", "learning_rate"),
        ("preview_step", "preview_steps"),
        ("bs", "batch_size"),
        ("b", ""),  # one letter is no abbreviation
        ("colour", ""),
        ("", ""),
    ],
)
def test_the_closest_name(name, meant):
    assert suggest.closest(name, FIELDS) == meant


def test_a_name_equal_but_for_its_case_wins_over_a_longer_one():
    assert suggest.closest("ESD", ("esd_x", "esd", "sdd")) == "esd"


def test_a_message_suggests_or_lists_a_few_but_never_many():
    many = [f"config_{i}" for i in range(43)]
    assert suggest.did_you_mean("stpes", FIELDS) == "did you mean 'steps'?"
    assert suggest.did_you_mean("colour", ("red", "blue")) == "choose one of red, blue"
    assert suggest.did_you_mean("colour", many) == "none of the 43 names is close"
    assert suggest.did_you_mean("colour", many, "see docs") == "none of the 43 names is close; see docs"


def test_a_function_refuses_unknown_keywords_with_what_was_meant():
    @suggest.keywords(num_images="give a prompt for each image", num_inference_steps="steps")
    def draw(prompts: list[str], *, steps: int = 50) -> int:
        """Draws."""
        return steps

    assert draw([], steps=3) == 3
    assert list(inspect.signature(draw).parameters) == ["prompts", "steps"] and draw.__doc__ == "Draws."
    for name, hint in [
        ("num_inference_steps", "did you mean steps=?"),
        ("step", "did you mean steps=?"),
        ("num_images", "give a prompt for each image"),
        ("colour", "it takes prompts, steps"),
    ]:
        with pytest.raises(TypeError) as error:
            draw([], **{name: 1})
        assert str(error.value) == f"draw() has no argument {name!r}: {hint}"
