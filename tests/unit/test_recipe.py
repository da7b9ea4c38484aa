"""A recipe holds values, concepts among them, from the front door on; its flat form is kept to the letter."""

import dataclasses
import json
import random

import factories
import pytest
from messages import one_line

import esd_jax
from esd_jax import api, cli, kinds, recipe, runs, several
from esd_jax.erasing import trajectories
from esd_jax.erasure import Concept

SHORT = {"method": "uce", "config": "uce", "dtype": "float32"}
CLOSED = {"method": "uce", "steps": 0}
PIECES = ("cat", "Van Gogh, Starry Night", ";", "; ", "|", " | ", ":", "a: b", ",", " ", "é", "日本", "\u2028", "&amp;")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    factories.make_sd1(folder)
    return esd_jax.load(folder)


@pytest.fixture
def planned(monkeypatch):
    """`erase` returns the recipe that it would carry out."""
    monkeypatch.setattr(runs, "run", lambda base, plan, **options: plan)


def test_concepts_are_taken_as_they_are(base, planned, unchecked):
    concepts = [Concept("Tom; Jerry", preserve=("a | b", "c")), "cat, dog", Concept(" a fish ", replace_with=("",))]
    plan = esd_jax.erase(base, concepts, **SHORT)
    assert plan.concepts == (concepts[0], Concept("cat, dog"), Concept("a fish", replace_with=("",)))
    assert esd_jax.erase(base, concepts[0], **SHORT).concepts == (concepts[0],) and esd_jax.Concept is Concept
    texts = ["Van Gogh; the painter", "x"]
    for several_concepts in (texts, tuple(texts), list(map(Concept, texts))):
        plan = esd_jax.erase(base, several_concepts, **SHORT)
        assert plan.concepts == tuple(map(Concept, texts)) and plan.flat()["concept"] == tuple(texts)
    plan = esd_jax.erase(base, "Van Gogh; the painter", **SHORT)
    assert plan.concepts == (Concept("Van Gogh"), Concept("the painter"))
    with pytest.raises(ValueError, match=one_line("the concept is empty")):
        esd_jax.erase(base, **SHORT)
    with pytest.raises(ValueError, match=one_line("'@names.txt'", "on the command line")):
        esd_jax.erase(base, "@names.txt", **SHORT)
    assert several.parse_concepts({"concept": "@somebody"}) == (Concept("@somebody"),)


def test_a_concept_brings_its_own_fields(base, planned):
    """Those of the config are for texts; those of the call would be left unheard."""
    mixed = [Concept("cat", preserve=("x",)), "dog"]
    plan = recipe.make(concept=mixed, preserve="y | z", strength=2, **CLOSED)
    assert plan.concepts == (Concept("cat", preserve=("x",)), Concept("dog", preserve=("y", "z"), strength=2.0))
    for name, value in (("preserve", "a"), ("strength", 2.0), ("from_", "a man")):
        with pytest.raises(ValueError, match=one_line(name, "beside a Concept")):
            esd_jax.erase(base, mixed, **SHORT, **{name: value})
    with pytest.raises(ValueError, match=one_line("from_", "method 'uce'")):
        esd_jax.erase(base, Concept("glasses", "a man"), **SHORT)


def test_concepts_are_parsed_once_in_a_run(base, tmp_path, monkeypatch):
    parse, columns = several.parse_concepts, []
    monkeypatch.setattr(several, "parse_concepts", lambda fields: columns.append(fields["concept"]) or parse(fields))
    fields = {"base": base.provenance.folder, "concept": "cat; dog", "output_dir": tmp_path / "run"}
    assert cli.main(["erase", "--config=uce", "--nopictures", *(f"--config.{k}={v}" for k, v in fields.items())]) == 0
    assert [text for text in columns if text] == ["cat; dog"]  # the config itself names none


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", recipe.config_names())
def test_a_config_is_kept_to_the_letter(name):
    config = recipe.read(name).to_dict()
    plan = recipe.make(**config)
    if each := config.pop("steps_each", 0):
        config["steps"] = each * len(plan.concepts)  # a record says what it comes to
    flat = plan.flat()
    assert json.dumps({k: flat[k] for k in config}) == json.dumps(config) and flat.keys() == config.keys()
    assert json.dumps(recipe.make(**flat).flat()) == json.dumps(flat)


