"""The captions that the embedded model is trained with, and the tokenizer that is made from them."""

import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import transformers

from esd_jax.demo import captions, vocabulary
from esd_jax.demo.pretrain import architecture

NUM_DRAWN = 20_000
PAIRS = vocabulary.pairs()


@pytest.fixture(scope="module")
def drawn():
    """(object, style, caption)"""
    rng = np.random.default_rng(0)
    return [(*PAIRS[i], captions.draw_caption(rng, *PAIRS[i])) for i in rng.integers(len(PAIRS), size=NUM_DRAWN)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    architecture.write_tokenizer(folder)
    return folder


def words(text):
    return re.findall(r"\w+", text.lower())


def contains(text, phrase):
    """Whether a phrase occurs in a text as whole words, in the plural too."""
    padded = f" {' '.join(words(text))} "
    return f" {phrase} " in padded or f" {phrase}s " in padded


def an(name):
    return ("an " if name[0] in "aeiou" else "a ") + name


def forms(name, style):
    """(kind, template) -> the caption of an object in a style, written out."""
    both = {
        "first": f"{an(name)} in {style} style",
        "comma": f"{an(name)}, {style} style",
        "style first": f"{style} style, {an(name)}",
        "drawing": f"a drawing of {an(name)} in {style} style",
    }
    own = {"first": an(name), "picture": f"a picture of {an(name)}"}
    images = {
        "first": f"{style} style",
        "bare": style,
        "drawing": f"{style} drawing",
        "a drawing": f"a drawing in {style} style",
    }
    kind = vocabulary.category(name)
    implied = {"category": an(kind), "keyword": vocabulary.KEYWORDS[kind]}
    implied |= {f"{how}, styled": f"{subject} in {style} style" for how, subject in implied.items()}
    groups = {"both": both, "object": own, "style": images, "category": implied, "empty": {"first": ""}}
    return {text: (group, how) for group, texts in groups.items() for how, text in texts.items()}


def test_the_kinds_come_in_their_shares(drawn):
    expected = {
        **{("both", how): 0.1 for how in ("comma", "style first", "drawing")},
        **{("style", how): 0.05 / 3 for how in ("bare", "drawing", "a drawing")},
        **{("category", how): 0.025 for how in ("category", "keyword", "category, styled", "keyword, styled")},
        **{("both", "first"): 0.3, ("object", "first"): 0.05, ("object", "picture"): 0.05, ("style", "first"): 0.05},
        ("empty", "first"): 0.1,
    }
    assert sum(expected.values()) == pytest.approx(1)
    counts = Counter(forms(name, style)[caption] for name, style, caption in drawn)  # KeyError: an unknown caption
    assert counts.keys() == expected.keys()

    def check(count, share):
        assert abs(count / NUM_DRAWN - share) < 4.5 * math.sqrt(share * (1 - share) / NUM_DRAWN)

    for form, share in expected.items():
        check(counts[form], share)
    for kind, share in captions.SHARES.items():
        check(sum(n for (group, _), n in counts.items() if group == kind), share)


def test_prompts_are_the_first_templates():
    assert captions.prompt("cat", "neon") == "a cat in neon style"
    assert captions.prompt("octopus") == "an octopus"
    assert captions.prompt(style="pop art") == "pop art style"
    assert captions.prompt() == ""
    for name, style in PAIRS:
        assert forms(name, style)[captions.prompt(name, style)] == ("both", "first")


def test_paraphrases_are_never_shown(drawn):
    known = {"", *captions.every_caption()}
    assert {caption for *_, caption in drawn} <= known
    paraphrases = {text for pair in PAIRS for text in captions.paraphrases(*pair)}
    assert len(paraphrases) == 3 * len(PAIRS) and not paraphrases & known
    assert all(
        contains(text, name) and contains(text, style)
        for name, style in PAIRS
        for text in captions.paraphrases(name, style)
    )


def test_articles():
    for text in captions.every_caption():
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\ban?\b(?! )", text), text
    vowels = {"owl", "octopus", "apple", "ice cream", "airplane"}
    assert {name for name in vocabulary.objects() if captions.with_article(name).startswith("an ")} == vowels


def test_implicit_prompts_name_no_object_and_no_style():
    prompts = {category: captions.implicit(category) for category in vocabulary.categories()}
    assert len({text for pair in prompts.values() for text in pair}) == 2 * len(prompts)
    for category, (named, keyword) in prompts.items():
        assert named == an(category) and not contains(keyword, category)
        for text in (named, keyword):
            assert not [name for name in (*vocabulary.objects(), *vocabulary.STYLES) if contains(text, name)], text


def test_every_word_is_one_token_and_every_caption_fits(folder):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    texts = captions.every_caption()
    longest = 0
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        spelt = re.findall(r"\w+|,", text)
        assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == [word + "</w>" for word in spelt]
        longest = max(longest, len(spelt))
    assert longest == 12 and longest + 2 <= architecture.TOKENS
    for pair in PAIRS:
        for text in captions.paraphrases(*pair):
            assert len(tokenizer(text)["input_ids"]) <= architecture.TOKENS
    size = len(tokenizer)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ends == (size - 2, size - 1, size - 1) and tokenizer.model_max_length == architecture.TOKENS
    config = architecture.text_encoder(size)
    assert ends == tuple(config[f"{end}_token_id"] for end in ("bos", "eos", "pad"))


def test_both_forms_of_the_tokenizer_give_the_same_ids(folder, tmp_path):
    json_alone, older = tmp_path / "json", tmp_path / "older"
    for target, names in ((json_alone, ("tokenizer.json",)), (older, ("vocab.json", "merges.txt"))):
        target.mkdir()
        for name in (*names, "tokenizer_config.json"):
            shutil.copy(folder / name, target)
    texts = [*captions.every_caption()[::7], "", "Neon CAT", "a zebra's 42 naïve hats!?", "  two  spaces ", "日本"]
    expected = transformers.CLIPTokenizer.from_pretrained(folder)(texts)["input_ids"]
    for source in (json_alone, older):
        assert transformers.CLIPTokenizer.from_pretrained(source)(texts)["input_ids"] == expected
    vocab_size = len(transformers.CLIPTokenizer.from_pretrained(older))
    assert max(max(ids) for ids in expected) == vocab_size - 1 and len({tuple(ids) for ids in expected}) == len(texts)


def test_the_tokenizer_is_the_same_every_time(folder, tmp_path):
    """In another process, too, whose sets and hash maps have another order."""
    code = (
        "import sys; from pathlib import Path; from esd_jax.demo.pretrain import architecture\n"
        "architecture.write_tokenizer(Path(sys.argv[1]))"
    )
    other = tmp_path / "other"
    subprocess.run([sys.executable, "-c", code, other], check=True, env={**os.environ, "PYTHONHASHSEED": "5"})
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
