"""What is to be erased, as text and as a bank of encoded prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from esd_jax.models.unet import Conditioning


@dataclass(frozen=True)
class Concept:
    """A concept to erase.

    text: what to erase ("Van Gogh", "neon style").
    from_: erase it only there (an attribute: erase "glasses" from "a person with glasses"); None erases everywhere.
    """

    text: str
    from_: str | None = None

    def __post_init__(self):
        if not self.text.strip():
            raise ValueError("the concept is empty: name what is to be erased")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bank:
    """Every prompt that a run needs, encoded once. Row 0 is the empty prompt.

    rows: Conditioning with a leading axis of rows.
    roles: role ("concept", "anchor", "student", "sample") -> the row that each concept uses in it, [concepts].
    """

    rows: Conditioning
    roles: Mapping[str, Int[Array, " concepts"]]

    def take(self, role: str, concept: Int[Array, " batch"]) -> Conditioning:
        """The conditioning that the examples' concepts have in a role ("null": the empty prompt)."""
        index = jnp.zeros_like(concept) if role == "null" else self.roles[role][concept]
        return jax.tree.map(lambda a: a[index], self.rows)

    @property
    def num_concepts(self) -> int:
        return next(iter(self.roles.values())).shape[0]


def make_bank(
    encode: Callable[[Sequence[str]], Conditioning],
    concepts: Sequence[Concept],
    roles: Mapping[str, Callable[[Concept], str]],
) -> Bank:
    """Encodes each distinct prompt once.

    Args:
      encode: prompts -> Conditioning, refusing prompts that are too long.
      concepts: at least one.
      roles: role -> the prompt that a concept has in it ("" is the empty prompt).
    """
    if not concepts:
        raise ValueError("no concept to erase")
    texts: dict[str, int] = {"": 0}
    indices: dict[str, Any] = {
        role: jnp.asarray([texts.setdefault(prompt(c), len(texts)) for c in concepts], jnp.int32)
        for role, prompt in roles.items()
    }
    return Bank(encode(list(texts)), indices)
