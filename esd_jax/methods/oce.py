"""OCE: orthogonal concept erasure (ICML 2026, arXiv 2605.28902), in closed form.

The values of cross-attention are rotated, not added to: for each weight W [out, context],

    W' = R W,    R = argmax over rotations of tr(R^T A) = U V^T of the SVD A = U S V^T
    A  = -s_e G G^T (1 - G* G*^T) + s_g W C W^T + s_c sum_kept (W c)(W c)^T + lam W W^T

G and G* are orthonormal bases of what W makes of the concepts and of their guides, each vector of length 1; C is the
mean of c c^T over the words of a corpus. If U V^T is a reflection, its last left singular vector changes sign. R acts
on every token's value alike, and can be undone: what is kept rests on the corpus, and a token that is led back to the
concept exists wherever W reads fewer directions than a token vector has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esd_jax.erasing import closed_form, corpora
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import ClosedForm, Tools, choose
from esd_jax.methods.speed import VALUES
from esd_jax.methods.uce import EXPANSIONS
from esd_jax.params import Params


@dataclass(frozen=True)
class OCE:
    """Settings; the defaults are the released code's for objects.

    A concept's `replace_with` is its guide, by default the empty prompt. Vectors are those of last tokens; the empty
    prompt's is the start token's. `preserve` names what is kept, with a `preserve_scale` above 0. `strength` means
    nothing to a basis.

    retain: the corpus of C: see `methods.uce.UCE`.
    expand: also erase the concept in five phrases, as UCE does: "art", "object" or "none".
    erase_scale: how strongly values are turned from the concepts' to the guides', s_e.
    corpus_scale: how hard the corpus is held, s_g.
    preserve_scale: how hard preserved prompts are held, s_c.
    lam: how hard all values are held to what they were.
    """

    retain: str = "general"
    expand: str = "object"
    erase_scale: float = 2000.0
    corpus_scale: float = 10.0
    preserve_scale: float = 0.0
    lam: float = 10.0

    trained: ClassVar = False
    uses: ClassVar = frozenset({"replace_with"})
    needs: ClassVar = frozenset({"attention_names", "cross_attention"})
    ema: ClassVar = None
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "object": {"subset": VALUES, "steps": 0},
        "style": {
            "expand": "none", "erase_scale": 500.0, "preserve_scale": 1.0, "replace_with": "real",
            "subset": VALUES, "steps": 0,
        },
        "faces": {
            "expand": "none", "erase_scale": 800.0, "corpus_scale": 70.0, "preserve_scale": 2.0, "replace_with": "tree",
            "subset": VALUES, "steps": 0,
        },
        "nudity": {
            "expand": "none", "erase_scale": 3000.0, "corpus_scale": 20.0, "subset": VALUES, "steps": 0,
        },
    }  # fmt: skip

    def __post_init__(self):
        choose(self, expand=tuple(EXPANSIONS))
        closed_form.check_positive(self, "erase_scale", "corpus_scale", "preserve_scale", "lam", or_zero=True)

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple["Solver", "Inputs"]:
        """OCE. Raises ValueError, in one line, for a subset other than "values" or the keys and values, for concepts
        that it cannot erase, and for preserved prompts that weigh nothing.
        """
        closed_form.check(tools, concepts, (VALUES, closed_form.SUBSET))
        expanded = EXPANSIONS[self.expand]
        phrases = [text for c in concepts for text, _ in closed_form.prompts(c, phrases=expanded)]
        kept = closed_form.preserved(concepts)
        closed_form.check_weighed(concepts, self.preserve_scale)
        encoded = closed_form.encode(tools, concepts, [*phrases, *kept])
        last = lambda texts: jnp.stack([encoded[text].vectors[encoded[text].last] for text in texts])  # noqa: E731
        old, guides = last(phrases), list(dict.fromkeys(c.anchor for c in concepts))
        width = old.shape[1]
        moment = corpora.word_moment(tools, corpora.retained(self.retain, concepts, tokens=tools.tokens))
        scales = (self.erase_scale, self.corpus_scale, self.preserve_scale, self.lam)
        return Solver(), Inputs(
            old, last(guides), last(kept) if kept else jnp.zeros((0, width)),
            jnp.asarray(moment, jnp.float32), jnp.asarray(scales, jnp.float32),
        )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """Token vectors, a row each, and the corpus' second moment. scales: s_e, s_g, s_c, lam."""

    old: Float[Array, "old context"]
    new: Float[Array, "new context"]
    kept: Float[Array, "kept context"]
    moment: Float[Array, "context context"]
    scales: Float[Array, " 4"]


@dataclass(frozen=True, eq=False)
class Solver(ClosedForm):
    """OCE as one function of the weights, each with a rotation of its own."""

    def solve(self, theta: Params, inputs: Inputs) -> Params:
        """The rotated kernels."""
        with jax.default_matmul_precision("highest"):
            return {name: kernel @ rotation(kernel, inputs).T for name, kernel in theta.items()}


def rotation(kernel: Float[Array, "context out"], inputs: Inputs) -> Float[Array, "out out"]:
    """R of the module's docstring, for W = kernel^T."""
    erase, corpus, keep, hold = inputs.scales
    old, new = basis(inputs.old @ kernel), basis(inputs.new @ kernel)
    kept = inputs.kept @ kernel
    towards = -erase * (old @ (old.T - (old.T @ new) @ new.T))
    towards += corpus * kernel.T @ inputs.moment @ kernel + keep * kept.T @ kept + hold * kernel.T @ kernel
    u, _, vt = jnp.linalg.svd(towards)
    return jnp.where(jnp.linalg.det(u @ vt) < 0, u.at[:, -1].multiply(-1), u) @ vt


def basis(rows: Float[Array, "rows out"]) -> Float[Array, "out columns"]:
    """An orthonormal basis of the rows, each first given length 1; columns of a direction that they lack are zero."""
    unit = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    u, s, _ = jnp.linalg.svd(unit.T, full_matrices=False)
    return u * (s > 1e-4 * s[0])
