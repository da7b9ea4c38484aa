"""What closed forms retain: the corpora of the package, those of files, and their second moment."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from edits import encode, ids, tools, vectors
from messages import one_line

from esd_jax import results
from esd_jax.demo import captions, vocabulary
from esd_jax.erasing import corpora
from esd_jax.erasing.concepts import Concept

TEXTS = [f"word{i} thing" for i in range(corpora.WORTH_A_FILE)]

ONES = dict.fromkeys(TEXTS, 1.0)


def second_moment(texts):
    return sum(vectors(text).T @ vectors(text) for text in texts) / len(texts)


def test_the_embedded_models_corpus_is_the_captions_of_its_training_as_often_as_there():
    weights = corpora.prompts("emoji")
    assert weights.keys() <= {"", *captions.every_caption()} and sum(weights.values()) == pytest.approx(1)
    rng, n = np.random.default_rng(0), 4000
    pairs = [(name, style) for style in vocabulary.STYLES for name in vocabulary.objects()]
    drawn = [captions.draw_caption(rng, *pairs[rng.integers(len(pairs))]) for _ in range(n)]
    assert set(drawn) <= weights.keys()
    for holds in (
        lambda text: text == "",
        lambda text: text.endswith(" style") and " in " in text and not text.startswith("a drawing of"),
        lambda text: "style, " in text,
        lambda text: any(text == captions.prompt(name) for name in vocabulary.objects()),
        lambda text: any(phrase in text for c in vocabulary.categories() for phrase in captions.implicit(c)),
    ):
        share, expected = np.mean([holds(text) for text in drawn]), sum(w for t, w in weights.items() if holds(t))
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("name", corpora.NAMES)
def test_a_corpus_has_each_prompt_once_and_no_loose_braces(name):
    prompts = corpora.prompts(name)
    assert len(prompts) > 1000 and min(prompts.values()) > 0
    assert not [text for text in prompts if text != text.strip() or {*"{}"} & {*text} or "  " in text]


@pytest.mark.parametrize(
    "concept, gone, stays",
    [
        ("neon style", "a neon drawing", "ink style"),
        ("a cat", "the cat in ink style", "a dog in ink style"),
        ("pop art style", "pop art", "a dog in ink style"),
        ("an ice cream", "ice cream, ink style", "a dog in ink style"),
        ("a red dragon", "a cat, red", "a dog in ink style"),  # no prompt has the dragon
        ("a style", "ink style", "a cat, red"),
        ("style lamp", None, "ink style"),  # which most prompts have
        ("Zeus", None, "ink style"),
    ],
)
def test_prompts_that_hold_a_concept_are_left_out(concept, gone, stays):
    texts = ["a neon drawing", "the cat in ink style", "pop art", "ice cream, ink style", "a cat, red"]
    texts += [f"a {thing} in ink style" for thing in ("dog", "lion", "car", "house", "bee", "rose")] + ["ink style"] * 4
    left = corpora.without(texts, [concept])
    assert stays in left and gone not in left
    assert left == [text for text in texts if text in left]
    assert gone is not None or left == texts


def test_a_file_of_prompts_and_what_is_none(tmp_path):
    (tmp_path / "kept.txt").write_text("a dog\n\na cat\na dog\n")
    assert corpora.prompts(str(tmp_path / "kept.txt")) == {"a dog": 1, "a cat": 1}
    concepts = [Concept("a cat")]
    assert corpora.retained(str(tmp_path / "kept.txt"), concepts, ["", "a dog"]) == {"": 1, "a dog": 1}
    with pytest.raises(ValueError, match=one_line("each of its 2 prompts", "'a cat', 'a dog'")):
        corpora.retained(str(tmp_path / "kept.txt"), [*concepts, Concept("a dog")])
    with pytest.raises(ValueError, match=one_line("retain='vocabulary'", "emoji, general", ".txt")):
        corpora.prompts("vocabulary")
    with pytest.raises(OSError):
        corpora.prompts(str(tmp_path / "none.txt"))


def test_the_moment_and_its_root():
    moment = corpora.moment(tools(), dict.fromkeys(TEXTS[:70], 2.0))  # two batches of prompts
    np.testing.assert_allclose(moment, second_moment(TEXTS[:70]), rtol=1e-5, atol=1e-4)  # encoded in float32
    heavy = corpora.moment(tools(), {TEXTS[0]: 3.0, TEXTS[1]: 1.0})
    expected = 0.75 * second_moment(TEXTS[:1]) + 0.25 * second_moment(TEXTS[1:2])
    np.testing.assert_allclose(heavy, expected, rtol=1e-5, atol=1e-4)
    rows = np.asarray(corpora.root(moment), float)
    np.testing.assert_allclose(rows.T @ rows, moment, rtol=1e-5, atol=1e-3)


def test_free_directions_are_orthogonal_to_the_strongest():
    moment = second_moment(TEXTS[:8])
    free = np.asarray(corpora.free_directions(moment, 5), float)
    np.testing.assert_allclose(free.T @ free, np.eye(len(moment) - 5), atol=1e-6)
    values = np.linalg.eigvalsh(moment)
    assert np.linalg.eigvalsh(free.T @ moment @ free).max() <= values[-6] * (1 + 1e-5)
    with pytest.raises(ValueError, match="directions=48 leaves nothing"):
        corpora.free_directions(moment, len(moment))


def test_a_moment_is_computed_once_for_its_prompts_and_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, calls = tmp_path / "esd_jax" / "moments", []

    def counted(texts):
        calls.append(len(texts))
        return encode(texts)

    params = {"text_encoder": {"a": jnp.ones(3)}}
    known = tools(encode=counted, cache=True, text_encoders={"text_encoder": None}, params=params)
    first = corpora.moment(known, ONES)
    assert sum(calls) == len(TEXTS)
    np.testing.assert_array_equal(corpora.moment(known, ONES), first)
    assert sum(calls) == len(TEXTS) and len(list(folder.iterdir())) == 1
    corpora.moment(dataclasses.replace(known, params={"text_encoder": {"a": jnp.zeros(3)}}), ONES)
    corpora.moment(known, dict.fromkeys([*TEXTS[1:], "another"], 1.0))
    corpora.moment(dataclasses.replace(known, tokens=lambda texts: ids(texts) + 1), ONES)
    corpora.moment(known, {**ONES, TEXTS[0]: 2.0})
    assert sum(calls) == 5 * len(TEXTS) and len(list(folder.iterdir())) == 5
    corpora.moment(known, dict.fromkeys(TEXTS[:3], 1.0))  # too few for a file
    assert len(list(folder.iterdir())) == 5
    monkeypatch.setattr(results, "write", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    np.testing.assert_array_equal(
        corpora.moment(known, {**ONES, "more": 1.0}), corpora.moment(known, {**ONES, "more": 1.0})
    )


@pytest.mark.parametrize(
    ("concept", "left_out"),
    [("an axolotl", []), ("the Joker", []), ("the neon style", ["neon", "a neon drawing"]), ("an owl", ["an owl"])],
)
def test_an_article_is_no_word_of_a_concept(concept, left_out):
    texts = [
        "neon",
        "a neon drawing",
        "an owl",
        "an otter",
        "the moon",
        "a cat",
        "a dog",
        "a bus",
        "a lion",
    ]
    assert [text for text in texts if text not in corpora.without(texts, [concept])] == left_out
