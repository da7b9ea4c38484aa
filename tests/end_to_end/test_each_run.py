"""Several concepts, a run for each, trained in one compiled step: what each would be alone."""

import json
import shlex
import warnings
from pathlib import Path

import factories
import numpy as np
import pytest
from messages import one_line

import esd_jax
from esd_jax import api, cli, fusion, recipe
from esd_jax.methods import METHODS
from esd_jax.runs import each
from esd_jax.training.step import Metrics, State

# Plain gradient descent: where a gradient is all rounding, Adam would make whole updates of it.
FIELDS = {
    "steps": 3, "sampling_steps": 4, "timestep_mode": "grid", "optimizer": "sgd", "learning_rate": 30.0, "seed": 7,
    "subset": "esd-x-strict", "rank": 2, "preserve": "a bird", "preserve_images": 1, "preserve_worst_every": 2,
    "dtype": "float32",
}  # fmt: skip
CONCEPTS = ["cat", "dog"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "sd1"
    factories.make_sd1(folder)
    return esd_jax.load(folder)


@pytest.fixture(scope="module")
def erased(base, tmp_path_factory):
    """The folder of the runs, and their results."""
    folder = tmp_path_factory.mktemp("runs") / "each"
    return folder, esd_jax.erase_each(base, CONCEPTS, output_dir=folder, **FIELDS)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The same, by a run of its own for each concept."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    return folder, [esd_jax.erase(base, text, output_dir=folder / text, **FIELDS) for text in CONCEPTS]


def assert_close(ours, theirs, base, tolerance=1e-3):
    """Their changes of the base, to a part of the largest."""
    assert ours.edits.keys() == theirs.edits.keys()
    for name, value in theirs.edits.items():
        first = np.asarray(base.params["unet"][name.removeprefix("unet/")], np.float64)
        change, own = np.asarray(value) - first, np.asarray(ours.edits[name]) - first
        assert np.abs(change).max() > 0
        np.testing.assert_allclose(own, change, rtol=0, atol=tolerance * np.abs(change).max())


def test_each_is_what_it_would_be_alone(base, erased, alone):
    for ours, theirs in zip(erased[1], alone[1], strict=True):
        assert_close(ours, theirs, base)
    one, other = (np.asarray(model.edits[next(iter(model.edits))]) for model in erased[1])
    assert np.abs(one - other).max() > 0


def test_each_has_the_run_that_it_would_have_alone(base, erased, alone):
    for text, result in zip(CONCEPTS, erased[1], strict=True):
        ours, theirs = erased[0] / text, alone[0] / text
        names = {path.name for path in theirs.iterdir()} - {".lock"}
        assert {path.name for path in ours.iterdir()} - {".lock"} == names
        assert (ours / "run.json").read_text() == (theirs / "run.json").read_text()
        rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (ours, theirs)]
        assert [row["step"] for row in rows[0]] == [1, 2, 3]
        for own, row in zip(*rows, strict=True):
            np.testing.assert_allclose([own["loss"], own["t"]], [row["loss"], row["t"]], rtol=1e-4)
        for opened in (api.restore(ours), esd_jax.load(ours)):
            for name, value in result.edits.items():
                np.testing.assert_array_equal(opened.edits[name], value)


