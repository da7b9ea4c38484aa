"""What calls take from somebody who knows diffusers, what they answer a mistake, and what they tell meanwhile."""

import inspect
import json

import emoji_runs
import jax
import numpy as np
import pytest
from emoji_runs import HOW, assert_same_edits
from messages import one_line

import esd_jax
from esd_jax import api, sampling
from esd_jax.training.loop import Stopped


@pytest.fixture(scope="module")
def base():
    return esd_jax.load("emoji")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return emoji_runs.erased_run(base, tmp_path_factory)


def test_one_prompt_is_one_image(base):
    one = esd_jax.sample(base, "a cat", **HOW)
    assert one.shape == (1, 64, 64, 3) and one.dtype == np.uint8
    np.testing.assert_array_equal(one, esd_jax.sample(base, ["a cat"], **HOW))
    np.testing.assert_array_equal(one, esd_jax.sample("emoji", "a cat", **HOW))


def test_the_former_name_of_steps_is_taken_with_a_warning(base):
    former = {"num_steps" if name == "steps" else name: value for name, value in HOW.items()}
    with pytest.warns(DeprecationWarning, match="num_steps= is deprecated: it is steps= now") as warned:
        drawn = esd_jax.sample(base, "a cat", **former)
    assert [one.filename for one in warned if one.category is DeprecationWarning] == [__file__]
    np.testing.assert_array_equal(drawn, esd_jax.sample(base, "a cat", **HOW))


def test_the_package_itself_uses_no_former_name(base, recwarn):
    inverted = esd_jax.purify(base, esd_jax.sample(base, "a cat", **HOW), steps=2)
    assert inverted.shape == (1, 64, 64, 3)
    assert not [one for one in recwarn if issubclass(one.category, DeprecationWarning) and "steps" in str(one.message)]


@pytest.mark.parametrize("verb", [esd_jax.sample, esd_jax.invert, esd_jax.purify], ids=lambda verb: verb.__name__)
def test_the_words_of_other_libraries_are_answered_with_ours(verb, base):
    for name, hint in {
        "num_inference_steps": "did you mean steps=?",
        "guidance": "did you mean guidance_scale=?",
        "num_images": "give a prompt for each image: [prompt] * 4",
    }.items():
        with pytest.raises(TypeError) as error:
            verb(base, "a cat", **{name: 3})
        assert str(error.value) == f"{verb.__name__}() has no argument {name!r}: {hint}"


def test_evaluations_take_the_same_word_and_keep_theirs(base, run, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt\na cat\n")
    options = {"output_dir": tmp_path / "out", "prompt_list": tmp_path / "prompts.csv"}
    evidence = esd_jax.evaluate(base, run[1], "custom", steps=2, **options)
    (image,) = (tmp_path / "out" / "images").glob("*/base/*.png")
    drawn = image.stat().st_mtime_ns
    again = esd_jax.evaluate(base, run[1], "custom", num_steps=2, **options)  # as kept results name it
    assert evidence.measured_with == again.measured_with and evidence.measured_with["num_steps"] == 2
    assert image.stat().st_mtime_ns == drawn


def test_a_number_of_steps_is_refused_by_the_name_that_it_was_given_by(base):
    for verb, second in ((esd_jax.sample, "a cat"), (esd_jax.invert, np.zeros((1, 64, 64, 3), np.uint8))):
        with pytest.raises(ValueError, match=one_line("steps=0 must be in 1..1000")):
            verb(base, second, steps=0)


def test_what_is_not_loaded_is_said_to_be(base):
    with pytest.raises(ValueError, match=one_line("'emoji'", "esd_jax.load('emoji')")):
        esd_jax.invert("emoji", np.zeros((1, 64, 64, 3), np.uint8))


def test_sample_says_the_same_in_both_places():
    public, inner = (inspect.signature(function).parameters for function in (esd_jax.sample, sampling.sample))
    assert list(public) == list(inner)
    assert all(public[name].default == inner[name].default for name in public)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"lr": 3}, ["'lr'", "did you mean 'learning_rate'?"]),
        ({"num_steps": 3}, ["did you mean 'steps'?"]),
        ({"iterations": 3}, ["did you mean 'steps'?"]),
        ({"train_method": "xattn"}, ["did you mean 'subset'?"]),
        ({"stpes": 3}, ["did you mean 'steps'?"]),
        ({"colour": 3}, ["'colour'", "none of the", "names is close", "erase --help"]),
        ({"method": "sddd"}, ["method='sddd'", "did you mean 'sdd'? The methods are esd, all_but_one, sdd"]),
        ({"method": "lora"}, ["choose one of esd, all_but_one"]),
        ({"method": 3}, ["method=3", "choose one of esd"]),
        ({"subset": "esd_x"}, ["'esd_x'", "did you mean 'esd-x'?"]),
        ({"config": "emojy"}, ["'emojy'", "did you mean 'emoji'?"]),
        ({"config": "gardening"}, ["none of the", "`esd-jax configs` lists them"]),
    ],
)
def test_a_mistake_is_answered_in_a_short_line(fields, words, base):
    with pytest.raises((ValueError, FileNotFoundError), match=one_line(*words)) as error:
        esd_jax.erase(base, "neon style", **{"steps": 1, **fields})
    assert len(str(error.value)) < 160


