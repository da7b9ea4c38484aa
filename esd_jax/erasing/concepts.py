"""Concepts as a bank of encoded prompts, and which concepts may be erased together."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from esd_jax.erasure import Concept
from esd_jax.params import Conditioning

T = TypeVar("T")
Tokens = Callable[[Sequence[str]], Int[Any, "batch tokens"]]  # prompts -> ids, padded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bank:
    """Every prompt that a run needs, encoded once. Row 0 is the empty prompt.

    rows: Conditioning with a leading axis of rows.
    roles: role ("concept", "anchor", ...) -> the row that each concept uses in it, [concepts]; where a concept may use
      several, [concepts, most], the rest filled up with row 0.
    """

    rows: Conditioning
    roles: Mapping[str, Int[Array, "concepts ..."]]

    def take(self, role: str, concept: Int[Array, " batch"]) -> Conditioning:
        """The conditioning that the examples' concepts have in a role ("null": the empty prompt).

        Leaves are [batch, ...], or [batch, most, ...] in a role of several prompts.
        """
        index = jnp.zeros_like(concept) if role == "null" else self.roles[role][concept]
        return jax.tree.map(lambda a: a[index], self.rows)

    @property
    def num_concepts(self) -> int:
        return next(iter(self.roles.values())).shape[0]


def make_bank(
    encode: Callable[[Sequence[str]], Conditioning],
    concepts: Sequence[T],
    roles: Mapping[str, Callable[[T], str | Sequence[str]]],
) -> Bank:
    """Encodes each distinct prompt once.

    Args:
      encode: prompts -> Conditioning, refusing prompts that are too long.
      concepts: at least one; of prompts alone, these.
      roles: role -> the prompt that a concept has in it ("" is the empty prompt), or all of them.
    """
    if not concepts:
        raise ValueError("no concept to erase")
    texts: dict[str, int] = {"": 0}
    indices: dict[str, Array] = {}
    for role, prompts in roles.items():
        asked = [prompts(concept) for concept in concepts]
        lists = [[one] if isinstance(one, str) else list(one) for one in asked]
        most = max(1, *map(len, lists))
        rows = [[texts.setdefault(text, len(texts)) for text in row] + [0] * (most - len(row)) for row in lists]
        index = jnp.asarray(rows, jnp.int32)
        indices[role] = index[:, 0] if isinstance(asked[0], str) else index
    return Bank(encode(list(texts)), indices)


def check_concepts(tokens: Tokens, concepts: Sequence[Concept]) -> None:
    """Raises ValueError for what no method can do, compared as the text encoder reads it: "A Cat" is "a cat".

    No concept; one that is the empty prompt, or named twice, or to become itself; one that is to be kept; a prompt that
    is to be kept twice.

    Args:
      tokens: prompts -> ids, padded.
      concepts: all of a run's.
    """
    if not concepts:
        raise ValueError("the concept is empty: name what is to be erased")
    read = reader(tokens)
    known: dict[Any, str] = {}
    for concept in concepts:
        for text in (concept.text, concept.erased_from):
            if read(text) == read(""):
                raise ValueError(f"concept {text!r} has no token that the text encoder knows: name it otherwise")
        place = read(concept.erased_from)
        if other := known.get((read(concept.text), place)):
            raise ValueError(f"concepts {other!r} and {concept.text!r} are one to the text encoder: name it once")
        known[read(concept.text), place] = concept.text
        if place in map(read, concept.replace_with):
            raise ValueError(f"concept {concept.text!r} is to become what it is: give another replace_with")
    kept: dict[Any, str] = {}
    for text in (text for concept in concepts for text in concept.preserve):
        if kept.setdefault(read(text), text) != text:
            raise ValueError(f"preserve has {kept[read(text)]!r} and {text!r}, one to the text encoder: name it once")
    for concept in concepts:
        if text := kept.get(read(concept.erased_from)):
            raise ValueError(f"concept {concept.erased_from!r} is also among the prompts to preserve, as {text!r}")


def reader(tokens: Tokens) -> Callable[[str], tuple[int, ...]]:
    """prompt -> the ids of its words; of one whose tokens all mean nothing, those of the empty prompt, ()."""
    (empty,) = np.asarray(tokens([""]))
    start, end, pad = empty[0], empty[1], empty[-1]

    @functools.cache
    def read(prompt: str) -> tuple[int, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prompt that is too long is refused, or reported, where it is encoded
            (ids,) = np.asarray(tokens([prompt]))
        last = int(np.max(np.flatnonzero(ids != pad), initial=0))  # the end; or a word, where ends are padding
        words = tuple(ids[1 : last + int(pad == end)].tolist())
        return words if set(words) - {start, end} else ()

    return read
