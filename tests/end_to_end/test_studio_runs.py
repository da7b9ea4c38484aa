"""The studio's jobs on the embedded model: erase, stop, resume, compare, strengthen, attack, report and export."""

import html
import re
import shlex
import time
import zipfile

import numpy as np
import pytest
from messages import one_line

import esd_jax
from esd_jax import cli
from esd_jax.demo import MODEL
from esd_jax.io.exact import with_strength
from esd_jax.runs import listing
from esd_jax.studio import views, works
from esd_jax.studio.jobs import Desk

PROMPTS = ["a cat in neon style", "a cat", "<b>"]
HOW = {"steps": 2, "guidance_scale": 3.0}
PATIENCE = 600
pytestmark = pytest.mark.slow


def carried_out(desk, job):
    desk.wait(PATIENCE)
    assert job.state == "done", job.note
    return listing.read(job.folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return Desk(tmp_path_factory.mktemp("studio") / "runs")


@pytest.fixture(scope="module")
def run(desk):
    """A run by a method in closed form, which is made at once."""
    plan = works.plan("emoji", "neon style", method="uce", replace_with="a drawing")
    return carried_out(desk, works.erase(desk, plan))


def test_a_run_is_made_and_listed(desk, run):
    assert (run.name, run.finished, run.step, run.label) == (
        "neon-style",
        True,
        0,
        "neon-style · neon style from emoji",
    )
    assert [one.name for one in listing.listed(desk.folder)] == ["neon-style"]
    assert (run.folder / "before_after.png").is_file()
    (update, images), = run.previews().items()  # fmt: skip
    assert update == 0 and [image.shape for image in images] == [(64, 64, 3)] * len(run.plan.previews)
    assert run.thumbnail().shape == (64, 64 * len(images), 3)
    assert views.previews(None, run).count("<img") == len(images)
    assert "esd-jax report" in views.details(None, run) and views.prompts(run, 1).splitlines()[0] in PROMPTS
    with pytest.raises(ValueError, match=one_line("nothing left to resume")):
        works.resume(desk, run)


def test_images_depend_on_prompt_seed_and_strength_alone(desk, run):
    base, erased = (desk.images(run, strength, PROMPTS, 3, **HOW) for strength in (0.0, 1.0))
    assert not np.array_equal(base[0], erased[0])
    np.testing.assert_array_equal(base[1:], desk.images(run, 0, PROMPTS[1:], 3, **HOW))
    pair = desk.pair(run)
    expected = esd_jax.sample(pair[0], PROMPTS[0], seed=[3], sampler="auto", batch_size=1, **HOW)[0]
    assert np.abs(base[0].astype(int) - expected).max() <= 1
    nothing = with_strength(pair[1], 0.0)
    for name, value in nothing.edits.items():  # the base's own values, to the bit
        np.testing.assert_array_equal(value, pair[0].edits[name], err_msg=name)
    half, more = (desk.images(run, strength, PROMPTS[:1], 3, **HOW)[0].astype(float) for strength in (0.5, -0.5))
    assert not np.array_equal(half, more)
    page = views.wipe({"base": base, "<erased>": erased}, PROMPTS)
    assert page.count("<img") == 6 and page.count('type="range"') == 1 and "<erased>" not in page and "<b>" not in page
    assert desk.pair(run) is pair  # kept in memory


@pytest.mark.parametrize("format", ["single", "folder", "lora"])
def test_an_export_opens_as_what_it_is(desk, run, format):
    carried_out(desk, works.export(desk, run, format, rank="4"))
    file, note = desk.job.file, desk.job.note
    assert "verified" in note and views.written(desk.job, run).count("<pre>") == 1
    if format == "folder":
        assert file.suffix == ".zip"
        zipfile.ZipFile(file).extractall(file.parent / "unpacked")
        (file,) = (file.parent / "unpacked").iterdir()
    opened = esd_jax.load(file, **{"lora": {"base": "emoji"}, "single": {"config": MODEL}}.get(format, {}))
    assert opened.provenance.erased[-1].texts == ("neon style",)


def test_a_report_is_shown_in_a_frame_of_its_own(desk, run):
    carried_out(desk, works.report(desk, run))
    page = views.report(None, run)
    assert (
        page.startswith('<iframe class="report"')
        and ' sandbox="allow-scripts" ' in page
        and "&lt;!DOCTYPE html&gt;" in page
    )
    card = views.card(None, run)
    assert card.lstrip().startswith("# neon style, erased from emoji") and "before_after.png" not in card


def test_an_attack_is_followed_and_shown(desk, run):
    with pytest.raises(ValueError, match=one_line("Choose at least one attack")):
        works.attack(desk, run, [], "emoji", 1)
    carried_out(desk, works.attack(desk, run, ["concept_inversion"], "emoji", 1, "2"))
    assert {name: len(losses) for name, losses in desk.job.losses.items()} == {
        f"Concept Inversion on {model}": 2 for model in ("base", "erased")
    }
    page = views.attacked(desk.job, run)
    assert "Searches" in page and "target prompts" in page and page.count("<img") >= 16
    assert "Searches" not in views.attacked(None, run)
    job = works.attack(desk, run, ["concept_inversion"], "emoji", 2, "2")
    desk.wait(PATIENCE)
    assert job.state == "failed" and "made with other settings" in job.note  # until they are forgotten
    job = works.attack(desk, run, ["concept_inversion"], "emoji", 1, "3", afresh=True)
    while job.active and not job.losses:
        time.sleep(0.05)
    desk.stop()
    desk.wait(PATIENCE)
    assert job.state == "stopped"


def test_a_stopped_run_goes_on_here_and_on_the_command_line(desk, tmp_path, capsys):
    fields = {"more": "sampling_steps = 2", "steps": "6", "preview_every": "1", "seed": 5}
    job = works.erase(desk, works.plan("emoji", "ink style", **fields))
    while job.active and not any(task.done for task in list(job.tasks) if task.name == "erasing"):
        time.sleep(0.01)
    with pytest.raises(ValueError, match=one_line("Erasing ink style", "stop it first")):
        works.delete(desk, listing.read(job.folder))
    desk.stop()
    desk.wait(PATIENCE)
    run = listing.read(job.folder)
    assert job.state == "stopped" and job.note == f"stopped at step {run.step} of 6" and 1 <= run.step < 6
    assert not run.finished and f"{run.step} of 6 updates" in run.label and len(run.previews()) == 2
    assert "<svg" in views.losses(None, run)
    line = views.command(run)
    assert line.startswith("esd-jax erase emoji 'ink style'") and line.endswith(
        f"-o {shlex.quote(str(run.folder))} --resume"
    )
    shown = re.sub("</?span>", "", views.details(None, run))  # which keep a flag and its value on one line
    assert html.escape(line) in shown
    assert cli.main(shlex.split(line)[1:]) == 0
    resumed = listing.read(run.folder)
    assert resumed.finished and resumed.step == 6
    whole = Desk(tmp_path)
    again = carried_out(whole, works.erase(whole, works.plan("emoji", "ink style", **fields)))
    for name, value in whole.pair(again)[1].edits.items():
        np.testing.assert_array_equal(value, desk.pair(resumed)[1].edits[name], err_msg=name)
    works.delete(desk, resumed)
    assert listing.read(run.folder) is None


def test_a_run_is_resumed_by_its_record(desk):
    """A field at its default that the config has otherwise: the record leaves it out."""
    plan = works.plan("emoji", "clay style", steps="4", contexts="", more="sampling_steps = 2\nwindow = 1.0")
    job = works.erase(desk, plan)
    while job.active and not any(task.done for task in list(job.tasks) if task.name == "erasing"):
        time.sleep(0.01)
    desk.stop()
    desk.wait(PATIENCE)
    run = carried_out(desk, works.resume(desk, listing.read(job.folder)))
    assert run.finished and run.step == 4 and run.plan.settings.window == 1.0
    assert "from update" in desk.job.title