@pytest.mark.parametrize("given", ["esd", "ESD", "Esd"])
def test_a_method_is_known_whatever_its_case(given):
    assert api.recipe.make(method=given, concept="x").method == "esd"
    assert api.recipe.method_name("All-but-One") == "all_but_one"


def test_other_names_are_suggested_too(run, tmp_path):
    with pytest.raises(ValueError, match=one_line("'quikc'", "did you mean 'quick'?")):
        esd_jax.evaluate(run[1], run[1], "quikc", output_dir=tmp_path)
    with pytest.raises(ValueError, match=one_line("'p4D'", "did you mean 'p4d'?")):
        esd_jax.attacks.preset("p4D")
    with pytest.raises(ValueError, match=one_line("'Folder'", "did you mean 'folder'?")):
        esd_jax.export(run[1], tmp_path / "x", format="Folder")


def test_a_callback_sees_every_update_and_changes_nothing(base, tmp_path):
    fields = {"config": "emoji", "steps": 4, "sampling_steps": 2, "timestep_mode": "grid", "seed": 5}
    steps, compiled, counts = [], [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    kept = esd_jax.erase(
        base, "neon style", output_dir=tmp_path / "run", on_step=lambda *arguments: steps.append(arguments), **fields
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [{"step": step, **metrics} for step, metrics in steps] == log
    for on_step in (None, lambda step, metrics: None):
        compiled.clear()
        assert_same_edits(esd_jax.erase(base, "neon style", on_step=on_step, **fields).edits, kept.edits)
        counts.append(len(compiled))
    assert counts[0] == counts[1] > 0
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    assert all(type(value) is float for _, metrics in steps for value in metrics.values())
    assert {*steps[0][1]} == {"loss", "grad_norm", "t", "seconds"} and steps[0][1]["loss"] > 0


def test_what_a_callback_raises_ends_training(base):
    def stop(step, metrics):
        raise RuntimeError(f"enough at {step}")

    with pytest.raises(RuntimeError, match="enough at 1"):
        esd_jax.erase(base, "neon style", config="emoji", steps=50, on_step=stop)


def test_a_callback_stops_a_run_as_a_signal_does(base, tmp_path):
    fields = {"config": "emoji", "steps": 5, "sampling_steps": 2, "timestep_mode": "grid", "seed": 5}
    whole = esd_jax.erase(base, "neon style", **fields)
    fields["output_dir"] = tmp_path / "run"
    with pytest.raises(Stopped, match=one_line("stopped at step 3 of 5")) as stopped:  # the host runs two ahead
        esd_jax.erase(base, "neon style", on_step=lambda step, _: step == 1, **fields)
    assert stopped.value.kept and not (tmp_path / "run" / "model").exists()
    steps = []
    again = esd_jax.erase(base, "neon style", resume=True, on_step=lambda step, _: steps.append(step), **fields)
    assert_same_edits(again.edits, whole.edits)
    assert steps == [4, 5]


def test_the_recipe_of_an_erasure_is_known_before_it():
    plan = api.planned("emoji", "neon style", steps=7, preserve="a cat")
    assert (plan.training.steps, plan.subset, plan.concepts[0].preserve) == (7, "esd-x-strict", ("a cat",))
    assert api.planned("emoji", "a cat").subset == "noxattn" != plan.subset
    with pytest.raises(ValueError, match=one_line("'stpes'", "did you mean 'steps'")):
        api.planned("emoji", "neon style", stpes=7)


def test_nothing_is_erased_by_a_chosen_recipes_own_concept():
    for base in ("emoji", "CompVis/stable-diffusion-v1-4"):
        with pytest.raises(ValueError, match=one_line("concept is empty")):
            esd_jax.erase(base)
