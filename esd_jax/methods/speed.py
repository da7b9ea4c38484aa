"""SPEED: *Scalable, Precise, and Efficient Concept Erasure* (Li et al., ICLR 2026, arXiv 2503.07392), in closed form.

For the weight W [out, context] of each value of cross-attention, with C1, C* the token vectors of the concepts and
their guides, K2 those of the empty prompt, and P the projector on what the retained prompts do not use:

    D = argmin |(W + D P) C1 - W C*|^2 + rho |D P|^2    with (D P) K2 = 0
      D P = W (C* C1^T - C1 C1^T) P (1 - M K2 (K2^T P M K2)^-1 K2^T P) M,    M = (C1 C1^T P + rho 1)^-1

where C C^T stands for the mean over concepts. P = U U^T, U the directions in which the retained vectors' second moment
is below `threshold`. They are chosen for each W: a retained vector c counts if the unconstrained change moves it more
than the average one, |D0 c| > mean (influence filter), and so do noised copies of it, with noise along the direction
that W reads least (augmentation).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.cluster.vq import kmeans2

from esd_jax.erasing import closed_form, contexts, corpora
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import ClosedForm, Tools, choose
from esd_jax.params import Params

VALUES = "values"  # the subset


@dataclass(frozen=True)
class SPEED:
    """Settings; the defaults are the released code's.

    A concept's `replace_with` is its guide, by default the empty prompt.

    tokens: which vectors of a prompt are edited, and retained: "last", that of its last token (of the empty prompt, the
      start token's), as published; or "positions", as in `methods.uce.UCE`, which this package adds: all vectors from
      the first token that differs on, and all of the retained prompts.
    contexts: further prompts to erase the concept from, and what each becomes: see `methods.uce.UCE`.
    retain: prompts that are retained: see `methods.uce.UCE`. The concepts' `preserve` is beside them: all together its
      vectors weigh as much as the corpus' in the second moment, and neither filter nor copies concern them.
    rho: how hard the weights are held to the old ones.
    filter: leave out retained vectors that the change would hardly move.
    copies: noised ones of each retained vector; 0 for none.
    threshold: of the second moment, below which a direction is free to change.
    centres: of the empty prompt's other vectors (k-means), which the change must not move, beside the start token.
    """

    tokens: str = "last"
    contexts: str | None = None
    retain: str = "general"
    rho: float = 1.0
    filter: bool = True
    copies: int = 10
    threshold: float = 0.1
    centres: int = 3

    trained: ClassVar = False
    uses: ClassVar = frozenset({"replace_with", "strength"})
    needs: ClassVar = frozenset({"attention_names", "cross_attention"})
    ema: ClassVar = None
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"subset": VALUES, "steps": 0},
        "faces": {"rho": 0.05, "filter": False, "replace_with": "person", "subset": VALUES, "steps": 0},
    }

    def __post_init__(self):
        choose(self, tokens=("last", "positions"))
        contexts.parse(self.contexts)
        closed_form.check_positive(self, "rho", "threshold")
        closed_form.check_positive(self, "copies", "centres", or_zero=True)

    def make(self, tools: Tools, concepts: Sequence[Concept]) -> tuple["Solver", "Inputs"]:
        """SPEED. Raises ValueError, in one line, for another subset than "values" or the keys and values, for
        concepts that it cannot erase, and for more centres than the empty prompt has other vectors.
        """
        closed_form.check(tools, concepts, (VALUES, closed_form.SUBSET))
        if self.centres > (most := np.asarray(tools.tokens([""])).shape[1] - 1):
            raise ValueError(f"centres={self.centres} is more than the empty prompt's {most} vectors behind the first")
        sentences = contexts.parse(self.contexts)
        erased = [(pair, concept.strength) for concept in concepts for pair in closed_form.prompts(concept, sentences)]
        kept = list(corpora.retained(self.retain, concepts, tokens=tools.tokens))
        named = closed_form.preserved(concepts)
        encoded = closed_form.encode(tools, concepts, [*(text for pair, _ in erased for text in pair), *kept, *named])
        edit = closed_form.edit(
            [(*closed_form.aligned(encoded[a], encoded[b], self.tokens), s / len(erased)) for (a, b), s in erased], 1.0
        )

        of_kept = self._rows([encoded[text] for text in kept])
        of_named = self._rows([encoded[text] for text in named]) if named else None
        start, *others = np.asarray(encoded[""].vectors, np.float64)
        still = [start]
        if self.centres:
            spread = np.linspace(0, len(others) - 1, self.centres).round().astype(int)  # the first and the last, ...
            still += [*kmeans2(np.stack(others), np.stack(others)[spread], minit="matrix")[0]]
        return Solver(self.filter, self.copies), Inputs(
            edit.old, edit.new, edit.weight, of_kept, of_named, jnp.asarray(np.stack(still), jnp.float32),
            jnp.float32(self.rho), jnp.float32(self.threshold), jax.random.key(0),
        )  # fmt: skip

    def _rows(self, prompts: Sequence[closed_form.Encoded]) -> Float[Array, "rows context"]:
        """Those of their vectors that are retained."""
        last = self.tokens == "last"
        return jnp.concatenate([one.vectors[one.last][None] if last else one.vectors for one in prompts])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """old, new: C1 and C*, a row each, of weights that sum to 1 at strength 1 with one row for each prompt.

    kept: vectors of the corpus. named: of preserved prompts, if there are any. still: K2. key: of the noise on copies.
    """

    old: Float[Array, "vectors context"]
    new: Float[Array, "vectors context"]
    weight: Float[Array, " vectors"]
    kept: Float[Array, "kept context"]
    named: Float[Array, "named context"] | None
    still: Float[Array, "still context"]
    rho: Float[Array, ""]
    threshold: Float[Array, ""]
    key: Array


@dataclass(frozen=True, eq=False)
class Solver(ClosedForm):
    """SPEED as one function of the weights, each with a projector of its own."""

    filter: bool
    copies: int

    def solve(self, theta: Params, inputs: Inputs) -> Params:
        """The edited kernels."""
        with jax.default_matmul_precision("highest"):
            return {name: kernel + self.change(kernel, inputs) for name, kernel in theta.items()}

    def change(self, kernel: Float[Array, "context out"], inputs: Inputs) -> Float[Array, "context out"]:
        """(D P)^T of the module's docstring."""
        root = jnp.sqrt(inputs.weight)[:, None]
        old, apart = root * inputs.old, root * (inputs.new - inputs.old)
        first = closed_form.ridge(old, apart, jnp.float32(1)) @ kernel  # D0, with penalty 1
        moved, importance = inputs.kept @ first, jnp.ones(len(inputs.kept))
        if self.filter:
            importance = _above_mean(jnp.linalg.norm(moved, axis=1), importance)
        if self.copies:
            moment = self.augmented(kernel, first, moved, importance, inputs)
        else:
            moment = _moment(inputs.kept, importance)
        if inputs.named is not None:
            moment += _moment(inputs.named, jnp.ones(len(inputs.named)))
        free = _free(moment, inputs.threshold)
        # In coordinates of the free directions P is 1: a ridge with a linear constraint.
        x, still = old @ free, inputs.still @ free
        inverse = lambda b: jnp.linalg.solve(x.T @ x + inputs.rho * jnp.eye(x.shape[1]), b)  # noqa: E731
        plain, held = inverse(x.T @ apart), inverse(still.T)
        multipliers = jnp.linalg.lstsq(still @ held, still @ plain)[0]
        return free @ (plain - held @ multipliers) @ kernel

    def augmented(
        self, kernel: Array, first: Array, moved: Float[Array, "kept out"], importance: Array, inputs: Inputs
    ) -> Float[Array, "context context"]:
        """The second moment of the retained vectors, and of those noised copies c + n u of them that count.

        It is summed without the copies themselves, which of a large corpus are several gigabytes.
        """
        direction = jnp.linalg.svd(kernel, full_matrices=False)[0][:, -1]  # u
        noise = jax.random.normal(inputs.key, (self.copies, len(moved)))
        further = direction @ first
        squares = jnp.sum(moved**2, axis=1) + 2 * noise * (moved @ further) + noise**2 * jnp.sum(further**2)
        counts = _above_mean(jnp.sqrt(jnp.maximum(squares, 0)), jnp.broadcast_to(importance, noise.shape))
        each = importance + jnp.sum(counts, axis=0)
        total = jnp.maximum(jnp.sum(each), 1)
        crossed = jnp.outer((jnp.sum(counts * noise, axis=0) / total) @ inputs.kept, direction)
        alone = jnp.sum(counts * noise**2) / total * jnp.outer(direction, direction)
        return _moment(inputs.kept, each) + crossed + crossed.T + alone


def _above_mean(norms: Float[Array, "*rows"], counts: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """1 for rows, of those that count, that are longer than the average of these; else 0. Of equal ones all count."""
    longer = counts * (norms > jnp.sum(norms * counts) / jnp.maximum(jnp.sum(counts), 1))
    return jnp.where(jnp.any(longer > 0), longer, counts)


def _moment(rows: Float[Array, "rows context"], counts: Float[Array, " rows"]) -> Float[Array, "context context"]:
    """The mean of c c^T over the rows that count."""
    root = jnp.sqrt(counts / jnp.maximum(jnp.sum(counts), 1))[:, None] * rows
    return root.T @ root


def _free(moment: Float[Array, "context context"], threshold: Array) -> Float[Array, "context context"]:
    """U of the module's docstring, its other columns zero: all shapes are known when this is compiled."""
    values, directions = jnp.linalg.eigh(moment)
    return directions * (values < threshold)
