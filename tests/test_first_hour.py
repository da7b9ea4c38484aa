"""What somebody meets who knows diffusers: how objects show themselves, what opens, and what a mistake is answered."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from messages import one_line

import esd_jax
from esd_jax import api, compile_cache, display, families, formats, sampling
from esd_jax.erasure import Concept, Erasure
from esd_jax.evaluation.attacks import Adversary, Goal, Scored, Trial
from esd_jax.evaluation.evidence import Evidence, Finding, Pair, Table
from esd_jax.metrics.intervals import Estimate

NEON = Erasure((Concept("neon style"),), base="emoji", recipe={"method": "esd", "subset": "esd-x"}, step=300)
HOW = {"seed": 3, "steps": 2, "guidance_scale": 3.0, "sampler": "ddim"}


@pytest.fixture(scope="module")
def base():
    return esd_jax.load("emoji")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run's folder, and its erased pipeline in memory. The method is spelled as its paper does."""
    folder = tmp_path_factory.mktemp("runs") / "neon"
    return folder, esd_jax.erase(base, "neon style", method="UCE", replace_with="a drawing", output_dir=folder)


def assert_same_edits(found, expected):
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# How objects show themselves.


def test_a_pipeline_is_one_line(base, run):
    assert repr(base) == "<Pipeline emoji: SD 1, 64 px, float32, 9 M params>"
    erased = base.with_edits({}, NEON)
    said = "<Pipeline emoji: SD 1, 64 px, float32, 9 M params; erased: neon style (esd, 300 steps)>"
    assert repr(erased) == said
    assert repr(run[1]).endswith("erased: neon style (uce)>")  # solved, without steps
    assert len(repr(base.provenance)) < 300


def test_a_line_is_cut_where_it_would_be_too_long(base):
    many = dataclasses.replace(NEON, concepts=tuple(Concept(f"artist {i}\nand more") for i in range(50)))
    said = repr(base.with_edits({}, many))
    assert len(said) == 199 and "\n" not in said and said.endswith("...>")


def test_a_model_is_called_as_people_call_it():
    for name, called in {"sd14": "SD 1", "sd21": "SD 2", "sd21-base": "SD 2", "sdxl": "SDXL"}.items():
        configs, _ = api.architecture(name)
        assert families.of(configs).called(configs) == called


def test_numbers_of_parameters_are_short():
    said = {950: "950", 9_046_051: "9 M", 859_520_964: "860 M", 2_567_463_684: "2.6 B", 1_500: "2 k"}
    assert {number: display.count(number) for number in said} == said


def test_a_card_shows_the_same_and_escapes_it(base):
    record = dataclasses.replace(NEON, concepts=(Concept("<script>alert('x')</script> & co"),), license="mit <b>")
    shown = base.with_edits({}, record)._repr_html_()
    for words in ("SD 1", "64 px", "float32", "9 M params", "&lt;script&gt;", "&amp; co (esd, 300 steps)"):
        assert words in shown
    assert "<script>" not in shown
    shown = record._repr_html_()
    assert "esd-x" in shown and "300" in shown and "mit &lt;b&gt;" in shown and "<script>" not in shown


def test_a_record_is_one_line():
    assert repr(NEON) == "<Erasure neon style (esd, 300 steps) from emoji>"
    assert repr(Erasure(delta="esd-x.safetensors", erased=(NEON,))) == "<Erasure neon style (esd-x.safetensors)>"
    assert repr(Erasure()) == "<Erasure (empty)>"


def test_evaluation_results_are_a_table():
    share = Estimate(0.05, 0.01, 0.24, 20)
    finding = Finding("erased", "neon style in its own prompts", Estimate(1.0, 0.84, 1.0, 20), share)
    table = Table("Groups <1>", ("detected",), (("own & others", (share,)),), percent=("detected",))
    pairs = {"own": (Pair("a cat", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)),)}
    evidence = Evidence("<neon>", NEON, verdict=(finding,), tables=(table,), pictures=pairs)
    assert repr(evidence) == "<Evidence <neon>: 1 figure, 1 table, 1 pair>"
    assert repr(table) == "<Table Groups <1>: 1 rows of detected>"
    shown = evidence._repr_html_()
    assert "&lt;neon&gt;" in shown and "<neon>" not in shown and "Groups &lt;1&gt;" in shown
    row = re.search(r"<tr>(?:(?!</tr>).)*neon style in its own prompts.*?</tr>", shown)
    assert row and re.findall(r">([^<>]+)</td>", row[0])[1:] == ["100% (84–100%)", "5% (1–24%)", "–", "20"]
    assert "own &amp; others" in table._repr_html_() and table._repr_html_() in shown
    assert "Nothing was measured yet" in Evidence("neon")._repr_html_()


