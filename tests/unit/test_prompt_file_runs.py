"""Runs whose recipe names a file of prompts: what their records hold, and what a resumption compares."""

import factories
import pytest
from messages import one_line

import esd_jax
from esd_jax import recipe
from esd_jax.runs import setup


def plan(text):
    return recipe.make(method="ablating", concept="cat", anchor_prompts=text)


def test_which_fields_name_files(tmp_path):
    file = tmp_path / "prompts.TXT"
    file.write_text("a dog\n")
    assert setup.files_of(plan(f" {file} ")) == {"anchor_prompts": file}
    assert setup.files_of(plan("a dog; a page of notes.txt")) == {}  # prompts, of which the last ends so
    assert setup.files_of(recipe.make(method="uce", concept="cat", retain="emoji", steps=0)) == {}
    with pytest.raises(FileNotFoundError, match="nofile.txt"):
        setup.files_of(plan("nofile.txt"))


def test_a_file_that_changed_is_noticed_and_one_that_moved_is_the_same(tmp_path):
    factories.make_sd1(tmp_path / "base")
    base, file = esd_jax.load(tmp_path / "base"), tmp_path / "prompts.txt"
    file.write_text("a dog\na tree\n")
    run = {"output_dir": tmp_path / "run", "method": "ablating", "subset": "esd-x-strict"}
    erased = esd_jax.erase(base, "cat", steps=1, anchor_prompts=str(file), **run)
    assert erased.provenance.erased[-1].recipe["anchor_prompts"] == "prompts.txt"
    elsewhere = tmp_path / "moved" / "prompts.txt"
    elsewhere.parent.mkdir()
    file.rename(elsewhere)
    esd_jax.erase(base, "cat", steps=2, resume=True, anchor_prompts=str(elsewhere), **run)
    elsewhere.write_text("a dog\na house\n")
    with pytest.raises(ValueError, match=one_line("anchor_prompts_sha256")):
        esd_jax.erase(base, "cat", steps=3, resume=True, anchor_prompts=str(elsewhere), **run)
