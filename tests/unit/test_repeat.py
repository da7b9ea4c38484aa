"""The command that repeats an erasure makes the same recipe, whatever it was made of."""

import shlex

import pytest

from esd_jax import cli, kinds, recipe, repeat, several
from esd_jax.erasure import Concept, Erasure, Origin
from esd_jax.evaluation.report import card

CONCEPTS = ("ink style", "a unicorn", "a cat; a dog", "-dash", 'it\'s a "test"', "AC/DC")
NAMES = [name for name in recipe.config_names() if name != "sd14_memorised"]  # which has no concept


def record(name: str, **changes) -> Erasure:
    config = recipe.read(name).to_dict()
    plan = recipe.make(
        **{**kinds.fitted(config, several.texts_of(changes.get("concept", config["concept"]))), **changes}
    )
    return Erasure(concepts=plan.concepts, recipe=plan.flat(), step=plan.training.steps)


def computed(flat) -> dict:
    return {name: value for name, value in flat.items() if name not in card.NOT_COMPUTED}


def made_by(line: str) -> dict:
    program, verb, *words = shlex.split(line)
    assert (program, verb) == ("esd-jax", "erase")
    return computed(recipe.make(**cli.VERBS["erase"].parse("erase", words).config.to_dict()).flat())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_of_every_config(name):
    erasure = record(name)
    assert made_by(repeat.command(erasure)) == computed(erasure.recipe)


@pytest.mark.parametrize("concept", CONCEPTS)
@pytest.mark.parametrize("name", ["emoji_contexts", "emoji_ablating", "sd14_style", "uce"])
def test_of_other_concepts(name, concept):
    erasure = record(name, concept=concept, seed=7)
    assert made_by(repeat.command(erasure)) == computed(erasure.recipe)


def test_a_method_keeps_its_name():
    assert repeat.command(record("emoji_uce")) == "esd-jax erase emoji 'neon style' --method=uce -o runs/again"
    ink = repeat.command(record("emoji_contexts", concept="ink style"))
    assert ink == "esd-jax erase emoji 'ink style' -o runs/again"
    assert repeat.command(record("emoji_uce"), "my runs/1").endswith(" --method=uce -o 'my runs/1'")
    own = repeat.command(record("emoji_ablating", kind="style"))  # the setting, which the flag is with a config only
    assert "--config=" in own and "--kind=style" in own


def test_what_no_command_repeats():
    erasure = record("emoji")
    started = Erasure(concepts=erasure.concepts, recipe=erasure.recipe, started_from=Origin("x"))
    assert repeat.command(started) == repeat.command(Erasure()) == card.command(started) == ""
    texts = recipe.make(concept=[Concept("a; b")], method="uce", steps=0, subset="esd-x-strict")
    assert repeat.command(Erasure(concepts=texts.concepts, recipe=texts.flat())) == ""
    stopped = Erasure(concepts=erasure.concepts, recipe=erasure.recipe, step=50)
    assert made_by(repeat.command(stopped))["steps"] == 50


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("erase emoji neon -o x", "esd-jax erase --resume emoji neon -o x"),
        ("erase emoji neon --overwrite --start_from y -o x", "esd-jax erase --resume emoji neon -o x"),
        ("erase neon --overwrite=true --start_from=y --noresume", "esd-jax erase --resume neon"),
        ("erase emoji -- --overwrite", "esd-jax erase --resume emoji -- --overwrite"),
    ],
)
def test_the_command_that_continues(typed, expected):
    assert cli.continuation(typed.split()) == expected
