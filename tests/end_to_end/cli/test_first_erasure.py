"""The command that everybody types first: it ends with a picture, a page and the command that repeats it."""

import contextlib
import io
import json
import shlex

import numpy as np
import pytest
from PIL import Image

import esd_jax
from esd_jax import cli, examples, repeat
from esd_jax.demo import groups
from esd_jax.evaluation.drawing import Drawing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("first") / "run"


@pytest.fixture(scope="module")
def printed(folder):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["erase", "emoji", "neon style", "--method=uce", "-o", str(folder)]) == 0
    return out.getvalue().splitlines()


def test_it_ends_with_a_picture_and_the_next_command(folder, printed):
    assert printed[0].startswith("recipe emoji_uce (kind: style); --kind=object")
    assert f"  before and after  {folder}/before_after.png" in printed
    assert printed[-1] == f"next: esd-jax evaluate {shlex.quote(str(folder))}"
    evidence = json.loads((folder / "evidence" / "examples.json").read_text())
    target = groups.parse_target("neon style")
    assert evidence["pictures"] == dict(groups.examples(target))
    picture = np.asarray(Image.open(folder / "before_after.png"))
    assert picture.shape[2] == 3 and picture.std() > 20


def test_the_report_has_images_and_names_the_run(folder, printed, capsys):
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert page.count("<img") >= 22 and "No pictures were drawn" not in page
    assert "esd-jax evaluate run<" in page and str(folder) not in page and "evaluate RUN" not in page
    card = (folder / "ERASURE.md").read_text()
    assert "esd-jax erase emoji 'neon style' --method=uce -o runs/again" in card and "before_after.png" in card


def test_a_report_draws_what_is_missing(folder, printed):
    for file in (folder / "evidence").iterdir():
        file.unlink()
    (folder / "before_after.png").unlink()
    esd_jax.report(folder)
    assert (folder / "before_after.png").is_file() and (folder / "evidence" / "examples.json").is_file()


def test_a_concept_that_the_model_does_not_know_is_reported_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["erase", "emoji", "a unicorn", "--method=uce"]) == 0
    assert "warning: the embedded model does not know 'a unicorn': choose" in capsys.readouterr().out
    assert cli.main(["report", "runs/a-unicorn"]) == 0, capsys.readouterr().err
    page = (tmp_path / "runs" / "a-unicorn" / "report.html").read_text()
    assert "a unicorn" in page and page.count("<img") >= 4


def test_the_command_of_the_record_repeats_it(folder, printed):
    record = esd_jax.load(folder).provenance.erased[-1]
    program, verb, *words = shlex.split(repeat.command(record))
    assert (program, verb) == ("esd-jax", "erase") and len(words) <= 6
    again = cli.VERBS["erase"].parse("erase", words)
    fields = {name: value for name, value in again.config.to_dict().items() if name not in ("output_dir", "base")}
    for name, value in fields.items():
        assert (record.recipe or {}).get(name) == value, name


def test_the_examples_of_a_model_without_a_testbed():
    recipe = {"preview_prompts": "a painting by {}; a cat; a dog by {}", "preview_steps": 7, "width": None}
    assert examples._previewed(recipe, ["Monet", "Dali"]) == [
        ("erased: Monet, Dali", ["a painting by Monet", "a painting by Dali", "a dog by Monet", "a dog by Dali"]),
        ("others", ["a cat"]),
    ]
    own = Drawing(num_steps=4, guidance_scale=7.5, batch_size=1)
    assert examples._sampling(recipe, own) == {"steps": 7, "guidance_scale": 7.5, "batch_size": 1}
