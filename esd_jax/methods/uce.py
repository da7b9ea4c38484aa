"""UCE: *Unified Concept Editing in Diffusion Models* (Gandikota et al., WACV 2024), in closed form.

For the weight W0 [out, context] of each key and value of cross-attention, token vectors c_i to erase with weights s_i,
their guides c*_i, and vectors c_j to preserve with weight s_p:

    W = argmin  sum_i s_i |W c_i - W0 c*_i|^2 + s_p sum_j |W c_j - W0 c_j|^2 + lam |W - W0|_F^2        (Eq. 7)

Its normal equations hold W0 on the right alone, so W = W0 (1 + E)^T with one E [context, context] for all tensors:

    M E = sum_i s_i c_i (c*_i - c_i)^T,        M = lam 1 + sum_i s_i c_i c_i^T + s_p sum_j c_j c_j^T.

Solving for the change E, not for W, leaves the weights as they are, bit for bit, where there is nothing to erase.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.images import in_batches
from esd_jax.erasing.method import ClosedForm, Tools, choose
from esd_jax.params import Params
from esd_jax.selection import select

SUBSET = "esd-x-strict"
EXPANSIONS = {
    "none": (),
    "art": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}
ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class UCE:
    """Settings; the defaults are those of the authors' code of 2025 (the `object` preset).

    A concept's `replace_with` is its guide, by default the empty prompt; `strength` multiplies its erase_scale.

    tokens: which vectors of a prompt are edited.
      "last": the last token of its words; of the empty prompt, the start token. Code of 2025.
      "all": that token and all after it, padding too, paired with the guide's from its own last token on; all vectors
        of preserved prompts, to which the empty prompt is added. Code of 2023.
    expand: "art" or "object" also erases the concept in five phrases ("painting by Van Gogh"); "none".
    lam: how hard the weights are held to the old ones.
    erase_scale, preserve_scale: s_i and s_p, the weights of each vector.
    """

    tokens: str = "last"
    expand: str = "none"
    lam: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float = 1.0

    trained: ClassVar = False
    uses: ClassVar = frozenset({"replace_with", "strength"})
    needs: ClassVar = frozenset({"attention_names", "cross_attention"})
    ema: ClassVar = None
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "object": {"subset": SUBSET, "steps": 0},
        "art": {"replace_with": "art", "subset": SUBSET, "steps": 0},
        "2023": {"tokens": "all", "preserve_scale": 0.1, "subset": SUBSET, "steps": 0},
    }

    def __post_init__(self):
        choose(self, tokens=("last", "all"), expand=tuple(EXPANSIONS))
        check_positive(self, "lam")
        check_positive(self, "erase_scale", "preserve_scale", or_zero=True)

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple["Solver", "Edit"]:
        """UCE, and the one edit that it makes.

        Raises ValueError, in one line, for another subset than `SUBSET` and for concepts that it cannot erase.
        """
        check(tools, concepts)
        kept = preserved(concepts)
        phrases = [[phrase.format(c.text) for phrase in ("{}", *EXPANSIONS[self.expand])] for c in concepts]
        encoded = encode(tools, concepts, [*sum(phrases, []), *kept])
        pairs = []
        for concept, texts in zip(concepts, phrases, strict=True):
            weight = self.erase_scale * concept.strength
            pairs += [(*aligned(encoded[text], encoded[guide(concept)], self.tokens), weight) for text in texts]
        if self.tokens == "all":
            pairs += [(encoded[text].vectors, encoded[text].vectors, self.preserve_scale) for text in ("", *kept)]
        else:
            pairs += [(*aligned(encoded[text], encoded[text], "last"), self.preserve_scale) for text in kept]
        return Solver(), edit(pairs, self.lam)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edit:
    """Which vectors should map to which others. A preserved vector is its own `new`."""

    old: Float[Array, "vectors context"]
    new: Float[Array, "vectors context"]
    weight: Float[Array, " vectors"]
    lam: Float[Array, ""]


@dataclass(frozen=True, eq=False)
class Solver(ClosedForm):
    """UCE as one function of the weights."""

    def solve(self, theta: Params, inputs: Edit) -> Params:
        """The edited kernels."""
        with jax.default_matmul_precision("highest"):
            return apply_change(theta, change(inputs))


def change(edit: Edit) -> Float[Array, "context context"]:
    """E of the module's docstring: row vectors c become c (1 + E) before the unedited weights."""
    root = jnp.sqrt(edit.weight)[:, None]
    return ridge(root * edit.old, root * (edit.new - edit.old), edit.lam)


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
    """A prompt's vectors, and the index of the last token of its words (0, the start token, where it has none)."""

    vectors: Float[Array, "tokens context"]
    last: int


