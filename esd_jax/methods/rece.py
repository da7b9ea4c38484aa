"""RECE: *Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models* (Gong et al., ECCV 2024).

UCE over all tokens, then epochs of it on what the edited weights still take for the concept: for every token vector c,

    c' = argmin  sum_l |W_l c' - W0_l c|^2 + r |c'|^2 = [sum_l W_l^T W_l + r 1]^-1 [sum_l W_l^T W0_l] c,

over all keys and values l, W0 the base's; then c' becomes the guide's vector of the same position by UCE's edit, which
starts from the epoch's W. Every W_l is W0_l (1 + E)^T with one E (`erasing.closed_form`), so that sum_l W0_l^T W0_l is
all that is needed of the weights. On flow transformers the layers are those of UCE, each with an E of its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from esd_jax.erasing import closed_form
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import ClosedForm, Tools
from esd_jax.methods.uce import UCE
from esd_jax.params import Params


@dataclass(frozen=True)
class RECE:
    """Settings; the defaults are the released code's.

    A concept's `replace_with` is its guide, by default the empty prompt; `strength` multiplies its erase_scale. The
    empty prompt is preserved, too. The first edit has the same weights as the others, where the released code starts
    from a checkpoint that UCE made, with its own.

    epochs: how often what still works is erased; 0 is UCE alone.
    r: how short c' is held.
    lam: how hard the weights are held to the old ones.
    erase_scale: the weight of each vector that is erased, s_i.
    preserve_scale: the weight of each vector that is preserved, s_p.
    """

    epochs: int = 3
    r: float = 0.1
    lam: float = 0.1
    erase_scale: float = 1.0
    preserve_scale: float = 0.1

    trained: ClassVar = False
    uses: ClassVar = frozenset({"replace_with", "strength"})
    needs: ClassVar = frozenset({"prompt_layers"})
    ema: ClassVar = None
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"subset": closed_form.SUBSET, "steps": 0},
        "flow": {"subset": closed_form.READ, "steps": 0},
    }

    def __post_init__(self):
        closed_form.check_positive(self, "r", "lam")
        closed_form.check_positive(self, "epochs", "erase_scale", "preserve_scale", or_zero=True)

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple[ClosedForm, Any]:
        """RECE. Raises ValueError as `UCE.make` does."""
        once = UCE(tokens="all", lam=self.lam, erase_scale=self.erase_scale, preserve_scale=self.preserve_scale)
        _, edits = once.make(tools, concepts)
        kept = ["", *closed_form.preserved(concepts)]
        edited = closed_form.spaces(tools, concepts, kept)
        first = iter(edits if isinstance(edits, tuple) else [edits])
        return closed_form.over_spaces(edited, lambda space: self._of_space(space, concepts, kept, next(first)))

    def _of_space(
        self, space: closed_form.Space, concepts: Sequence[Concept], kept: Sequence[str], first: closed_form.Edit
    ) -> tuple["Solver", "Inputs"]:
        prompts = [(c.text, c.anchor, self.erase_scale * c.strength) for c in concepts]
        prompts += [(text, text, self.preserve_scale) for text in kept]
        again = closed_form.edit(
            [(*both, s) for a, b, s in prompts for both in zip(space.whole(a), space.whole(b), strict=True)], self.lam
        )
        erased = jnp.arange(len(again.weight)) < len(concepts) * sum(map(len, space.whole("")))
        return Solver(self.epochs), Inputs(first, again, erased, jnp.float32(self.r))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """first: UCE's edit. again: each epoch's, of whole prompts. erased: which of its vectors are not preserved."""

    first: closed_form.Edit
    again: closed_form.Edit
    erased: Bool[Array, " vectors"]
    r: Float[Array, ""]


@dataclass(frozen=True, eq=False)
class Solver(ClosedForm):
    """RECE as one function of the weights."""

    epochs: int

    def solve(self, theta: Params, inputs: Inputs) -> Params:
        """The edited kernels."""
        with jax.default_matmul_precision("highest"):
            root = square_root(jnp.asarray(sum(kernel @ kernel.T for kernel in theta.values())))
            again = inputs.again
            total = closed_form.change(inputs.first)
            for _ in range(self.epochs):
                old = jnp.where(inputs.erased[:, None], attack(root, total, again.old, inputs.r), again.old)
                step = closed_form.change(dataclasses.replace(again, old=old))
                total = total + step + step @ total  # (1 + step) (1 + total) - 1
            return closed_form.apply_change(theta, total)


def attack(
    root: Float[Array, "context context"],
    change: Float[Array, "context context"],
    vectors: Float[Array, "vectors context"],
    r: Float[Array, ""],
) -> Float[Array, "vectors context"]:
    """c' of the module's docstring: what the changed weights answer as the unchanged ones answer the vectors.

    root: of the unchanged weights' sum_l W0_l^T W0_l.
    """
    return closed_form.ridge(root + root @ change.T, root @ vectors.T, r).T


def square_root(a: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """A matrix x with x^T x = a, of a symmetric a without negative eigenvalues (but for rounding)."""
    values, vectors = jnp.linalg.eigh(a)
    return jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
