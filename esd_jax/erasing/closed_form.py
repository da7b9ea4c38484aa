"""What the closed forms share: the vectors that layers read of prompts, and which of them should become which.

For the weight W0 [out, context] of a key or value of cross-attention, or of another layer that reads prompts and
nothing else, token vectors c_i with weights s_i and what they
should be read as, c*_i,

    W = argmin  sum_i s_i |W c_i - W0 c*_i|^2 + lam |W - W0|_F^2

has W0 on the right of its normal equations alone, so W = W0 (1 + E)^T with one E [context, context] for all tensors:

    M E = sum_i s_i c_i (c*_i - c_i)^T,        M = lam 1 + sum_i s_i c_i c_i^T.

What is to be retained has c*_i = c_i; or the change reads no direction of it at all, E = U U^T E with U^T c = 0 (double
projection, arXiv 2604.10032, for one vector; its least squares for several are not from there). Solving for the change
E, not for W, leaves the weights as they are, bit for bit, where there is nothing to erase.

Layers that read different vectors of a prompt (a flow transformer's `context_embedder` and `text_embedder`) are each
solved for apart, as a `Space`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esd_jax.erasing import contexts
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.contexts import Context
from esd_jax.erasing.images import in_batches
from esd_jax.erasing.method import ClosedForm, Tools
from esd_jax.families.family import Reading
from esd_jax.params import Params
from esd_jax.selection import SUBSETS, select

SUBSET = "esd-x-strict"
READ = "uce"  # of a family with `readings`
ENCODED_AT_ONCE = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edit:
    """Which vectors should map to which others. A preserved vector is its own `new`.

    free: an orthonormal basis of the directions that the change reads; None: all of them.
    """

    old: Float[Array, "vectors context"]
    new: Float[Array, "vectors context"]
    weight: Float[Array, " vectors"]
    lam: Float[Array, ""]
    free: Float[Array, "context directions"] | None = None


def change(edit: Edit) -> Float[Array, "context context"]:
    """E of the module's docstring: row vectors c become c (1 + E) before the weights as they were."""
    root = jnp.sqrt(edit.weight)[:, None]
    if edit.free is None:
        return ridge(root * edit.old, root * (edit.new - edit.old), edit.lam)
    return edit.free @ ridge(root * (edit.old @ edit.free), root * (edit.new - edit.old), edit.lam)


