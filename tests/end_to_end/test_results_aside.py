"""A run that goes on: what was measured before is of another model, and is moved."""

import json
import re

import factories
import numpy as np
import pytest

import esd_jax
from esd_jax import cli, dossier
from esd_jax.cli import demo
from esd_jax.runs import keeping

FIELDS = {
    "sampling_steps": 4,
    "timestep_mode": "grid",
    "learning_rate": 1e-2,
    "subset": "esd-x-strict",
    "checkpoint_every": 1,
}


def test_a_report_gives_no_figures_of_fewer_updates(tmp_path):
    factories.make_sd1(tmp_path / "base")
    base, run = esd_jax.load(tmp_path / "base"), tmp_path / "run"
    erased = esd_jax.erase(base, "cat", output_dir=run, steps=1, **FIELDS)
    options = {"output_dir": run / "evidence", "images": 2, "num_steps": 1}
    dossier.evaluate(base, erased, "smoke", **options)
    dossier.report(run)
    esd_jax.erase(base, "cat", output_dir=run, steps=1, resume=True, **FIELDS)  # nothing is left to do
    assert (run / "evidence" / "evaluation-smoke.json").is_file() and (run / "report.html").is_file()
    (run / "evidence" / "until.json").write_text("{}")  # which says of which updates it is
    with pytest.warns(UserWarning, match="what was measured after 1 update is in .*evidence_after_1 now") as given:
        erased = esd_jax.erase(base, "cat", output_dir=run, steps=2, resume=True, **FIELDS)
    (message,) = (str(one.message) for one in given if "measured" in str(one.message))
    assert any(re.match(begins, message) for begins in cli.SHOWN)  # in the terminal, too
    aside = run / "evidence_after_1"
    assert {path.name for path in aside.iterdir()} == {
        "evaluation-smoke.json", "evaluation-smoke.npz", "images", "report.html", "report.json", "ERASURE.md",
    }  # fmt: skip
    assert [path.name for path in (run / "evidence").iterdir()] == ["until.json"]
    (run / "evidence" / "until.json").unlink()
    assert not dossier.gathered(run).tables
    for name in keeping.DRAWN:  # every erasure makes these: they are moved without a word
        (run / "evidence" / name).touch()
    erased = esd_jax.erase(base, "cat", output_dir=run, steps=3, resume=True, **FIELDS)
    assert {path.name for path in (run / "evidence_after_2").iterdir()} == {*keeping.DRAWN}
    dossier.evaluate(base, erased, "smoke", **options)
    assert json.loads((run / "evidence" / "evaluation-smoke.json").read_text())["record"]["step"] == 3


def test_results_of_a_run_that_ended_early_stay_and_a_pipeline_that_was_shown_can_be_kept(tmp_path):
    factories.make_sd1(tmp_path / "base")
    base, run, shown = esd_jax.load(tmp_path / "base"), tmp_path / "run", []

    def enough(erased):
        shown.append(erased)
        return len(shown) > 1

    erased = esd_jax.erase(base, "cat", output_dir=run, steps=4, stop_when=enough, stop_every=1, **FIELDS)
    name = next(iter(erased.edits))
    assert len({np.asarray(one.edits[name]).tobytes() for one in [base, *shown] if one.edits}) == 2
    np.testing.assert_array_equal(shown[1].edits[name], erased.edits[name])
    (run / "evidence").mkdir()
    (run / "evidence" / "evaluation-smoke.json").write_text("{}")
    again = esd_jax.erase(
        base, "cat", output_dir=run, steps=4, stop_when=lambda _: True, stop_every=1, resume=True, **FIELDS
    )
    np.testing.assert_array_equal(again.edits[name], erased.edits[name])
    assert (run / "evidence" / "evaluation-smoke.json").is_file() and not (run / "evidence_after_2").exists()


def test_portrait_previews_are_taken_apart(tmp_path):
    factories.make_sd1(tmp_path / "base")
    preview = {"preview_every": 1, "preview_steps": 1, "preview_prompts": "cat; dog"}
    size = {"height": 64, "width": 32}
    esd_jax.erase(tmp_path / "base", "cat", output_dir=tmp_path / "run", steps=1, **FIELDS, **preview, **size)
    moments = dossier.gathered(tmp_path / "run").timeline
    assert [moment.images.shape for moment in moments] == [(2, 64, 32, 3)] * 2


def test_a_demo_of_a_closed_form_has_no_steps_to_time(tmp_path):
    (tmp_path / "log.jsonl").touch()
    assert demo.timing(tmp_path / "log.jsonl") == "in closed form, without steps"
