"""UCE: *Unified Concept Editing in Diffusion Models* (Gandikota et al., WACV 2024), in closed form.

For the weight W0 [out, context] of each key and value of cross-attention, token vectors c_i to erase with weights s_i,
their guides c*_i, and vectors c_j to preserve with weight s_p:

    W = argmin  sum_i s_i |W c_i - W0 c*_i|^2 + s_p sum_j |W c_j - W0 c_j|^2 + lam |W - W0|_F^2        (Eq. 7)

`erasing.closed_form` solves it. Flow transformers have no cross-attention: there the two layers that read the prompt
alone are edited, `context_embedder` (all tokens) and the first of `text_embedder` (the pooled prompt); their biases
stay. All layers behind them see the image, too, and have no closed form.

Beyond the paper, a concept can be erased in contexts, each led to the same prompt with the guide in its place, and a
corpus of prompts can be retained: what is not shown to a closed form is not retained.

The preset "double_projection" is *Double Projection* (CVPR 2026, arXiv 2604.10032): with S the vectors of several safe
prompts, and U2 a basis of what is orthogonal to what is retained (or to its strongest directions),

    c* = S (S^T S)^+ S^T c,    W = W0 + W0 (C* - C) X^T (X X^T + lam 1)^-1 U2^T,    X = U2^T C

The paper's edit is that of one vector, with lam 0; this one, of many, follows from the same argument.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from esd_jax.erasing import closed_form, contexts, corpora
from esd_jax.erasing.closed_form import (
    READ,
    SUBSET,
    Edit,
    Space,
    apply_change,
    change,
    check,
    check_positive,
    edit,
    over_spaces,
    preserved,
    spaces,
)
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import ClosedForm, Tools, choose
from esd_jax.params import Params

EXPANSIONS = {
    "none": (),
    "art": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}


@dataclass(frozen=True)
class UCE:
    """Settings; the defaults are those of the authors' code of 2025 (the `object` preset).

    A concept's `replace_with` is its guide, by default the empty prompt; `strength` multiplies its erase_scale.

    tokens: which vectors of a prompt are edited.
      "last": the last token of its words; of the empty prompt, the start token. Code of 2025.
      "all": that token and all after it, padding too, paired with the guide's from its own last token on; all vectors
        of preserved prompts, to which the empty prompt is added. Code of 2023.
      "positions": from the first token in which prompt and guide differ, each position with the guide's; all vectors of
        preserved prompts, as in "all". The edited model reads the prompt as the base reads the guide.
    expand: "art" or "object" also erases the concept in five phrases ("painting by Van Gogh"); "none".
    contexts: "{} in ink style: {} in ink style | a dog in {}: a dog": further prompts to erase the concept from, with
      {} for the concept, and what each becomes, with {} for its guide.
    retain: prompts on which the weights are held, with all their vectors: "emoji", the captions of the embedded model,
      as often as in its training; "general", names of common things in a few sentences; or a .txt or .csv file. Prompts
      that hold a concept's rarest word are left out. With it, erase_scale and preserve_scale weigh means over prompts,
      not sums, and preserved prompts, all together, as much as the corpus.
    directions: how many directions of what is retained, the strongest first, the edit does not touch at all.
    project: a concept's guide is, in place of one prompt, its own vector projected on those of all its `replace_with`
      (c*), and the edit also leaves all directions of what is preserved alone: these prompts stay exactly as they are.
    lam: how hard the weights are held to the old ones.
    erase_scale: the weight of each vector that is erased, s_i.
    preserve_scale: the weight of each vector that is preserved, s_p.
    """

    tokens: str = "last"
    expand: str = "none"
    contexts: str | None = None
    retain: str | None = None
    directions: int = 0
    project: bool = False
    lam: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float = 1.0

    trained: ClassVar = False
    uses: ClassVar = frozenset({"replace_with", "strength"})
    needs: ClassVar = frozenset({"prompt_layers"})
    ema: ClassVar = None
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "object": {"subset": SUBSET, "steps": 0},
        "art": {"replace_with": "art", "subset": SUBSET, "steps": 0},
        "2023": {"tokens": "all", "preserve_scale": 0.1, "subset": SUBSET, "steps": 0},
        "flow": {"subset": READ, "steps": 0},
        "list": {"tokens": "positions", "retain": "general", "lam": 0.01, "subset": SUBSET, "steps": 0},
        "double_projection": {
            "project": True, "retain": "general", "directions": 256, "preserve_scale": 0.0, "lam": 0.01,
            "subset": SUBSET, "steps": 0,
        },
    }  # fmt: skip

    def __post_init__(self):
        choose(self, tokens=("last", "all", "positions"), expand=tuple(EXPANSIONS))
        check_positive(self, "lam")
        check_positive(self, "erase_scale", "preserve_scale", "directions", or_zero=True)
        contexts.parse(self.contexts)
        if self.directions and not self.retain and not self.project:
            raise ValueError(f"directions={self.directions} are of what is retained: give retain, too")
        if self.project and self.tokens == "all":
            raise ValueError("project=True pairs vectors one by one: tokens='last' or 'positions'")

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple[ClosedForm, Any]:
        """UCE, and the one edit that it makes; of layers that read different vectors, one of each.

        Raises ValueError, in one line, for another subset than `SUBSET` (`READ` on flow transformers) and for concepts
        that it cannot erase.
        """
        check(tools, concepts, several=self.project)
        if not (self.project or self.directions):  # which hold them without a weight
            closed_form.check_weighed(concepts, self.preserve_scale)
        if alone := [concept.text for concept in concepts if self.project and not concept.replace_with]:
            raise ValueError(f"project=True needs replace_with, what {alone[0]!r} is projected on: 'a dog | a fox'")
        kept = ["", *preserved(concepts)] if self.tokens != "last" else preserved(concepts)
        sentences = contexts.parse(self.contexts)
        erased: list[tuple[str, tuple[str, ...], float]] = []
        for concept in concepts:
            each = [replace(concept, replace_with=(guide,)) for guide in concept.replace_with] or [concept]
            pairs = zip(*(closed_form.prompts(one, sentences, EXPANSIONS[self.expand]) for one in each), strict=True)
            erased += [(some[0][0], tuple(new for _, new in some), concept.strength) for some in pairs]
        edited = spaces(tools, concepts, [*(text for old, guides, _ in erased for text in (old, *guides)), *kept])
        return over_spaces(edited, lambda space: (Solver(), self._edit(tools, concepts, space, erased, kept)))

    def _edit(
        self,
        tools: Tools,
        concepts: Sequence[Concept],
        space: Space,
        erased: Sequence[tuple[str, tuple[str, ...], float]],
        kept: Sequence[str],
    ) -> Edit:
        """erased: (old, guides, strength), ...; kept: prompts."""
        erase_scale, preserve_scale = self.erase_scale, self.preserve_scale
        if self.retain:
            erase_scale /= len(erased)
        pairs = [
            (*both, erase_scale * strength)
            for old, guides, strength in erased
            for both in self._pairs(space, old, guides)
        ]
        if not self.retain:
            held = self._held(space, kept)
            free = orthogonal(held) if self.project and held else None
            return edit([*pairs, *((own, own, preserve_scale) for own in held)], self.lam, free)
        moment = of_both(tools, self.retain, concepts, kept, space)
        rows = corpora.root(moment)
        free = corpora.free_directions(moment, self.directions) if self.directions else None
        if self.project and (held := self._held(space, list(filter(None, kept)))):
            strongest = np.linalg.eigh(moment)[1][:, len(moment) - self.directions :].T
            free = orthogonal([*held, strongest])
        return edit([*pairs, (rows, rows, preserve_scale)], self.lam, free)

    def _held(self, space: Space, kept: Sequence[str]) -> list[Array]:
        """The vectors of prompts that are preserved."""
        if self.tokens == "last":
            return [own for text in kept for own, _ in space.aligned(text, text, "last")]
        return [own for text in kept for own in space.whole(text)]

    def _pairs(self, space: Space, old: str, guides: Sequence[str]) -> list[tuple[Array, Array]]:
        """What becomes of a prompt's vectors, of each part of the space."""
        each = [space.aligned(old, guide, self.tokens) for guide in guides]
        return list(map(projected, zip(*each, strict=True))) if self.project else each[0]