def ridge(
    x: Float[Array, "rows inputs"], y: Float[Array, "rows outputs"], penalty: Float[Array, ""]
) -> Float[Array, "inputs outputs"]:
    """(x^T x + penalty 1)^-1 x^T y.

    By the singular values of x, since x^T x would square them: CLIP's vectors are long and alike, so that the system's
    condition number takes most of float32's digits.
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return vt.T @ ((s / (s**2 + penalty))[:, None] * (u.T @ y))


def apply_change(theta: Params, change: Float[Array, "context context"]) -> Params:
    """The kernels [context, out] before which (1 + change) stands."""
    return {name: kernel + change @ kernel for name, kernel in theta.items()}


class Encoded(NamedTuple):
    """A prompt's vectors, its token ids, and the index of its words' last token (0, the start token, without words)."""

    vectors: Float[Array, "tokens context"]
    ids: Int[np.ndarray, " tokens"]
    last: int


def encode(tools: Tools, concepts: Sequence[Concept], prompts: Sequence[str] = ()) -> Mapping[str, Encoded]:
    """The empty prompt, the concepts, their guides, and other prompts, as cross-attention reads them.

    Raises ValueError for a concept whose text has no token: its vector would be that of every prompt's start.
    """
    texts = _texts(concepts, prompts)
    return by_encoder(tools.vectors(_encoded(tools, texts)), texts, concepts, [tools.tokens])[0]


class Space(NamedTuple):
    """Layers that read the same vectors of a prompt.

    names: their weights, as a run calls them; () of all that is trained. vectors: as in `Reading`.
    parts: the prompts, as each of the text encoders whose tokens the vectors are has them.
    """

    names: tuple[str, ...]
    vectors: Callable[[Any], Array]
    parts: tuple[Mapping[str, Encoded], ...]

    def aligned(self, old: str, new: str, tokens: str) -> list[tuple[Array, Array]]:
        """`aligned`, of each part."""
        return [aligned(part[old], part[new], tokens) for part in self.parts]

    def whole(self, text: str) -> list[Array]:
        """All vectors of a prompt, of each part."""
        return [part[text].vectors for part in self.parts]


def spaces(tools: Tools, concepts: Sequence[Concept], prompts: Sequence[str] = ()) -> list[Space]:
    """The layers that are edited, with the prompts of `encode`. Raises ValueError as it does."""
    texts = _texts(concepts, prompts)
    rows, edited = _encoded(tools, texts), []
    for reading in tools.readings or (Reading("", tools.vectors, ("",)),):
        names = [f"{tools.component}/{name}" for name in tools.subset if re.search(reading.layers, name)]
        tokenizers = [tools.tokenizers[name] for name in reading.encoders if name in tools.tokenizers]
        parts = by_encoder(reading.vectors(rows), texts, concepts, tokenizers if tools.readings else [tools.tokens])
        edited.append(Space(tuple(names) if tools.readings else (), reading.vectors, parts))
    return edited


def _texts(concepts: Sequence[Concept], prompts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(["", *(c.text for c in concepts), *(c.anchor for c in concepts), *prompts]))


def _encoded(tools: Tools, texts: list[str]) -> Any:
    return in_batches(tools.encode, texts, ENCODED_AT_ONCE)


def by_encoder(
    vectors: Float[Array, "texts tokens context"],
    texts: Sequence[str],
    concepts: Sequence[Concept],
    tokenizers: Sequence[Callable[[Sequence[str]], Any]],
) -> tuple[Mapping[str, Encoded], ...]:
    """The texts' vectors by tokenizer, whose tokens follow one another; without one, a single vector for a text.

    Raises ValueError for a concept without a token of its own.
    """
    if not tokenizers:
        ids = np.arange(len(texts))[:, None]  # no two texts are alike
        return ({text: Encoded(v[:1], row, 0) for text, v, row in zip(texts, vectors, ids, strict=True)},)
    parts, first = [], 0
    for tokens in tokenizers:
        ids, last = np.asarray(tokens(texts)), last_tokens(tokens, texts)
        before = getattr(tokens, "before", int(_starts(ids, np.asarray(tokens([""]))[0])))
        own = vectors[:, first : first + ids.shape[1]]
        first += ids.shape[1]
        encoded = {text: Encoded(v, row, int(i)) for text, v, row, i in zip(texts, own, ids, last, strict=True)}
        for concept in concepts:
            one = encoded[concept.text]
            if one.last < before if before else np.array_equal(one.ids, encoded[""].ids):
                raise ValueError(f"concept {concept.text!r} has no token that the text encoder knows")
        parts.append(encoded)
    return tuple(parts)


def _starts(ids: Int[np.ndarray, "prompts tokens"], empty: Int[np.ndarray, " tokens"]) -> bool:
    """Whether a token stands before those of every prompt, as CLIP has one and T5 has none."""
    return bool((ids[:, 0] == empty[0]).all())


def last_tokens(tokens: Callable[[Sequence[str]], Any], prompts: Sequence[str]) -> Int[np.ndarray, " prompts"]:
    """The index of the last token of each prompt's words: the one before the end token, 0 if there are no words.

    The end token is searched from the end, past the padding. SD 1 pads with the end token itself, SD 2 with "!"; and
    the tokenizer of a small vocabulary puts the end token for characters that it does not know. T5 has no start token,
    so that its empty prompt's first vector is that of the end. A chat has several tokens before the words, and behind
    them, and its tokenizer says how many.
    """
    ids = np.asarray(tokens(prompts))
    empty = np.asarray(tokens([""]))[0]
    end, pad = empty[int(_starts(ids, empty))], empty[-1]
    last = np.max(np.where(ids != pad, np.arange(ids.shape[1]), 0), axis=1)
    return last if pad == end else np.maximum(last - getattr(tokens, "behind", 1), 0)


def over_spaces(edited: Sequence[Space], make: Callable[[Space], tuple[ClosedForm, Any]]) -> tuple[ClosedForm, Any]:
    """A closed form over all spaces, each solved for apart; of one, the closed form itself."""
    solvers = [make(space) for space in edited]
    if len(solvers) == 1:
        return solvers[0]
    methods, inputs = zip(*solvers, strict=True)
    return Apart(tuple(space.names for space in edited), methods), inputs


@dataclass(frozen=True, eq=False)
class Apart(ClosedForm):
    """Closed forms of different tensors, with a tuple of their inputs."""

    names: tuple[tuple[str, ...], ...]
    methods: tuple[ClosedForm, ...]

    def solve(self, theta: Params, inputs: tuple[Any, ...]) -> Params:
        solved = dict(theta)
        for names, method, own in zip(self.names, self.methods, inputs, strict=True):
            solved |= method.solve({name: theta[name] for name in names}, own)
        return solved


def aligned(
    old: Encoded, new: Encoded, tokens: str
) -> tuple[Float[Array, "vectors context"], Float[Array, "vectors context"]]:
    """Which vector of one prompt is to become which of another (`methods.uce.UCE.tokens`)."""
    if tokens == "positions":
        first = int(np.argmax([*(old.ids != new.ids), True]))  # before it, one text encoder has read the same
        return old.vectors[first:], new.vectors[first:]
    length = 1 if tokens == "last" else len(old.vectors) - max(old.last, new.last)
    return old.vectors[old.last : old.last + length], new.vectors[new.last : new.last + length]


def edit(pairs: Sequence[tuple[Array, Array, float]], lam: float, free: Array | None = None) -> Edit:
    """An edit from (old vectors, new vectors, weight), ..."""
    old, new, weights = zip(*pairs, strict=True)
    weight = np.repeat(np.asarray(weights, np.float32), [len(vectors) for vectors in old])
    return Edit(jnp.concatenate(old), jnp.concatenate(new), jnp.asarray(weight), jnp.float32(lam), free)


def prompts(concept: Concept, sentences: Sequence[Context] = (), phrases: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The prompts that a concept is erased from, and what each becomes: alone, in phrases ("art by {}"), contexts."""
    alone = [(phrase.format(concept.text), concept.anchor) for phrase in ("{}", *phrases)]
    return [*alone, *contexts.pairs(sentences, concept.text, concept.anchor)]


