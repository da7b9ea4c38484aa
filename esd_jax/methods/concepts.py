"""What is to be erased, as text and as a bank of encoded prompts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from esd_jax.models.unet import Conditioning


@dataclass(frozen=True)
class Concept:
    """A concept to erase. Each method uses some of the fields beside `text` (`Settings.uses`) and refuses the others.

    text: what to erase ("Van Gogh", "neon style").
    from_: erase it only there (an attribute: erase "glasses" from "a person with glasses"); None erases everywhere.
    replace_with: what takes its place ("painting"; "bikini", "pants").
    preserve: prompts on which the erased model is held to the base.
    strength: multiplies the method's own strength.
    """

    text: str
    from_: str | None = None
    replace_with: tuple[str, ...] = ()
    preserve: tuple[str, ...] = ()
    strength: float = 1.0

    def __post_init__(self):
        if not self.text.strip():
            raise ValueError("the concept is empty: name what is to be erased")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength={self.strength} must be finite")


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
    concepts: Sequence[Concept],
    roles: Mapping[str, Callable[[Concept], str | Sequence[str]]],
) -> Bank:
    """Encodes each distinct prompt once.

    Args:
      encode: prompts -> Conditioning, refusing prompts that are too long.
      concepts: at least one.
      roles: role -> the prompt that a concept has in it ("" is the empty prompt), or all of them.
    """
    if not concepts:
        raise ValueError("no concept to erase")
    texts: dict[str, int] = {"": 0}
    indices: dict[str, Array] = {}
    for role, prompts in roles.items():
        asked = [prompts(concept) for concept in concepts]
        lists = [[given] if isinstance(given, str) else list(given) for given in asked]
        most = max(1, *map(len, lists))
        rows = [[texts.setdefault(text, len(texts)) for text in given] + [0] * (most - len(given)) for given in lists]
        index = jnp.asarray(rows, jnp.int32)
        indices[role] = index[:, 0] if isinstance(asked[0], str) else index
    return Bank(encode(list(texts)), indices)
