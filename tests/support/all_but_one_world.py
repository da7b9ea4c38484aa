"""All but One's concepts, their instructions, and draws by hand."""

from typing import Any

import jax.numpy as jnp
from distilled import noise_of
from esd_world import tools

from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.trajectories import Draws
from esd_jax.methods import all_but_one
from esd_jax.methods.all_but_one import AllButOne

T = 35
LEVELS = list(range(953, 0, -28))  # 953, 925, ..., 29, 1
# Unequal numbers of instructions, and a strength.
CONCEPTS = (Concept("a cat", replace_with=("a dog", "a cow")), Concept("Van Gogh", strength=0.5))
ORDERS = ([("a cat", -7.5), ("a dog", 6.5), ("a cow", 6.5)], [("Van Gogh", -3.75)])
TEXTS = [c.text for c in CONCEPTS]


def make(w: Any, concepts: Any = CONCEPTS, **fields: Any) -> tuple[all_but_one.Method, all_but_one.Inputs]:
    return AllButOne(**fields).make(tools(w), concepts)


def given(index: int, dtype: str, batch: int = 2) -> Draws:
    """Draws by hand: example i erases concept i."""
    noise = noise_of(index, dtype, batch)
    return Draws(jnp.int32(index), jnp.float32(LEVELS[index]), jnp.arange(batch), noise)
