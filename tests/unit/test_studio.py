"""The studio's jobs and views, without a model and without a page."""

import threading
import time
from types import SimpleNamespace

import pytest
from messages import one_line

from esd_jax import progress, recipe
from esd_jax.erasure import Erasure
from esd_jax.runs.listing import Run
from esd_jax.studio import jobs, views, works
from esd_jax.studio.jobs import Desk, Job
from esd_jax.training.loop import Stopped

PATIENCE = 30


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "runs")


def carried_out(desk, work, **fields):
    job = desk.start(Job("erase", "Erasing cat", desk.folder / "cat", **fields), work)
    desk.wait(PATIENCE)
    return job


def test_one_job_at_a_time(desk):
    begun, go_on = threading.Event(), threading.Event()

    def work(job):
        begun.set()
        assert go_on.wait(PATIENCE)

    first = desk.start(Job("erase", "Erasing cat", desk.folder / "cat"), work)
    assert begun.wait(PATIENCE) and first.active
    refused = one_line("One job at a time", "Erasing cat", "stop it")
    with pytest.raises(ValueError, match=refused):
        desk.start(Job("attack", "Attacking cat", desk.folder / "cat"), work)
    with pytest.raises(ValueError, match=refused), desk.device():
        pass
    assert desk.job is first
    go_on.set()
    desk.wait(PATIENCE)
    assert first.state == "done"
    with desk.device():  # free again
        pass
    assert carried_out(desk, lambda job: None).state == "done"


@pytest.mark.parametrize(
    "error, state, note",
    [
        (ValueError("seed=-1 must\nbe in 0..7"), "failed", "seed=-1 must be in 0..7"),
        (OSError("cannot write to runs: no space left"), "failed", "cannot write to runs: no space left"),
        (FloatingPointError("loss is nan at step 3"), "failed", "loss is nan at step 3"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), "failed", jobs.OUT_OF_MEMORY),
        (KeyError("unet\nand more"), "failed", "KeyError: 'unet\\nand more'"),
        (Stopped("stopped at step 3 of 9", 15, True), "stopped", "stopped at step 3 of 9"),
    ],
)
def test_how_a_job_ends(desk, capsys, error, state, note):
    def work(job):
        raise error

    job = carried_out(desk, work)
    assert (job.state, job.note) == (state, note) and not job.active
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError | RuntimeError)  # shown in full


def test_a_job_follows_the_tasks_of_its_thread_and_ends_between_two_steps(desk):
    begun = threading.Event()

    def search(job):
        with progress.task("attacking", 2, unit="searches") as outer, progress.labelled("p4d on base"):
            with progress.task("searching", 1000, unit="steps", start="compiling") as task:
                assert [(one.name, one.note) for one in job.tasks] == [
                    ("attacking", ""), ("p4d on base: searching", "compiling")
                ]  # fmt: skip
                for step in range(1, 1000):
                    task.advance(note=f"loss {1 / step}")
                    begun.set()
                    time.sleep(0.01)
            outer.advance()

    job = desk.start(Job("attack", "Attacking cat", desk.folder / "cat"), search)
    assert begun.wait(PATIENCE)
    desk.stop()
    desk.wait(PATIENCE)
    losses = job.losses["p4d on base"]
    assert job.state == "stopped" and "kept" in job.note and not job.tasks
    assert losses[:2] == [1, 0.5] and len(losses) < 999


def test_training_is_not_ended_within_an_update(desk):
    def train(job):
        desk.stop()
        with progress.task("erasing", 3) as task:
            task.advance(note="loss 0.5")
        assert not job.losses  # they are in the run's log

    assert carried_out(desk, train).state == "done"