def test_what_holds_arrays_does_not_print_them():
    images = np.zeros((4, 16, 16, 3), np.uint8)
    goal = Goal("neon style", ("a cat in neon style",), images, lambda images: images.any(axis=(1, 2, 3)))
    trial = Trial("a cat", np.zeros((1, 77, 768)))
    hits = np.array([[True, False, True]])
    shown = {
        goal: "<Goal neon style: 1 prompts, 4 images>",
        trial: "<Trial 'a cat': of prompt 0>",
        Adversary("p4d", (trial,) * 3, 41.2, np.zeros((3, 10))): "<Adversary p4d: 3 trials, 41 s>",
        Scored("p4d", hits, np.zeros((1, 3, 8, 8, 3), np.uint8), (0,)): "<Scored p4d: the concept in 2 of 3 images>",
    }
    assert {repr(value): said for value, said in shown.items()} == {said: said for said in shown.values()}


# What opens.


def test_a_run_opens_as_its_erased_model(run):
    folder, erased = run
    found = esd_jax.load(folder)
    assert_same_edits(found.edits, erased.edits)
    assert found.provenance.source == "emoji" and found.provenance.erased == erased.provenance.erased
    assert_same_edits(esd_jax.load(str(folder), base="emoji").edits, erased.edits)
    half = esd_jax.load(folder, dtype="bfloat16")
    assert half.dtype == "bfloat16" and half.params["unet"]["conv_in.weight"].dtype == "bfloat16"
    assert_same_edits(half.edits, erased.edits)
    np.testing.assert_array_equal(esd_jax.sample(folder, "a cat", **HOW), esd_jax.sample(erased, "a cat", **HOW))


@pytest.fixture(scope="module")
def parts(run, tmp_path_factory):
    """What was erased, in files that are no whole checkpoint: kind -> file, and how its reader opens it."""
    folder, erased = tmp_path_factory.mktemp("parts"), run[1]
    files = {
        "a delta": (formats.export_delta(erased, folder / "delta.safetensors", dtype="float32"), formats.load_delta),
        "a difference": (
            formats.export_difference(erased, folder / "difference.safetensors"), formats.apply_difference
        ),
        "a LoRA": (folder / "lora.safetensors", formats.merge_lora),
    }  # fmt: skip
    formats.export_lora(erased, folder / "lora.safetensors", rank=4)
    return files


@pytest.mark.parametrize("kind", ["a delta", "a difference", "a LoRA"])
def test_a_part_opens_with_its_base_and_else_says_how(kind, parts, base):
    file, read = parts[kind]
    call = f"load({str(file)!r}, base='emoji')"
    with pytest.raises(ValueError, match=one_line(f"is {kind}, not a whole checkpoint: use {call}")):
        esd_jax.load(file)
    expected = read(base, file)
    for found in (esd_jax.load(file, base="emoji"), esd_jax.load(file, base=base)):
        assert_same_edits(found.edits, expected.edits)
        assert found.provenance.erased == expected.provenance.erased


def test_a_part_that_names_no_base_asks_for_it(parts, tmp_path):
    bare = tmp_path / "esd-x.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(parts["a delta"][0]), bare)
    with pytest.raises(ValueError, match=one_line("a delta", "base=...)", "that it was made from")):
        esd_jax.load(bare)
    assert esd_jax.load(bare, base="emoji").provenance.erased == (Erasure(delta="esd-x.safetensors", erased=()),)


def test_the_folder_of_a_unet_opens_with_its_base(run, base):
    unet = run[0] / "model" / "unet"
    with pytest.raises(ValueError, match=one_line("the folder of a UNet alone", "base=")):
        esd_jax.load(unet)
    found, whole = esd_jax.load(unet, base=base), esd_jax.load(run[0] / "model")
    for name, value in whole.params["unet"].items():
        np.testing.assert_array_equal(found.params["unet"][name], value, err_msg=name)


