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


@suggest.keywords(
    {"num_images": "give a prompt for each image", "num_inference_steps": "steps", "generator": "seed"},
    renamed={"num_steps": "steps"},
)
def draw(prompts: list[str], *, steps: int = 50) -> int:
    """Draws."""
    return steps


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_inference_steps": 1}, "draw() has no argument 'num_inference_steps': did you mean steps=?"),
        ({"step": 1}, "draw() has no argument 'step': did you mean steps=?"),
        ({"num_images": 1}, "draw() has no argument 'num_images': give a prompt for each image"),
        ({"generator": 1}, "draw() has no argument 'generator': it takes prompts, steps"),
        ({"colour": 1}, "draw() has no argument 'colour': it takes prompts, steps"),
        ({"steps": 1, "num_steps": 1}, "draw() is given steps= by two names: leave num_steps= out"),
        ({"steps": 1, "num_inference_steps": 1}, "draw() is given steps= by two names: leave num_inference_steps= out"),
    ],
)
def test_a_function_refuses_unknown_keywords_with_what_was_meant(given, message):
    with pytest.raises(TypeError) as error:
        draw([], **given)
    assert str(error.value) == message


def test_a_function_that_refuses_unknown_keywords_is_otherwise_as_it_was():
    assert draw([], steps=3) == 3 and draw([]) == 50
    assert list(inspect.signature(draw).parameters) == ["prompts", "steps"] and draw.__doc__ == "Draws."


def test_a_former_name_is_taken_with_a_warning_where_it_is_used():
    with pytest.warns(DeprecationWarning, match="num_steps= is deprecated: it is steps= now") as warned:
        assert draw([], num_steps=7) == 7  # pyright: ignore[reportCallIssue]
    assert len(warned) == 1 and warned[0].filename == __file__