def test_the_bar_shows_the_state_of_a_job(desk, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: clock[0])
    assert "Nothing is running" in views.bar(None, None)
    job = Job("erase", "Erasing <b>", desk.folder / "b")
    assert "Erasing &lt;b&gt;</b> · loading<" in views.bar(job, None) and "value=" not in views.bar(job, None)
    before = views.state(job, None)
    with job.task("erasing", 40, 0, "", "compiling the step, once") as task:
        assert "erasing 0 of 40 · compiling the step, once<" in views.bar(job, None)
        task.advance(note="loss 0.5")
        clock[0] += 2
        task.advance(note="loss 0.25")
        assert views.state(job, None) != before
        assert "erasing 2 of 40 · loss 0.25 · 76 s left<" in views.bar(job, None)  # 2 s an update, but for the first
        with job.task("sampling", 4, 2, "images", ""):
            shown = views.bar(job, None)
    assert "sampling 2 of 4 images" in shown and f'value="{2.5 / 40:.4f}"' in shown
    job.state = "stopping"
    assert "stopping after this step" in views.bar(job, None)
    job.state, job.note = "stopped", "stopped at step 10 of 40"
    shown = views.bar(job, None)
    assert shown.count("stopped at") == 1 and "<progress" not in shown and "· stopped ·" not in shown
    job.state, job.note = "failed", "no space left\nand where"
    assert "failed · no space left<" in views.bar(job, None)


def test_an_empty_number_is_asked_for(desk):
    with pytest.raises(ValueError, match=one_line("Seed", "whole number")):
        desk.images(SimpleNamespace(), 1.0, ["a cat"], None)
    with pytest.raises(ValueError, match=one_line("Seeds", "whole number")):
        works.attack(desk, SimpleNamespace(), ["p4d"], "", None)
    with pytest.raises(ValueError, match=one_line("Images", "whole number")):
        works.curve(desk, SimpleNamespace(), None)


def test_a_later_run_in_a_folder_of_the_same_name_is_another_one(tmp_path):
    def made():
        (tmp_path / "run.json.partial").touch()
        (tmp_path / "run.json.partial").rename(tmp_path / "run.json")
        return Run(tmp_path, Erasure(), recipe.make(concept="x"), 0)

    first = made()
    assert first.identity == Run(tmp_path, Erasure(), first.plan, 0).identity != made().identity


def test_what_is_empty_says_what_to_do():
    for view in (views.previews, views.attacked, views.report, views.written, views.details):
        assert 'class="empty"' in view(None, None), view
    assert views.losses(None, None) == views.front(None, None) == views.prompts(None, 2) == ""
    assert "strengthened" in views.meaning(-0.05) and "base" in views.meaning(0.0)
    assert len({views.meaning(s) for s in (-0.5, 0.0, 0.5, 1.0, 1.5)}) == 5


def test_a_recipe_from_the_forms():
    plan = works.plan("emoji", "neon style; ink style", steps="30", preserve="a cat | a dog", rank="", eta=None)
    assert [one.text for one in plan.concepts] == ["neon style", "ink style"]
    assert plan.concepts[0].preserve == ("a cat", "a dog") and plan.subset == "esd-x-strict"
    assert (plan.training.steps, plan.training.preview_every) == (30, 2)
    plan = works.plan("emoji", "a cat", more='sampling_steps = 3\nremat = true\nsubset = "esd-x"', preview_every="7")
    assert (plan.settings.sampling_steps, plan.remat, plan.subset) == (3, True, "esd-x")
    assert plan.training.preview_every == 7
    assert works.plan("emoji", "a cat", "style").subset == "esd-x-strict"
    assert works.plan("emoji", "a cat", method="uce").training.steps == 0


@pytest.mark.parametrize(
    "given, words",
    [
        ({"concept": " "}, ["Name what is to be erased"]),
        ({"steps": "many"}, ["steps=many", "no number"]),
        ({"steps": "2.5"}, ["steps=2.5", "int"]),
        ({"more": "stpes = 3"}, ["'stpes'", "did you mean 'steps'"]),
        ({"more": "subset = esd-x"}, ["Further fields", "texts in quotes"]),
        ({"method": "uce", "steps": "5"}, ["steps", "uce"]),
        ({"kind": "attribute"}, ["from_"]),
        ({"more": 'concept = "a dog"'}, ["Further fields", "concept", "Leave it out"]),
        ({"more": 'kind = "object"'}, ["Further fields", "kind"]),
        ({"more": 'output_dir = "x"'}, ["Further fields", "output_dir"]),
    ],
)
def test_a_mistake_in_the_forms_ends_in_one_line(given, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        works.plan(**{"base": "emoji", "concept": "a cat", **given})