def test_they_go_on_where_they_were_stopped(base, erased, tmp_path):
    """One was further, and is taken back; the newest checkpoint of the other was damaged."""
    fields = {**FIELDS, "output_dir": tmp_path / "runs", "checkpoint_every": 1, "keep_checkpoints": 3}
    esd_jax.erase_each(base, CONCEPTS, **{**fields, "steps": 2})
    esd_jax.erase(base, "dog", resume=True, **{**fields, "output_dir": tmp_path / "runs" / "dog"})
    for file in (tmp_path / "runs" / "cat" / "checkpoints" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    with pytest.warns(each.LaterSteps, match="from step 1"):
        resumed = esd_jax.erase_each(base, CONCEPTS, resume=True, **fields)
    for ours, straight in zip(resumed, erased[1], strict=True):
        for name, value in straight.edits.items():
            np.testing.assert_array_equal(ours.edits[name], value)
    kept = [sorted(int(path.name) for path in (tmp_path / "runs" / t / "checkpoints").iterdir()) for t in CONCEPTS]
    assert kept == [[1, 2, 3], [1, 2, 3]]


def test_whole_tensors_and_a_folder_that_is_in_the_way(base, tmp_path):
    """Without a rank, and with what is preserved on trajectories; the text encoders are on the device once."""
    fields = {**FIELDS, "rank": 0, "preserve_images": 0, "preserve_worst_every": 0, "steps": 0}
    cat, dog = esd_jax.erase_each(base.provenance.folder, CONCEPTS, output_dir=tmp_path / "runs", **fields)
    for component in ("text_encoder", "vae"):
        for name, value in cat.params[component].items():
            assert value is dog.params[component][name]
    for options, words in (({}, ["cat", "exists"]), ({"resume": True}, ["fox", "no run to resume"])):
        with pytest.raises(OSError, match=one_line(*words)):
            esd_jax.erase_each(base, ["cat", "fox"], output_dir=tmp_path / "runs", **options, **fields)
    with pytest.raises(FileExistsError, match="is a run"):
        esd_jax.erase_each(base, CONCEPTS, output_dir=tmp_path / "runs" / "cat", overwrite=True, **fields)


class Kept:
    """Checkpoints of a run, of which none is damaged."""

    def __init__(self, name, *steps):
        self.folder, self.steps, self.dropped = Path(name) / "checkpoints", frozenset(steps), []

    def at(self, step, state):
        return state._replace(step=step)

    def drop_after(self, step):
        self.dropped.append(step)


@pytest.mark.parametrize(("steps", "start"), [(((), ()), 0), (((50,), ()), 0), (((50, 100), (50,)), 50)])
def test_runs_go_on_from_what_all_of_them_have(steps, start, unchecked):
    plan, state = recipe.make(concept="cat; dog", steps=400), State({}, (), 0, None, ())
    kept = [Kept(name, *own) for name, own in zip(CONCEPTS, steps, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", each.LaterSteps)
        states = each.resumed(kept, [state, state], [plan, plan])
    assert [one.step for one in states] == [start, start] and [own.dropped for own in kept] == [[start], [start]]


@pytest.mark.parametrize("steps", [((300, 400), (100, 200)), ((100,), (50,)), ((300, 400), ())])
def test_checkpoints_that_runs_do_not_share_are_never_removed(steps, unchecked):
    plan, state = recipe.make(concept="cat; dog", steps=400), State({}, (), 0, None, ())
    kept = [Kept(name, *own) for name, own in zip(CONCEPTS, steps, strict=True)]
    with pytest.raises(ValueError, match=one_line(f"cat: {sorted(steps[0])}", f"dog: {sorted(steps[1])}", "overwrite")):
        each.resumed(kept, [state, state], [plan, plan])
    assert not any(own.dropped for own in kept)


def test_a_closed_form_goes_on_with_what_was_not_begun(base, tmp_path):
    fields = {"method": "uce", "output_dir": tmp_path / "runs"}
    esd_jax.erase_each(base, ["cat"], **fields)
    esd_jax.erase_each(base, CONCEPTS, resume=True, **fields)
    assert all((tmp_path / "runs" / text / "run.json").is_file() for text in CONCEPTS)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        esd_jax.erase_each(base, CONCEPTS, resume=True, method="uce", output_dir=tmp_path / "none")


def test_the_runs_of_attributes_are_named_after_them():
    plan = recipe.make(concept="glasses; a hat; glasses", from_="a librarian; a librarian; a nurse", output_dir="runs")
    folders = [one.output_dir for one in each.plans(plan)]
    assert folders == ["runs/glasses-a-librarian", "runs/a-hat", "runs/glasses-a-nurse"]


def test_whose_loss_is_not_finite_is_said():
    logs = each.Logs([], 4)
    for loss in ([1.0, 2.0], [1.0, np.nan]):
        logs.add(Metrics(np.array(loss), np.ones(2), np.zeros(2)))
    assert logs.blamed(CONCEPTS) == ". Not finite: 'dog'"
    logs.write(6, {})
    assert logs.blamed(CONCEPTS) == ""


def test_one_at_a_time_and_without_a_folder(base, erased):
    for ours, theirs in zip(esd_jax.erase_each(base, CONCEPTS, at_once=1, **FIELDS), erased[1], strict=True):
        assert_close(ours, theirs, base)


def test_they_fuse(base, erased):
    fused, outcome = fusion.fuse(base, [api.opened(base, erased[0] / text) for text in CONCEPTS], samples=8)
    assert outcome.texts == (("cat",), ("dog",)) and fused.edits.keys() == erased[1][0].edits.keys()


def test_a_closed_form_is_solved_for_each(base):
    models = esd_jax.erase_each(base, CONCEPTS, config="uce", preserve="a bird")
    for text, ours in zip(CONCEPTS, models, strict=True):
        theirs = esd_jax.erase(base, text, config="uce", preserve="a bird")
        for name, value in theirs.edits.items():
            np.testing.assert_array_equal(ours.edits[name], value)


@pytest.mark.parametrize("method", sorted({name for name, one in METHODS.items() if one.trained} - {"stereo"}))
def test_every_method_s_steps_are_one_program(base, method):
    drawing = {"drawn_images": 1, "drawing_steps": 2}
    own = {"ablating": {"drawn_images": 1, **drawing}, "forget_me_not": {"inversion_steps": 0}, "redirect": drawing}
    more = own.get(method, {}) | ({"replace_with": "a bird"} if "replace_with" in METHODS[method].uses else {})
    plan = api.planned(base, CONCEPTS, method=method, steps=1, **more)
    each.check(plan)
    _, differ = each.alike(each.assembled(base, each.plans(plan)), CONCEPTS)
    assert any(differ) and not all(differ)


def test_what_does_not_train_alike_is_refused(base, tmp_path):
    wrong = [
        (["cat", "dog"], {"replace_with": ["a bird", ""], "timestep_mode": "grid"}, ["cat", "dog", "alike"]),
        (["cat", "Cat!"], {"output_dir": tmp_path}, ["cat", "name"]),
        (CONCEPTS, {"fsdp": 2}, ["fsdp=2"]),
        (CONCEPTS, {"at_once": 0}, ["at_once=0"]),
        (CONCEPTS, {"method": "stereo", "steps": 2000}, ["rounds"]),
        (CONCEPTS, {"rounds_every": 2, "contexts": "a bird in {}: a bird"}, ["rounds"]),
    ]
    for texts, fields, words in wrong:
        with pytest.raises(ValueError, match=one_line(*words)):
            esd_jax.erase_each(base, texts, **{"steps": 1, **fields})


def test_the_command(base, erased, tmp_path, capsys):
    folder = base.provenance.folder
    words = [f"--{name}={value}" for name, value in FIELDS.items()]
    command = ["erase", str(folder), "cat; dog", "--each", "-o", str(tmp_path / "each"), "--nopictures", *words]
    assert cli.main(command) == 0
    printed = "".join(capsys.readouterr())
    for text, result in zip(CONCEPTS, erased[1], strict=True):
        assert f"run    {tmp_path / 'each' / text}" in printed
        assert_close(api.restore(tmp_path / "each" / text), result, base)
    assert f"esd-jax fuse {tmp_path / 'each' / 'cat'} {tmp_path / 'each' / 'dog'}" in printed
    for more in ("--until=detection<=.1", "--stop_below=.1"):
        assert cli.main(["erase", str(folder), "cat; dog", "--each", "-o", str(tmp_path / "no"), more, *words]) == 2
        assert more.partition("=")[0] in "".join(capsys.readouterr())
    assert cli.main(["erase", str(folder), "cat; dog", "--at_once=2", "-o", str(tmp_path / "no"), *words]) == 2
    assert "--each" in "".join(capsys.readouterr())


def test_what_cannot_be_fused_is_merged(base, tmp_path, capsys):
    fields = {**FIELDS, "subset": "esd-u", "rank": 0, "preserve_images": 0, "preserve_worst_every": 0, "steps": 1}
    words = [f"--{name}={value}" for name, value in fields.items()]
    output = tmp_path / "my runs"
    command = ["erase", str(base.provenance.folder), "cat; dog", "--each", "-o", str(output), "--nopictures", *words]
    assert cli.main(command) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next, all in one model: ")]
    verb, *rest = shlex.split(line.removeprefix("next, all in one model: esd-jax "))
    assert cli.main(["fuse", *(str(output / text) for text in CONCEPTS), "-o", str(tmp_path / "x")]) == 2
    assert "no linear layer" in capsys.readouterr().err
    assert verb == "export" and cli.main([verb, *rest]) == 0
    merged = esd_jax.load(output / "merged")
    assert merged.provenance.erased[-1].texts == ("cat", "dog")
