"""How far a conditioning is from a concept, by predictions alone: 0 is the concept, 1 the prompt without it.

    g = E || e'(x_t, t, c) - e(x_t, t, c(p)) ||^2 / E || e(x_t, t, c(n)) - e(x_t, t, c(p)) ||^2

e is the base, e' the network that is asked, p a prompt that names the concept, and n the same prompt without it. It can
exceed 1. `erasing.inversion` measures inversion rounds by it, `evaluation.attacks.gauge` attacks.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def error(
    predicted: Float[Array, "batch height width channel"],
    concept: Float[Array, "batch height width channel"],
    axis: Sequence[int] | None = None,
) -> Float[Array, "..."]:
    """Mean squared difference to what the base predicts for the concept, over all axes or some."""
    return jnp.mean((predicted - concept) ** 2, axis=axis)


def relative(asked: Float[Array, "..."], neutral: Float[Array, "..."]) -> Float[Array, "..."]:
    """g, from both mean errors, or from both sums over equally many."""
    return asked / neutral
