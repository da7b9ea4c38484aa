"""replace_with="auto": what takes a concept's place is chosen by what it changes elsewhere."""

import dataclasses
import json
from types import SimpleNamespace

import factories
import flow_factories
import numpy as np
import pytest
from messages import one_line

import esd_jax
from esd_jax import recipe
from esd_jax.erasing import corpora
from esd_jax.erasure import Concept, Erasure
from esd_jax.evaluation import seen
from esd_jax.metrics.intervals import mean
from esd_jax.runs import neighbours, replacements

KEPT = ("the dog", "a photo of a house")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "sd1"
    factories.make_sd1(folder)
    return esd_jax.load(folder)


@pytest.fixture
def near(monkeypatch):
    monkeypatch.setattr(neighbours, "nearest", lambda base, concept, erased=(), names=False: KEPT)


def vectors(base, text):
    return np.asarray(base.encode_prompts([text]).embeddings[0], np.float64)


def reference(base, concept, candidate):
    """E from the normal equations, in float64."""
    ids = np.asarray(base.tokenizers[0]([concept, candidate]))
    first = int((ids[0] != ids[1]).argmax())
    old, new = (vectors(base, text)[first:] for text in (concept, candidate))
    lam = replacements.SHRINKAGE * np.mean(np.sum(old**2, axis=1))
    return np.linalg.solve(old.T @ old + lam * np.eye(old.shape[1]), old.T @ (new - old))


def test_an_edit_equals_the_normal_equations(base):
    candidates = ["a dog", "the house"]
    for candidate, edit in zip(candidates, replacements.edits(base, "a cat", candidates), strict=True):
        expected = reference(base, "a cat", candidate)
        np.testing.assert_allclose(edit, expected, atol=2e-3 * np.abs(expected).max())


def test_the_damage_is_that_of_a_model_with_edited_weights(base, near):
    damages = replacements.damages(base, "a cat", candidates=["a dog", "the house"])
    assert [*damages.values()] == sorted(damages.values()) and damages.keys() == {"a dog", "the house"}
    before = neighbours.predictions(base, base.encode_prompts(KEPT), replacements.NOISES)
    tensors = base.params["unet"]
    read = [name for name in tensors if ".attn2.to_k." in name or ".attn2.to_v." in name]
    for candidate, damage in damages.items():
        edit = reference(base, "a cat", candidate).astype(np.float32)
        edited = base.with_edits({f"unet/{name}": tensors[name] + edit @ tensors[name] for name in read})
        after = neighbours.predictions(edited, base.encode_prompts(KEPT), replacements.NOISES)
        assert damage == pytest.approx(np.mean((after - before) ** 2), rel=2e-2)


def test_what_the_base_draws_like_the_concept_is_no_candidate(base, near, monkeypatch):
    names = ("a kitten", "a dog", "the house")
    monkeypatch.setattr(neighbours, "nearest", lambda *_, names=False, every=names: every if names else KEPT)
    monkeypatch.setattr(neighbours, "predicted_apart", lambda *_: np.array([0.1, 1.0, 1.2]))
    assert replacements.damages(base, "a cat").keys() == {"a dog", "the house"}


def test_names_are_no_longer_than_the_concept(base, monkeypatch):
    texts = ["a cat", "the dog", "a photo of a house", "cubism", "two red cars"]
    monkeypatch.setattr(corpora, "prompts", lambda name: dict.fromkeys(texts, 1.0))
    assert set(neighbours.nearest(base, "a cat", names=True)) == {"the dog", "cubism"}
    assert set(neighbours.nearest(base, "a cat")) == {"the dog", "a photo of a house", "cubism", "two red cars"}
    assert set(neighbours.nearest(base, "Van Gogh", names=True)) == {"a cat", "the dog", "cubism"}


def test_auto_becomes_the_least_damage_and_nothing_else_changes(base, monkeypatch):
    asked = []
    monkeypatch.setattr(
        replacements, "damages", lambda base, *given: asked.append(given) or {f"for {given[0]}": 0.1, "worse": 0.2}
    )
    plan = recipe.make(concept="cat; dog; owl", replace_with="auto; a house; auto | a bird | a bee")
    cat, dog, owl = replacements.resolved(base, plan).concepts
    assert cat.replace_with == ("for cat",) and dog == plan.concepts[1] and owl.replace_with == ("for owl",)
    texts = ["cat", "dog", "owl"]
    assert asked == [("cat", texts, []), ("owl", texts, ["a bird", "a bee"])]
    without = recipe.make(concept="cat", replace_with="a house")
    assert replacements.resolved(base, without) is without