def test_what_is_a_default_elsewhere_is_kept():
    """`rounds_skip` is 0.5 by default of the other methods, and 100 of redirection."""
    default, other = (recipe.make(concept="cat", method="redirect", **how) for how in ({}, {"rounds_skip": 0.5}))
    assert default.flat()["rounds_skip"] == 100.0 and other.flat()["rounds_skip"] == 0.5
    assert recipe.make(**as_json(other.flat())) == other != default
    assert "rounds_skip" not in recipe.make(concept="cat", method="esd").flat()


@pytest.mark.parametrize("seed", range(100))
def test_odd_texts_are_kept_to_the_letter(seed):
    rng = random.Random(seed)
    text = lambda: "".join(rng.choices(PIECES, k=rng.randrange(1, 6)))  # noqa: E731
    some = [text() for _ in range(rng.randrange(1, 4))]
    # One string each, as flags and configs give them.
    fields = {"concept": text(), "preserve": text(), "images": text(), "preview_prompts": text()}
    try:
        plan = recipe.make(**fields, **CLOSED)
    except ValueError as error:
        assert any(word in str(error) for word in ("HTML", "parts for", "empty")), error
    else:
        assert {name: plan.flat()[name] for name in fields} == fields
        assert recipe.make(**as_json(plan.flat())) == plan
    # Lists, whose texts stay whole.
    texts = [one for one in some if one.strip()] or ["x"]
    plan = recipe.make(concept=texts, preserve=[some for _ in texts], images=some, preview_prompts=some, **CLOSED)
    assert plan.concepts == tuple(
        Concept(one.strip(), preserve=tuple(kept.strip() for kept in some)) for one in texts
    )  # fmt: skip
    assert plan.images == tuple(some)
    again = recipe.make(**as_json(plan.flat()))
    assert again == plan and as_json(again.flat()) == as_json(plan.flat())
    # Values.
    concepts = [
        Concept(one, replace_with=tuple(some[:i]), preserve=tuple(some), strength=rng.choice((1.0, 1 / 3)))
        for i, one in enumerate(texts)
    ]
    plan = recipe.make(concept=concepts, **CLOSED)
    assert plan.concepts == tuple(concept.stripped() for concept in concepts)
    assert recipe.make(**as_json(plan.flat())) == plan


def test_a_changed_recipe_has_the_flat_form_of_its_values():
    plan = recipe.make(concept="cat;dog", preserve="a|b", preview_prompts="x;y", **CLOSED)
    assert [plan.flat()[name] for name in ("concept", "preserve", "preview_prompts")] == ["cat;dog", "a|b", "x;y"]
    concepts = (Concept("Tom; Jerry", preserve=("a", "b")), Concept("cat", preserve=("a", "b"), strength=0.5))
    changed = dataclasses.replace(plan, concepts=concepts, preview_prompts=("p; q",))
    flat = changed.flat()
    assert [flat[name] for name in several.COLUMNS] == [("Tom; Jerry", "cat"), None, None, "a | b", "1.0; 0.5"]
    assert flat["preview_prompts"] == ("p; q",) and recipe.make(**as_json(flat)) == changed
    assert recipe.Recipe().flat() == recipe.make().flat()


def test_fields_that_mean_nothing_are_refused_in_python_too():
    with pytest.raises(ValueError, match=one_line("rounds_search", "rounds_every")):
        api.planned("emoji", "a cat", config="emoji", rounds_search=5)
    with pytest.raises(ValueError, match=one_line("preserve_weight", "'uce'")):
        api.planned("emoji", "a cat", method="uce", preserve_weight=3.0)


def test_stereo_starts_from_recipes_of_sdxl_there():
    def config(kind):
        return kinds.config("x/y", ["a"], lambda: api.architecture("sdxl")[0], kind=kind, fields={"method": "stereo"})

    by_kind = {kind: config(kind) for kind in ("style", "object", "person", "nudity")}
    assert by_kind == dict.fromkeys(by_kind, "sdxl_stereo") | {"object": "sdxl_stereo_object"}


def test_names_and_numbers_of_others_are_explained(base):
    with pytest.raises(ValueError, match=one_line("negative_guidance", "'eta'", "eta + 1 with anchor='null'")):
        recipe.make(concept="a cat", negative_guidance=2)
    with pytest.raises(ValueError, match=one_line("sampling_steps must be in 1..1000, not 0")):
        trajectories.deterministic(base.schedule, "ddim", 0)