def of_both(
    tools: Tools, retain: str, concepts: Sequence[Concept], kept: Sequence[str], space: Space
) -> Float[np.ndarray, "width width"]:
    """The second moment of a corpus, and of preserved prompts, which all together count as much as it."""
    named, empty = [text for text in kept if text], [text for text in kept if not text]
    moment = corpora.moment(tools, corpora.retained(retain, concepts, empty, tools.tokens), space.vectors)
    return moment + corpora.moment(tools, dict.fromkeys(named, 1.0), space.vectors) if named else moment


def projected(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Vectors, and their projections on those of several guides at the same places, in float64.

    pairs: (the prompt's vectors, a guide's), each from the first token on in which the two differ: before it, both have
      the same vectors.
    """
    old = np.asarray(max((old for old, _ in pairs), key=len), np.float64)
    safe = [np.concatenate([old[: len(old) - len(new)], np.asarray(new, np.float64)]) for _, new in pairs]
    places = zip(old, np.stack(safe, axis=1), strict=True)
    new = np.stack([np.linalg.lstsq(rows.T, own)[0] @ rows for own, rows in places])
    return jnp.asarray(old, jnp.float32), jnp.asarray(new, jnp.float32)


def orthogonal(held: Sequence[Any]) -> Float[Array, "width free"]:
    """An orthonormal basis of what is orthogonal to some vectors. Raises ValueError if nothing is."""
    rows = np.concatenate([np.asarray(own, np.float64) for own in held])
    if (rank := int(np.linalg.matrix_rank(rows))) == rows.shape[1]:
        raise ValueError(f"what project=True holds exactly leaves none of {rank} directions: preserve less")
    return corpora.free_directions(rows.T @ rows, rank)


@dataclass(frozen=True, eq=False)
class Solver(ClosedForm):
    """UCE as one function of the weights."""

    def solve(self, theta: Params, inputs: Edit) -> Params:
        """The edited kernels."""
        with jax.default_matmul_precision("highest"):
            return apply_change(theta, change(inputs))