def test_what_shows_the_concept_in_part_does_not_take_its_place(monkeypatch, unchecked):
    """Half of the images of "a flower" are roses: a rose that becomes a flower would stay."""
    base = SimpleNamespace(provenance=SimpleNamespace(source="emoji"))
    parts = {"a flower": 0.5, "a pizza": 0.1, "a bee": 0.0}
    monkeypatch.setattr(replacements, "damages", lambda *_: dict.fromkeys(parts, 0.1))
    monkeypatch.setattr(seen.Question, "rate", lambda asked, _: mean([parts[asked.prompts[0]]]))
    chosen = lambda concept, how: replacements.resolved(base, recipe.make(concept=concept, replace_with=how))  # noqa: E731
    assert chosen("a rose", "auto").concepts[0].replace_with == ("a pizza",)
    assert chosen("a rose", "auto | a flower").concepts[0].replace_with == ("a flower",)  # the user's own
    assert chosen("Van Gogh", "auto").concepts[0].replace_with == ("a flower",)  # which no probe detects
    monkeypatch.setattr(seen.Question, "rate", lambda *_: mean([1.0]))
    assert chosen("a rose", "auto").concepts[0].replace_with == ("a flower",)  # if all do, that with the least damage


def test_what_cannot_be_chosen_is_refused(base, near, monkeypatch):
    with pytest.raises(ValueError, match=one_line("replace_with='auto'", "'cat'")):
        replacements.damages(base, "cat", ["cat", "dog"], ["dog", "Cat"])
    monkeypatch.setattr(neighbours, "nearest", lambda *_, **__: ())
    with pytest.raises(ValueError, match=one_line("replace_with='auto'", "'cat'")):
        replacements.damages(base, "cat")
    recipe.make(concept="cat", replace_with="auto | cat | dog").check_concepts()  # the dog remains


def test_an_erasure_records_what_was_chosen(base, near):
    erased = esd_jax.erase(base, "a cat", config="uce", replace_with="auto | a dog | the house")
    best = next(iter(replacements.damages(base, "a cat", ["a cat"], ["a dog", "the house"])))
    assert erased.provenance.erased[-1].concepts[0].replace_with == (best,)


def test_flux_reads_the_tokens_of_t5(tmp_path):
    flow_factories.make_flux(tmp_path / "flux")
    base, texts = esd_jax.load(tmp_path / "flux"), ["a cat", "a photo of a house"]
    (rows,) = neighbours.last_vectors(base, texts)
    embeddings = np.asarray(base.encode_prompts(texts).embeddings)
    ids = np.asarray(base.tokenizers[1](texts))
    ends = (ids == ids[0, -1]).argmax(axis=1) - 2  # before padding and the end token
    np.testing.assert_array_equal(rows, [row[end] for row, end in zip(embeddings, ends, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("guided", [True, False])
def test_what_replaces_is_chosen_on_a_flow_transformer(tmp_path, near, guided):
    flow_factories.make_flux(tmp_path / "flux", dev=guided)
    damages = replacements.damages(esd_jax.load(tmp_path / "flux"), "a cat", candidates=["a dog", "a house"])
    assert damages.keys() == {"a dog", "a house"} and all(0 < damage < np.inf for damage in damages.values())


def test_a_plan_counts_one_text_in_place_of_auto():
    plan = recipe.make(concept="cat; dog; owl", replace_with="auto; a house; auto | a bird | a bee", method="ablating")
    counts = [concept.replace_with for concept in replacements.counted(plan).concepts]
    assert counts == [("auto",), ("a house",), ("a bee",)]


def test_a_run_that_goes_on_keeps_what_it_chose(base, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "nearest", lambda *_, **__: pytest.fail("chosen again"))
    fields = {"replace_with": "auto", "preserve": "auto | a house"}
    (run := tmp_path / "run").mkdir()
    record = Erasure((Concept("a cat", replace_with=("a dog",), preserve=("a house", "a fox")),), base="base")
    (run / "run.json").write_text(json.dumps(record.to_dict()))
    for folder in (run, tmp_path):  # of one run, and of several
        plan = recipe.make(base="base", concept="a cat", output_dir=str(folder), **fields)
        assert replacements.resolved(base, plan, resume=True).concepts == record.concepts
    others = {"replace_with": "auto | a pony", "preserve": "auto | a tree"}
    plan = recipe.make(base="base", concept="a cat", output_dir=str(run), **others)
    assert replacements.recorded(plan).concepts == plan.concepts  # no longer what the run was asked
    assert replacements.recorded(dataclasses.replace(plan, output_dir=None)).concepts == plan.concepts
    (run / "run.json").write_text(json.dumps(Erasure((Concept("a cat"),), base="base").to_dict()))
    plan = recipe.make(base="base", concept="a cat", output_dir=str(run), **fields)
    assert replacements.recorded(plan).concepts == plan.concepts  # the run was asked neither
