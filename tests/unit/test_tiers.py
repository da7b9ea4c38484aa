"""Tiers of prompts: what names the concept and what does not, misspellings, and the lists made of them."""

import json
from types import SimpleNamespace

import pytest
from messages import one_line

from esd_jax import wording
from esd_jax.erasing.textual_inversion import words
from esd_jax.evaluation import prompts, tiers
from esd_jax.evaluation.attacks import preset
from esd_jax.evaluation.judges import detectors
from esd_jax.text import Tokenizer

NAMING = ("name", "prefix", "phrasing", "mixed")
GENERATED = tuple(tier for tier in tiers.TIERS if tier not in tiers.DESCRIBED)
OTHERS = ("a bicycle", "Hokusai", "the Eiffel Tower", "neon style", "Bob Ross", "Кандинский", "猫", "R2-D2")


def distance(one, other):
    """Levenshtein's, by its recursion."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return distance(one[1:], other[1:])
    pairs = ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    return 1 + min(distance(*pair) for pair in pairs)


@pytest.mark.parametrize("concept", [*tiers.concepts(), *OTHERS])
def test_a_tier_names_the_concept_or_it_does_not(concept):
    every = tiers.of(concept)
    name = every["name"][0]
    for tier, texts in every.items():
        assert len({*texts}) == len(texts) and all(text == " ".join(text.split()) and "{" not in text for text in texts)
        for text in texts:
            assert wording.names(name, text) == (tier in NAMING), f"{tier}: {text}"
    assert {*NAMING, *tiers.UNNAMED} == {*tiers.TIERS}


def test_descriptions_have_none_of_the_concepts_names():
    data = json.loads(tiers.FILE.read_text(encoding="utf-8"))
    assert {"style", "object", "person", "nudity"} == {entry["kind"] for entry in data.values()} and len(data) == 21
    assert {*detectors.IMAGENETTE} <= {*data}  # which attacks have a detector for
    for known, entry in data.items():
        every = tiers.of(known)
        assert [*every] == [*tiers.TIERS] and len(every["translation"]) == 5
        texts = [text for tier in tiers.DESCRIBED for text in every[tier]]
        assert len({*texts}) == len(texts)
        for name in (known, *entry["names"]):
            assert tiers.of(name)["long"] == every["long"]  # it is found by each of its names
            assert not [text for text in texts if wording.names(name, text)], name
            assert not [text for text in texts if wording.same(name, text)]


def test_prompts_fit_into_clips_context():
    tokenizer = Tokenizer.clip("!", 77)
    for concept in tiers.concepts():
        for texts in tiers.of(concept).values():
            assert max(len(words(tokenizer, text)) for text in texts) <= 75


@pytest.mark.parametrize("name", ["Van Gogh", "church", "cat", "golf ball", "Rembrandt", "Кандинский", "Dalí"])
@pytest.mark.parametrize("edits", [1, 2])
def test_a_misspelling_is_as_far_as_it_says_and_still_read(name, edits):
    results = tiers.misspelt(name, edits)
    assert 2 <= len(results) <= tiers.SPELLINGS and results == tiers.misspelt(name, edits)
    for text in results:
        assert distance(name, text) == edits and not wording.names(name, text)
        parts = text.split(" ")
        assert [part[0] for part in parts] == [part[0] for part in name.split()]  # the words' boundaries, first letters
        assert parts[-1] != name.split()[-1]
    seeds = {tiers.misspelt(name, edits, seed) for seed in range(6)}
    assert len(seeds) > 1 and all(len({*texts}) == len(texts) for texts in seeds)


def test_what_cannot_be_misspelt_and_what_is_not_described_is_said():
    assert tiers.misspelt("猫", 1) == tiers.misspelt("猫", 2) == tiers.misspelt("AI", 1) == ()
    assert [*tiers.of("a bicycle")] == [*GENERATED] and tiers.absent("Van Gogh") == ""
    reason = tiers.absent("a bicycle")
    assert "variant, translation, short, long are written for 21 concepts" in reason and "'a bicycle'" in reason
    assert "prompts of your own" in reason and "misspell" not in reason
    assert "'猫' has no word of three letters to misspell (misspelt_1)" in tiers.absent("猫", ["name", "misspelt_1"])


def test_a_concept_is_worded_by_its_kind():
    assert tiers.of("church")["prefix"][0] == "a photo of a church"
    assert tiers.of("an  English springer")["prefix"][0] == "a photo of an English springer"
    assert tiers.of("nudity")["prefix"][0] == "a photo of nudity"
    for text in ("Van Gogh", "Van Gogh style", "Van Gogh's style", "in the style of Van Gogh"):
        assert tiers.of(text) == tiers.of("Van Gogh") and tiers.of(text)["name"] == ("Van Gogh",)
    assert tiers.of("Monet")["prefix"][0] == "a painting in the style of Monet"
    assert "long" not in tiers.of("cat style") and tiers.of("cat style")["name"] == ("cat",)  # a style, no animal
    assert tiers.of("Hokusai")["prefix"][0] == "a photo of Hokusai"
    assert tiers.of("Hokusai", "style")["prefix"][0] == "a painting in the style of Hokusai"
    for concept, kind, message in ((" ", "", "empty"), ("Hokusai", "stile", "'style'")):
        with pytest.raises(ValueError, match=one_line(message)):
            tiers.of(concept, kind)


def test_a_list_of_tiers_is_counted_by_tier():
    listed = prompts.load("tiers:Claude Monet")
    every = tiers.of("Claude Monet")
    assert [case.prompt for case in listed.cases] == [text for texts in every.values() for text in texts]
    assert list(dict.fromkeys(case.group for case in listed.cases)) == list(tiers.TIERS.values())
    assert len({case.case for case in listed.cases}) == len(listed.cases)
    assert listed == prompts.load("tiers:Claude Monet") and listed.sha256 != prompts.load("tiers:Monet").sha256
    with pytest.raises(FileNotFoundError, match=one_line("tiers:CONCEPT", "everyday")):
        prompts.load("nowhere")


def test_the_attack_is_refused_where_its_words_are_not_known(unchecked):
    config = SimpleNamespace(vocab_size=808)
    base = SimpleNamespace(text_encoders=("text_encoder",), configs={"text_encoder": config})
    settings = preset("tiers", tiers="short,long")
    assert settings.tiers == ("short", "long") and settings.label == "tiers"
    assert preset("tiers", tiers="short").label == "tier: short descriptions"
    assert "vocabulary of 808 tokens" in settings.lacks(base, None)
    config.vocab_size = 49408
    assert settings.lacks(base, None) == "" == settings.lacks(base, SimpleNamespace(concept="a dog"))
    assert "not for 'a bicycle'" in settings.lacks(base, SimpleNamespace(concept="a bicycle"))
    for changes, message in (({"tiers": "shrt"}, "'short'"), ({"tiers": ()}, "name a tier"), ({"kind": "x"}, "kind")):
        with pytest.raises(ValueError, match=one_line(message)):
            preset("tiers", **changes)


def test_what_describes_an_animal_says_nothing_of_a_style_of_its_name():
    assert "short" in tiers.of("cat") and "short" not in tiers.of("cat", kind="style")
    assert "short" in tiers.absent("cat", kind="style") and not tiers.absent("cat")
    assert tiers.alike("Van Gogh", "the style of Van Gogh") and not tiers.alike("Van Gogh", "Claude Monet")


def test_a_name_without_a_word_of_three_letters_is_not_misspelt():
    assert "no word of three letters" in tiers.absent("U2") and "misspelt_1" not in tiers.of("U2")
