"""How the package's objects show themselves: a line in a terminal, a card or a table in a notebook."""

import dataclasses
import re

import numpy as np
import pytest

import esd_jax
from esd_jax import api, display, families
from esd_jax.erasure import Concept, Erasure
from esd_jax.evaluation.attacks import Adversary, Goal, Scored, Trial
from esd_jax.evaluation.evidence import Evidence, Finding, Pair, Table
from esd_jax.metrics.intervals import Estimate
from esd_jax.models import architectures

NEON = Erasure((Concept("neon style"),), base="emoji", recipe={"method": "esd", "subset": "esd-x"}, step=300)


@pytest.fixture(scope="module")
def base():
    return esd_jax.load("emoji")


def test_a_pipeline_is_one_line(base):
    assert repr(base) == "<Pipeline emoji: SD 1, 64 px, float32, 9 M params>"
    erased = base.with_edits({}, NEON)
    text = "<Pipeline emoji: SD 1, 64 px, float32, 9 M params; erased: neon style (esd, 300 steps)>"
    assert repr(erased) == text
    solved = dataclasses.replace(NEON, recipe={"method": "uce"}, step=0)  # without updates
    assert repr(base.with_edits({}, solved)).endswith("erased: neon style (uce)>")
    assert len(repr(base.provenance)) < 300


def test_a_line_is_cut_where_it_would_be_too_long(base):
    many = dataclasses.replace(NEON, concepts=tuple(Concept(f"artist {i}\nand more") for i in range(50)))
    text = repr(base.with_edits({}, many))
    assert len(text) == 199 and "\n" not in text and text.endswith("...>")


def test_a_model_is_called_as_people_call_it():
    unets = {"sd14": "SD 1", "sd21": "SD 2", "sd21-base": "SD 2", "sdxl": "SDXL"}
    flows = {"flux-dev": "FLUX.1 [dev]", "flux-schnell": "FLUX.1 [schnell]", "sd3-medium": "SD 3"}
    flows |= dict.fromkeys(("sd35-medium", "sd35-large"), "SD 3.5") | {"klein-4b": "FLUX.2 [klein]"}
    assert tuple({**unets, **flows}) == architectures.ARCHITECTURES
    for name, called in {**unets, **flows}.items():
        configs, _ = api.architecture(name)
        assert families.of(configs).called(configs) == called


def test_numbers_of_parameters_are_short():
    texts = {950: "950", 9_046_051: "9 M", 859_520_964: "860 M", 2_567_463_684: "2.6 B", 1_500: "2 k"}
    assert {number: display.count(number) for number in texts} == texts


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
    assert {repr(value): text for value, text in shown.items()} == {text: text for text in shown.values()}