def test_what_does_not_go_together_is_refused(run, base, parts):
    with pytest.raises(ValueError, match=one_line("emoji", "whole checkpoint", "without base")):
        esd_jax.load("emoji", base=base)
    with pytest.raises(ValueError, match=one_line("dtype", "loaded already")):
        esd_jax.load(parts["a delta"][0], base=base, dtype="bfloat16")
    with pytest.raises(FileNotFoundError, match="model_index.json|no folder"):
        esd_jax.load(run[0] / "previews" / "nothing")


def test_architecture_and_opened_are_where_they_were():
    assert api.opened.__module__ == api.restore.__module__ == "esd_jax.loading"


# What a call takes.


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
    found = esd_jax.evaluate(base, run[1], "custom", steps=2, **options)
    (image,) = (tmp_path / "out" / "images" / "base").glob("*.png")
    drawn = image.stat().st_mtime_ns
    again = esd_jax.evaluate(base, run[1], "custom", num_steps=2, **options)  # as kept results name it
    assert found.measured_with == again.measured_with and found.measured_with["num_steps"] == 2
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
        ({"colour": 3}, ["'colour'", "none of the 54 names is close", "esd_jax.recipe.Recipe"]),
        ({"method": "sddd"}, ["method='sddd'", "did you mean 'sdd'? The methods are esd, all_but_one, sdd"]),
        ({"method": "lora"}, ["choose one of esd, all_but_one"]),
        ({"method": 3}, ["method=3", "choose one of esd"]),
        ({"subset": "esd_x"}, ["'esd_x'", "did you mean 'esd-x'?"]),
        ({"config": "emojy"}, ["'emojy'", "did you mean 'emoji'?"]),
        ({"config": "gardening"}, ["none of the", "config_names()"]),
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


# What a run tells while it goes on.


def test_a_callback_sees_every_update_and_changes_nothing(base, tmp_path):
    fields = {"config": "emoji", "steps": 4, "sampling_steps": 2, "timestep_mode": "grid", "seed": 5}
    seen, compiled, counts = [], [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    kept = esd_jax.erase(
        base, "neon style", output_dir=tmp_path / "run", on_step=lambda *told: seen.append(told), **fields
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [{"step": step, **metrics} for step, metrics in seen] == log
    for on_step in (None, lambda step, metrics: None):
        compiled.clear()
        assert_same_edits(esd_jax.erase(base, "neon style", on_step=on_step, **fields).edits, kept.edits)
        counts.append(len(compiled))
    assert counts[0] == counts[1] > 0
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(type(value) is float for _, metrics in seen for value in metrics.values())
    assert {*seen[0][1]} == {"loss", "grad_norm", "t", "seconds"} and seen[0][1]["loss"] > 0


def test_what_a_callback_raises_ends_training(base):
    def stop(step, metrics):
        raise RuntimeError(f"enough at {step}")

    with pytest.raises(RuntimeError, match="enough at 1"):
        esd_jax.erase(base, "neon style", config="emoji", steps=50, on_step=stop)


# Where programs are kept.

ASK = "import jax; from esd_jax import compile_cache; {}; print(jax.config.jax_compilation_cache_dir)"


@pytest.mark.parametrize(
    "env, before, expected",
    [
        ({}, "pass", "{tmp}/esd_jax/xla"),
        ({"ESD_JAX_COMPILATION_CACHE": "0"}, "pass", "None"),
        ({"ESD_JAX_COMPILATION_CACHE": "1"}, "pass", "{tmp}/esd_jax/xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "{tmp}/mine"}, "pass", "{tmp}/mine"),
        ({}, "jax.config.update('jax_compilation_cache_dir', 'own')", "own"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "pass", "None"),
    ],
)
def test_programs_are_kept_where_the_command_line_keeps_them(env, before, expected, tmp_path):
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(esd_jax.__file__).parent.parent), "HOME": str(tmp_path)}
    env = {"XDG_CACHE_HOME": "{tmp}", **env}
    env = clean | {name: value.format(tmp=tmp_path) for name, value in env.items()}
    command = [sys.executable, "-c", ASK.format(f"{before}; compile_cache.use()")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected.format(tmp=tmp_path)]


def test_the_verbs_ask_for_it_before_they_compile(base, monkeypatch):
    asked = []
    monkeypatch.setattr(compile_cache, "use", lambda: asked.append(True))
    esd_jax.sample(base, [], **HOW)
    with pytest.raises(FileNotFoundError):
        esd_jax.load("nothing/at/all")
    with pytest.raises(ValueError, match="lr"):
        esd_jax.erase(base, "neon style", lr=3)  # pyright: ignore[reportCallIssue]
    assert asked == [True] * 3