def preserved(concepts: Sequence[Concept]) -> list[str]:
    """The prompts that any of the concepts preserves, each once."""
    return list(dict.fromkeys(text for concept in concepts for text in concept.preserve))


def check_weighed(concepts: Sequence[Concept], preserve_scale: float) -> None:
    """Raises ValueError for preserved prompts that weigh nothing."""
    if (kept := preserved(concepts)) and not preserve_scale:
        raise ValueError(f"preserve={kept[0]!r} weighs nothing with preserve_scale=0: give more, or preserve=''")


def check(tools: Tools, concepts: Sequence[Concept], subsets: Sequence[str] = (SUBSET,), several: bool = False) -> None:
    """Raises ValueError, in one line, for a run that no closed form can make.

    subsets: those that the method edits, the first one its own; where the model has `readings`, `READ` in their place.
    several: a concept may have several replacements.
    """
    layouts, meaning = tools.denoiser.layouts, SUBSETS[subsets[0]].meaning
    edited = [set(select(name, layouts)) for name in subsets] if not tools.readings else []
    if tools.readings:
        subsets, meaning = (READ,), "the linear layers that read the prompt alone"
        edited = [{name for name in layouts if any(re.search(r.layers, name) for r in tools.readings)}]
    apart = [names.symmetric_difference(tools.subset) for names in edited]
    if all(apart):
        other, edits = sorted(apart[0]), meaning
        raise ValueError(
            f"this closed form edits all of {edits}: give subset={subsets[0]!r} (yours differs by {len(other)} "
            f"tensors, {other[0]!r} among them)"
        )
    if tools.images is not None:
        raise ValueError("images mean nothing to a closed form: it works on prompts alone")
    if not concepts:
        raise ValueError("no concept to erase")
    for concept in concepts:
        if concept.text in preserved(concepts):
            raise ValueError(f"concept {concept.text!r} is also among the prompts to preserve")
        if len(concept.replace_with) > 1 and not several:
            raise ValueError(f"concept {concept.text!r} can become one thing, not {len(concept.replace_with)}")
        if concept.strength < 0:
            raise ValueError(f"strength={concept.strength} must not be negative: it weighs an error")


def check_positive(settings: Any, *fields: str, or_zero: bool = False) -> None:
    """Raises ValueError for a field that is not a positive number."""
    for field in fields:
        value = getattr(settings, field)
        if not (math.isfinite(value) and (value > 0 or or_zero and value == 0)):
            raise ValueError(f"{field}={value} must be {'at least 0' if or_zero else 'positive'}")