def encode(tools: Tools, concepts: Sequence[Concept], prompts: Sequence[str] = ()) -> Mapping[str, Encoded]:
    """The empty prompt, the concepts, their guides, and other prompts.

    Raises ValueError for a concept whose text has no token: its vector would be that of every prompt's start.
    """
    texts = list(dict.fromkeys(["", *(c.text for c in concepts), *map(guide, concepts), *prompts]))
    vectors = tools.vectors(in_batches(tools.encode, texts, ENCODED_AT_ONCE))
    last = last_tokens(tools.tokens, texts)
    encoded = {text: Encoded(v, int(i)) for text, v, i in zip(texts, vectors, last, strict=True)}
    for concept in concepts:
        if encoded[concept.text].last == 0:
            raise ValueError(f"concept {concept.text!r} has no token that the text encoder knows")
    return encoded


def last_tokens(tokens: Callable[[Sequence[str]], Any], prompts: Sequence[str]) -> Int[np.ndarray, " prompts"]:
    """The index of the last token of each prompt's words: the one before the end token, 0 if there are no words.

    The end token is searched from the end, past the padding. SD 1 pads with the end token itself, SD 2 with "!"; and
    the tokenizer of a small vocabulary puts the end token for characters that it does not know.
    """
    ids = np.asarray(tokens(prompts))
    empty = np.asarray(tokens([""]))[0]
    end, pad = empty[1], empty[-1]
    last = np.max(np.where(ids != pad, np.arange(ids.shape[1]), 0), axis=1)
    return last if pad == end else last - 1


def aligned(
    old: Encoded, new: Encoded, tokens: str
) -> tuple[Float[Array, "vectors context"], Float[Array, "vectors context"]]:
    """Which vector of one prompt is to become which of another (`UCE.tokens`)."""
    length = 1 if tokens == "last" else len(old.vectors) - max(old.last, new.last)
    return old.vectors[old.last : old.last + length], new.vectors[new.last : new.last + length]


def edit(pairs: Sequence[tuple[Array, Array, float]], lam: float) -> Edit:
    """An edit from (old vectors, new vectors, weight), ..."""
    old, new, weights = zip(*pairs, strict=True)
    weight = np.repeat(np.asarray(weights, np.float32), [len(vectors) for vectors in old])
    return Edit(jnp.concatenate(old), jnp.concatenate(new), jnp.asarray(weight), jnp.float32(lam))


def guide(concept: Concept) -> str:
    """What a concept becomes."""
    return concept.replace_with[0] if concept.replace_with else ""


def preserved(concepts: Sequence[Concept]) -> list[str]:
    """The prompts that any of the concepts preserves, each once."""
    return list(dict.fromkeys(text for concept in concepts for text in concept.preserve))


def check(tools: Tools, concepts: Sequence[Concept]) -> None:
    """Raises ValueError, in one line, for a run that no closed form can make."""
    wanted = set(select(SUBSET, tools.denoiser.layouts))
    if other := sorted(wanted.symmetric_difference(tools.subset)):
        raise ValueError(
            f"a closed form edits all keys and values of cross-attention: give subset={SUBSET!r} (yours differs by "
            f"{len(other)} tensors, {other[0]!r} among them)"
        )
    if tools.images is not None:
        raise ValueError("images mean nothing to a closed form: it works on prompts alone")
    if not concepts:
        raise ValueError("no concept to erase")
    for concept in concepts:
        if concept.text in preserved(concepts):
            raise ValueError(f"concept {concept.text!r} is also among the prompts to preserve")
        if len(concept.replace_with) > 1:
            raise ValueError(f"concept {concept.text!r} can become one thing, not {len(concept.replace_with)}")
        if concept.strength < 0:
            raise ValueError(f"strength={concept.strength} must not be negative: it weighs an error")


def check_positive(settings: Any, *fields: str, or_zero: bool = False) -> None:
    """Raises ValueError for a field that is not a positive number."""
    for field in fields:
        value = getattr(settings, field)
        if not (math.isfinite(value) and (value > 0 or or_zero and value == 0)):
            raise ValueError(f"{field}={value} must be {'at least 0' if or_zero else 'positive'}")
