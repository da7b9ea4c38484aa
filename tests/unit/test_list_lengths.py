"""How long a list is trained: updates for each concept, in all, and what is said where nobody says it."""

import dataclasses

import pytest
from messages import one_line

import esd_jax
from esd_jax import api, cli, recipe, repeat, runs, several
from esd_jax.cli import dry_run
from esd_jax.erasure import Erasure
from esd_jax.planning import plan as planning

LIST = ["a cat", "a rose", "a pizza", "a bee"]


def test_updates_grow_with_the_list():
    plan = recipe.make(concept=LIST, steps_each=30, steps=7)
    assert (plan.training.steps, plan.steps_each) == (120, 30)
    assert plan.flat()["steps"] == 120 and "steps_each" not in plan.flat()
    again = recipe.make(**plan.flat())
    assert again == plan and again.training.steps == 120
    assert recipe.make(concept="a cat", steps_each=30).training.steps == 30
    of_none = recipe.make(steps_each=30).flat()  # a config that leaves the concept to its user
    assert of_none["steps_each"] == 30 and recipe.make(**of_none | {"concept": "a; b"}).training.steps == 60
    longer = dataclasses.replace(plan, training=dataclasses.replace(plan.training, steps=500))
    assert recipe.make(**longer.flat()).training.steps == 500


def test_a_closed_form_and_a_negative_number_are_refused():
    with pytest.raises(ValueError, match=one_line("steps_each=5", "'uce'")):
        recipe.make(concept="a cat", method="uce", steps=0, steps_each=5)
    with pytest.raises(ValueError, match=one_line("steps_each=-1")):
        recipe.make(concept="a cat", steps_each=-1)


def test_steps_take_the_place_of_a_configs_updates_for_each():
    config = {"config": "emoji_list_esd"}
    assert api.planned("emoji", LIST, **config).training.steps == 400
    assert api.planned("emoji", LIST, **config, steps=50).training.steps == 50
    assert api.planned("emoji", LIST, **config, steps_each=50).training.steps == 200
    with pytest.raises(ValueError, match=one_line("steps and steps_each")):
        api.planned("emoji", LIST, steps=50, steps_each=50)
    with pytest.raises(ValueError, match=one_line("steps and steps_each")):
        recipe.preset("esd", steps=50, steps_each=50)


@pytest.mark.parametrize(
    ("steps", "concepts", "fields", "words"),
    [
        (400, 10, (), ["10 concepts", "400 updates", "about 40 for each", "steps_each=N"]),
        (200, 3, ("learning_rate",), ["about 66.7 for each"]),
        (400, 2, (), None),
        (0, 10, (), None),
        (400, 10, ("steps",), None),
        (400, 10, ("steps_each",), None),
    ],
)
def test_a_list_that_shares_a_recipes_updates_is_told(steps, concepts, fields, words):
    warning = several.shared_steps(steps, concepts, fields)
    assert warning is None if words is None else all(word in warning for word in words)


def test_python_warns_and_the_command_line_says_it(monkeypatch, capsys, unchecked):
    monkeypatch.setattr(runs, "run", lambda base, plan, **options: plan)
    with pytest.warns(UserWarning, match="about 100 for each"):
        esd_jax.erase("emoji", LIST, kind="object")
    assert esd_jax.erase("emoji", LIST, config="emoji_list_esd").training.steps == 400
    monkeypatch.setattr(dry_run, "report", lambda *_: None)
    for flags, warning in (([], True), (["--steps_each=9"], False), (["--config=emoji_list_esd"], False)):
        assert cli.main(["erase", "emoji", "; ".join(LIST), "--dry_run", *flags]) == 0
        assert ("about 100 for each" in capsys.readouterr().out) is warning


MEMORY = {"unet, float32": 100, "trained": 10, "state": 20, planning.GATHERED: 5, planning.STEP: 50}
SIZE = planning.Plan(("a",), 1, 10, 1, MEMORY, 0, 1.0, lambda: 7.0)


def test_a_dry_run_says_how_many_updates_each_concept_has(monkeypatch, capsys):
    monkeypatch.setattr(planning, "make_plan", lambda *_: SIZE)
    dry_run.report(recipe.make(base="emoji", concept=LIST, steps_each=30), None, False)
    assert "updates   120, about 30 for each of 4 concepts" in capsys.readouterr().out


def test_runs_that_are_trained_together_share_the_base():
    size = SIZE.together(3, 2)
    assert list(size.memory.values()) == [100, 30, 60, 5, 100] and size.certain == 190 and size.step_flops == 21
    assert SIZE.together(3).memory[planning.STEP] == SIZE.together(3, 8).memory[planning.STEP] == 150
    assert SIZE.together(1) == SIZE and "in each of 3 runs" in str(size)
    assert "a smaller at_once" in planning.check(size, 200) and "at_once" not in planning.check(SIZE, 180)
    with pytest.raises(ValueError, match="a smaller at_once"):
        planning.check(size, 189)


def test_the_plan_of_joint_runs_is_that_of_all(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(dry_run, "report", lambda plan, arch, compiling, *together: asked.append((plan, together)))
    names = "; ".join(LIST)
    for flags in (["--kind=object"], ["--kind=object", "--at_once=2"], ["--config=emoji_uce_object"]):
        assert cli.main(["erase", "emoji", names, "--each", "--dry_run", *flags]) == 0
    assert [together for _, together in asked] == [(4, None), (4, 2), (1, None)]
    assert [len(plan.concepts) for plan, _ in asked] == [1, 1, 1]


def test_the_command_that_repeats_it_has_its_length():
    """Four concepts of 75 are as many as three of the config's 100."""
    plan = api.planned("emoji", LIST, config="emoji_list_esd", steps_each=75)
    assert plan.training.steps == 300
    again = repeat.command(Erasure(concepts=plan.concepts, recipe=plan.flat(), step=300))
    assert "--config=emoji_list_esd" in again and "--steps=300" in again and "steps_each" not in again
