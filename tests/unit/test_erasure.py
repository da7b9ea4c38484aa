"""Records of erasures: read into values, and written as they were, whoever wrote them."""

import json

import numpy as np
import pytest
import safetensors.numpy
from messages import one_line

from esd_jax.erasure import Concept, Erasure, Origin, Part, as_texts, texts_of
from esd_jax.io import folder as files
from esd_jax.io.safetensors import read_header

CAT = {"text": "cat", "from_": None, "replace_with": ["dog"], "preserve": [], "strength": 1.0}
FISH = {**CAT, "text": "fish"}
GLASSES = {"text": "glasses, round", "from_": "a man", "replace_with": [], "preserve": ["hat"], "strength": 0.5}
RUN = {
    "concepts": [CAT, GLASSES],
    "base": "org/model",
    "base_sha256": "ab" * 32,
    "recipe": {"base": "org/model", "concept": "cat; glasses, round", "eta": 1.0, "steps": 3},
    "versions": {"esd-jax": "0.1.0"},
}
DELTA = {"delta": "a.safetensors", "erased": [RUN]}
SHAPES = {
    "run": (RUN, ("cat", "glasses, round")),
    "run with steps": ({**RUN, "step": 3}, ("cat", "glasses, round")),
    "run from other weights": (
        {**RUN, "started_from": {"name": "unet", "erased": [{**RUN, "concepts": [FISH]}]}, "step": 0},
        ("cat", "glasses, round"),
    ),
    "delta": (DELTA, ("cat", "glasses, round")),
    "delta of nobody": ({"delta": "a.safetensors", "erased": []}, ()),
    "difference": ({"difference": "b.safetensors", "strength": -1, "erased": [DELTA]}, ("cat", "glasses, round")),
    "LoRA": ({"lora": "c.safetensors", "sha256": "0" * 64, "strength": 1.0, "erased": []}, ()),
    "merged": (
        {"merged": [{"strength": 1.0, "erased": [DELTA, RUN]}, {"strength": 1, "erased": [{"concepts": [CAT]}]}]},
        ("cat", "glasses, round"),
    ),
    "healed": ({"healed": {"steps": 2, "learning_rate": 1e-5}}, ()),
    "nothing": ({}, ()),
    "older: concepts of two fields": ({"concepts": [{"text": "cat", "from_": None}]}, ("cat",)),
    "newer: unknown fields": ({**RUN, "mood": {"a": [1]}, "concepts": [{**CAT, "weight": 2}]}, ("cat",)),
    "another order": (dict(reversed({**RUN, "step": 3}.items())), ("cat", "glasses, round")),
    "empty concepts": ({"concepts": []}, ()),
    "other forms": (
        {"concepts": ["cat"], "base": None, "step": True, "strength": "1", "erased": {"a": 1}, "merged": [3],
         "started_from": "x", "recipe": [], "delta": 3},
        (),
    ),
    "a concept that is none": ({"concepts": [{**CAT, "text": ""}], "base": "x"}, ()),
    "numbers of other types": ({"concepts": [{**CAT, "strength": 1}], "strength": 1.0, "step": 2.0}, ("cat",)),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_record_is_written_as_it_was_read(shape):
    record, texts = SHAPES[shape]
    erasure = Erasure.from_dict(record)
    assert json.dumps(erasure.to_dict()) == json.dumps(record)
    assert erasure.texts == texts
    assert Erasure.from_dict(json.loads(json.dumps(record))) == erasure


def test_the_fields_of_a_run():
    erasure = Erasure.from_dict(SHAPES["run from other weights"][0])
    assert erasure.concepts == (
        Concept("cat", replace_with=("dog",)), Concept("glasses, round", "a man", preserve=("hat",), strength=0.5),
    )  # fmt: skip
    assert (erasure.base, erasure.base_sha256, erasure.step) == ("org/model", "ab" * 32, 0)
    assert (erasure.recipe["eta"], erasure.versions) == (1.0, {"esd-jax": "0.1.0"})
    assert erasure.started_from.name == "unet" and texts_of(erasure.started_from.erased) == ("fish",)
    assert erasure.others == {} and erasure.order == () and erasure.erased is None


def test_the_fields_of_what_was_applied():
    delta, difference, merged = (Erasure.from_dict(SHAPES[name][0]) for name in ("delta", "difference", "merged"))
    assert delta == Erasure(delta="a.safetensors", erased=(Erasure.from_dict(RUN),))
    assert difference == Erasure(difference="b.safetensors", strength=-1, erased=(delta,))
    cat = Erasure(concepts=(Concept("cat", replace_with=("dog",)),))
    assert merged.merged == (Part(1.0, (delta, Erasure.from_dict(RUN))), Part(1, (cat,)))


def test_what_no_field_can_hold_is_kept_beside():
    newer = Erasure.from_dict(SHAPES["newer: unknown fields"][0])
    assert newer.concepts == (Concept("cat", replace_with=("dog",)),)
    assert newer.others == {"mood": {"a": [1]}, "concepts": [{**CAT, "weight": 2}]}
    foreign = Erasure.from_dict(SHAPES["other forms"][0])
    assert foreign == Erasure(others=SHAPES["other forms"][0])


def test_a_record_of_this_package_has_the_fields_in_their_order():
    erasure = Erasure(
        (Concept("cat", replace_with=("dog",)),), base="b", base_sha256="s", recipe={"steps": 2}, versions={},
        started_from=Origin("unet"), step=2,
    )  # fmt: skip
    assert json.dumps(erasure.to_dict()) == json.dumps(
        {
            "concepts": [CAT], "base": "b", "base_sha256": "s", "recipe": {"steps": 2}, "versions": {},
            "started_from": {"name": "unet", "erased": []}, "step": 2,
        }
    )  # fmt: skip
    assert Erasure().to_dict() == {} and Erasure(erased=()).to_dict() == {"erased": []}


def test_texts_are_named_once_and_are_not_parted():
    cat, both = Erasure(concepts=(Concept("cat"),)), Erasure(concepts=(Concept("a, b; c"), Concept("cat", "a man")))
    assert texts_of([cat, both, Erasure(erased=(cat,))]) == ("cat", "a, b; c")
    assert as_texts("a, b") == ("a, b",) and as_texts(["a", "b"]) == ("a", "b")


@pytest.mark.parametrize("metadata", ["3", "[3]", '"cat"', "[[]]"])
def test_metadata_that_are_no_records(metadata, tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(1)}, file := tmp_path / "x.safetensors", {"esd_jax": metadata})
    with pytest.raises(ValueError, match=one_line("x.safetensors", "'esd_jax'", "must be a JSON object")):
        files.read_records(read_header(file))


def test_records_in_metadata_keep_their_text(tmp_path):
    text = json.dumps([record for record, _ in SHAPES.values()])
    safetensors.numpy.save_file({"a": np.zeros(1)}, file := tmp_path / "x.safetensors", {"esd_jax": text})
    assert files.write_records(files.read_records(read_header(file))) == {"esd_jax": text}
