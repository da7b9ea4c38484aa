"""Prompts that a closed form retains: corpora in the package or in a file, and their second moment.

A closed form retains what it is shown and nothing else, so it is shown thousands of prompts. Of these, the least
squares of `closed_form` need their second moment alone: its square root stands for all of them, in as many rows as a
token vector is wide.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esd_jax import inputs, prompt_files, results
from esd_jax.erasing.closed_form import ENCODED_AT_ONCE, last_tokens
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Tools
from esd_jax.text import PromptTruncated, Tokenizer
from esd_jax.wording import ARTICLES

NAMES = ("emoji", "general")
COMMON = 0.25  # a word in so large a share of the prompts tells none of them apart
WORTH_A_FILE = 256  # prompts


def prompts(name: str) -> dict[str, float]:
    """The prompts of a corpus, and the weight of each.

    name: one of `NAMES`, or a .txt or .csv file, all of whose prompts weigh 1. A corpus of the package is {"words":
    {kind: [...]}, "groups": [{"of": [kind, ...], "templates": [...], "share": s}, ...]}: every template of a group,
    with every combination of its words, equal parts of its share; without a share, each prompt weighs 1.

    Raises ValueError, or OSError, for another name and a file that cannot be read.
    """
    if name in NAMES:
        corpus = json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
        weights: Counter[str] = Counter()
        for group in corpus["groups"]:
            filled = list(_filled(group, corpus["words"]))
            for text in filled:
                weights[text] += group["share"] / len(filled) if "share" in group else 1
        return dict(weights)
    path = inputs.expanded(name)
    if path.suffix.lower() not in prompt_files.SUFFIXES:
        raise ValueError(f"retain={name!r} is no corpus: choose one of {', '.join(NAMES)}, or a .txt or .csv file")
    return dict.fromkeys(prompt_files.read(path), 1.0)


def _filled(group: Mapping[str, Any], known: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for words in itertools.product(*(known[kind] for kind in group["of"])):
        for template in group["templates"]:
            yield template.format(**dict(zip(group["of"], words, strict=True)))


def without(texts: Sequence[str], concepts: Sequence[str]) -> list[str]:
    """The prompts that hold no concept: neither all of its words nor its rarest.

    A concept comes in other words, too: "neon style" as "a neon drawing", and "a cat" as "the cat". Rarest: of those
    that the prompts hold at all, but no article. Alone, a word that a quarter of them hold ("style") leaves none out.
    """
    words = [frozenset(_words(text)) for text in texts]
    counts = Counter(itertools.chain.from_iterable(words))
    names = [frozenset(_words(concept)) - ARTICLES for concept in concepts]
    for concept in concepts:
        held = [word for word in _words(concept) if counts[word] and word not in ARTICLES]
        if held and counts[word := min(held, key=counts.__getitem__)] <= COMMON * len(texts):
            names.append(frozenset({word}))
    return [text for text, own in zip(texts, words, strict=True) if not any(name and name <= own for name in names)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def retained(
    name: str, concepts: Sequence[Concept], others: Sequence[str] = (), tokens: Any = None
) -> dict[str, float]:
    """A corpus without the concepts, and other prompts of average weight: prompt -> weight.

    tokens: the tokenizer. Prompts of the corpus that are longer than what it reads are cut, as they are in sampling.

    Raises ValueError where nothing of the corpus is left, and ValueError, or OSError, as `prompts` does.
    """
    weights, erased = prompts(name), [concept.text for concept in concepts]
    left = {text: weights[text] for text in without(list(weights), erased)}
    if not left:
        raise ValueError(
            f"retain={name!r}: each of its {len(weights)} prompts has a word of {', '.join(map(repr, erased))}"
        )
    return {**dict.fromkeys(others, sum(left.values()) / len(left)), **cut(left, tokens)}


def cut(weights: Mapping[str, float], tokens: Any) -> Mapping[str, float]:
    """The prompts without what a tokenizer does not read, and with a warning that says of how many it is."""
    if not isinstance(tokens, Tokenizer):  # of shapes alone there is none
        return weights
    shorter: dict[str, float] = {}
    for text, weight in weights.items():
        read = shortened(tokens, text)
        shorter[read] = shorter.get(read, 0) + weight
    if count := len(weights.keys() - shorter.keys()):
        message = f"{count} of {len(weights)} retained prompts are cut: the text encoder reads {tokens.room} tokens"
        warnings.warn(message, PromptTruncated, stacklevel=2)
    return shorter


def shortened(tokens: Tokenizer, prompt: str) -> str:
    """A prompt without the words that a tokenizer does not read."""
    if len(ids := tokens.words(prompt)) <= tokens.room:
        return prompt
    for most in range(tokens.room, 0, -1):  # decoded, they may be a token more
        text = tokens.backend.decode(ids[:most]).strip()
        if len(tokens.words(text)) <= tokens.room:
            return text
    return ""


def drawn(weights: Mapping[str, float], count: int, rng: np.random.Generator) -> list[str]:
    """So many prompts, with repetition, each as likely as its weight says."""
    texts, parts = list(weights), np.fromiter(weights.values(), float)
    return [texts[i] for i in rng.choice(len(texts), count, p=parts / parts.sum())]


def root(moment: Float[np.ndarray, "width width"]) -> Float[Array, "width width"]:
    """X with X^T X the second moment: rows that stand for all vectors that it is of."""
    values, vectors = np.linalg.eigh(moment)
    return jnp.asarray(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T, jnp.float32)


def free_directions(moment: Float[np.ndarray, "width width"], directions: int) -> Float[Array, "width free"]:
    """An orthonormal basis of what is orthogonal to the strongest directions of a second moment.

    Raises ValueError if nothing is.
    """
    _, vectors = np.linalg.eigh(moment)  # the weakest first
    if (free := len(moment) - directions) < 1:
        raise ValueError(f"directions={directions} leaves nothing to change: token vectors have {len(moment)}")
    return jnp.asarray(vectors[:, :free], jnp.float32)


def moment(
    tools: Tools, weights: Mapping[str, float], vectors: Callable[[Any], Array] | None = None
) -> Float[np.ndarray, "width width"]:
    """The weighted mean over prompts of the sum of c c^T over all of their token vectors c, in float64.

    vectors: conditioning -> what layers read of it; by default `Tools.vectors`. Of these and many prompts it is
      computed once, and kept in a file under a hash of the text encoders and the prompts.
    """
    if vectors is None or vectors is tools.vectors:
        return _moment(tools, weights, words=False)
    return _moment(dataclasses.replace(tools, vectors=vectors, cache=False), weights, words=False)


def word_moment(tools: Tools, weights: Mapping[str, float]) -> Float[np.ndarray, "width width"]:
    """The mean of c c^T over the token vectors c of the prompts' words, start and end tokens too; kept likewise."""
    return _moment(tools, weights, words=True)


