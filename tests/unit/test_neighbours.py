"""preserve="auto": which concepts are near, by the text encoder and by the base's predictions."""

import factories
import numpy as np
import pytest

import esd_jax
from esd_jax import recipe
from esd_jax.erasing import corpora
from esd_jax.runs import neighbours


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "sd1"
    factories.make_sd1(folder)
    return esd_jax.load(folder)


TEXTS = ["cat", "the cat on a mat", "a dog", "the photo of a dog"]


@pytest.mark.parametrize("at_once", [2, 32])
def test_texts_are_alike_by_the_cosine_of_their_last_tokens(base, at_once, monkeypatch):
    monkeypatch.setattr(neighbours, "AT_ONCE", at_once)
    alike = neighbours.encoded_alike(base, "a cat", TEXTS)
    every = ["a cat", *TEXTS]
    ids = np.asarray(base.tokenizers[0](every))
    ends = (ids == ids[0, -1]).argmax(axis=1) - 1  # padding is the end token
    vectors = np.asarray(base.encode_prompts(every).embeddings, float)
    rows = np.stack([row[end] for row, end in zip(vectors, ends, strict=True)])
    rows = rows - rows.mean(axis=0)
    expected = [row @ rows[0] / np.linalg.norm(row) / np.linalg.norm(rows[0]) for row in rows[1:]]
    np.testing.assert_allclose(alike, expected, atol=1e-5)


def test_predictions_are_compared_at_equal_noise(base):
    apart = neighbours.predicted_apart(base, "a cat", ["a cat", *TEXTS])
    assert apart[0] <= 1e-10 and (apart[2:] > 1e-8).all()
    again = neighbours.predicted_apart(base, "a cat", TEXTS[::-1])
    np.testing.assert_allclose(again[::-1], apart[1:], rtol=1e-3)


def test_half_by_each_and_none_that_names_what_is_erased(base, monkeypatch):
    monkeypatch.setattr(
        corpora, "prompts", lambda name: dict.fromkeys(["", "a cat", "two cats", "the dog", *"abcdefghij"], 1.0)
    )
    monkeypatch.setattr(neighbours, "encoded_alike", lambda base, concept, texts: -np.arange(len(texts)))
    monkeypatch.setattr(neighbours, "predicted_apart", lambda base, concept, texts: -np.arange(len(texts)))
    assert neighbours.nearest(base, "cat", ["cat", "dog"]) == ("a", "b", "c", "d", "j", "i", "h", "g")


def test_auto_becomes_the_neighbours_and_nothing_else_changes(base, monkeypatch):
    monkeypatch.setattr(neighbours, "nearest", lambda base, concept, texts: (f"near {concept}", *texts))
    plan = recipe.make(concept="cat; dog", preserve="auto; a house")
    one, other = neighbours.resolved(base, plan).concepts
    assert one.preserve == ("near cat", "cat", "dog") and other == plan.concepts[1]
    assert neighbours.resolved(base, plan).flat()["preserve"] == "near cat | cat | dog; a house"
    beside = recipe.make(concept="cat", preserve="a mat | auto | cat in hat")
    assert neighbours.resolved(base, beside).concepts[0].preserve == ("a mat", "cat in hat", "near cat", "cat")
    without = recipe.make(concept="cat", preserve="a house")
    assert neighbours.resolved(base, without) is without


def test_an_erasure_records_what_it_preserved(base, monkeypatch):
    monkeypatch.setattr(neighbours, "nearest", lambda *_: ("the dog", "a mat"))
    erased = esd_jax.erase(base, "cat", method="uce", config="uce", preserve="auto")
    assert erased.provenance.erased[-1].concepts[0].preserve == ("the dog", "a mat")
    named = esd_jax.erase(base, "cat", method="uce", config="uce", preserve="the dog | a mat")
    for name, value in named.edits.items():
        np.testing.assert_array_equal(value, erased.edits[name])


@pytest.mark.slow
def test_near_a_style_are_styles_and_near_an_animal_animals():
    emoji = esd_jax.load("emoji")
    assert all("style" in text or "drawing" in text for text in neighbours.nearest(emoji, "neon style")[:4])
    assert {"a dog", "a lion", "a fox"} & set(neighbours.nearest(emoji, "a cat"))
