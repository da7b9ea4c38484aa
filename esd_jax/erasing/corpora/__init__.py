"""Prompts that a closed form retains: corpora in the package or in a file, and their second moment.

A closed form retains what it is shown and nothing else, so it is shown thousands of prompts. Of these, the least
squares of `closed_form` need their second moment alone: its square root stands for all of them, in as many rows as a
token vector is wide.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esd_jax import inputs, prompt_files, results
from esd_jax.erasing.closed_form import ENCODED_AT_ONCE
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Tools

NAMES = ("emoji", "general")
ARTICLES = frozenset({"a", "an", "the"})
COMMON = 0.25  # a word in so large a share of the prompts tells none of them apart
WORTH_A_FILE = 256  # prompts


def prompts(name: str) -> list[str]:
    """The prompts of a corpus, each once.

    name: one of `NAMES`, or a .txt or .csv file. A corpus of the package is {"words": {kind: [...]}, "groups": [{"of":
    [kind, ...], "templates": [...]}, ...]}: every template of a group, with every combination of its words.

    Raises ValueError, or OSError, for another name and a file that cannot be read.
    """
    if name in NAMES:
        corpus = json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
        return list(dict.fromkeys(_filled(corpus)))
    path = inputs.expanded(name)
    if path.suffix.lower() not in prompt_files.SUFFIXES:
        raise ValueError(f"retain={name!r} is no corpus: choose one of {', '.join(NAMES)}, or a .txt or .csv file")
    return list(dict.fromkeys(prompt_files.read(path)))


def _filled(corpus: dict) -> Iterator[str]:
    for group in corpus["groups"]:
        for words in itertools.product(*(corpus["words"][kind] for kind in group["of"])):
            for template in group["templates"]:
                yield template.format(**dict(zip(group["of"], words, strict=True)))


def without(texts: Sequence[str], concepts: Sequence[str]) -> list[str]:
    """The prompts that hold no concept: neither all of its words nor its rarest.

    A concept comes in other words, too: "neon style" as "a neon drawing", and "a cat" as "the cat". Rarest: of those
    that the prompts hold at all. Alone, a word that a quarter of them hold ("a", "style") leaves none of them out.
    """
    words = [frozenset(_words(text)) for text in texts]
    counts = Counter(itertools.chain.from_iterable(words))
    names = [frozenset(_words(concept)) - ARTICLES for concept in concepts]
    for concept in concepts:
        held = [word for word in _words(concept) if counts[word]]
        if held and counts[word := min(held, key=counts.__getitem__)] <= COMMON * len(texts):
            names.append(frozenset({word}))
    return [text for text, own in zip(texts, words, strict=True) if not any(name and name <= own for name in names)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def retained(name: str, concepts: Sequence[Concept], others: Sequence[str] = ()) -> list[str]:
    """A corpus without the concepts, and other prompts. Raises ValueError, or OSError, as `prompts` does."""
    return list(dict.fromkeys([*without(prompts(name), [concept.text for concept in concepts]), *others]))


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


def moment(tools: Tools, texts: Sequence[str]) -> Float[np.ndarray, "width width"]:
    """The mean over prompts of the sum of c c^T over all of their token vectors c, in float64.

    Of many prompts it is computed once, and kept in a file under a hash of the text encoders and the prompts.
    """

    def compute() -> dict[str, np.ndarray]:
        total = 0.0
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            vectors = tools.vectors(tools.encode(texts[start : start + ENCODED_AT_ONCE]))
            flat = np.asarray(vectors, np.float64).reshape(-1, vectors.shape[-1])
            total = total + flat.T @ flat
        return {"moment": total / len(texts)}

    if len(texts) < WORTH_A_FILE or tools.cache is None:
        return compute()["moment"]
    return results.kept(tools.cache / f"{_fingerprint(tools, texts)}.npz", compute)["moment"]


def _fingerprint(tools: Tools, texts: Sequence[str]) -> str:
    """Of the prompts, their token ids and the text encoders' weights."""
    known = hashlib.sha256(json.dumps(list(texts)).encode())
    known.update(np.ascontiguousarray(tools.tokens(texts), np.int64).tobytes())
    for component in sorted(tools.text_encoders):
        for name, value in sorted(tools.params[component].items()):
            known.update(f"{name} {value.dtype} {value.shape}".encode())
            known.update(np.ascontiguousarray(value).tobytes())
    return known.hexdigest()