def _moment(tools: Tools, weights: Mapping[str, float], words: bool) -> Float[np.ndarray, "width width"]:
    texts = list(weights)

    def compute() -> dict[str, np.ndarray]:
        total, tokens = np.zeros(()), 0.0
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            some = texts[start : start + ENCODED_AT_ONCE]
            vectors = np.asarray(tools.vectors(tools.encode(some)), np.float64)
            squares = np.array([weights[text] for text in some])[:, None]
            if words:
                squares = squares * (np.arange(vectors.shape[1]) <= last_tokens(tools.tokens, some)[:, None] + 1)
                tokens += squares.sum()
            flat = (np.sqrt(squares)[:, :, None] * vectors).reshape(-1, vectors.shape[-1])
            total = total + flat.T @ flat
        return {"moment": total / (tokens if words else sum(weights.values()))}

    if len(texts) < WORTH_A_FILE or not tools.cache:
        return compute()["moment"]
    file = inputs.cache("moments") / f"{'words-' if words else ''}{_fingerprint(tools, weights)}.npz"
    if (stored := results.read(file)) is not None:
        return stored["moment"]
    fields = compute()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        results.write(file, fields)
    return fields["moment"]


def _fingerprint(tools: Tools, weights: Mapping[str, float]) -> str:
    """Of the prompts, their weights and token ids, and of the text encoders' parameters."""
    known = hashlib.sha256(json.dumps(dict(weights)).encode())
    known.update(np.ascontiguousarray(tools.tokens(list(weights)), np.int64).tobytes())
    for component in sorted(tools.text_encoders):
        for name, value in sorted(tools.params[component].items()):
            known.update(f"{name} {value.dtype} {value.shape}".encode())
            known.update(np.ascontiguousarray(value).tobytes())
    return known.hexdigest()
