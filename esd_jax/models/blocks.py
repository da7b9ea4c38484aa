"""A transformer's blocks, one after the other: what is recomputed, and when a block's weights are gathered."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
from flax import nnx

# While a network with split weights is traced (`sharding.gathering`): (a block's weights, its inputs) -> the same, the
# weights whole.
GATHER: ContextVar[Callable[[Any, Any], tuple[Any, Any]] | None] = ContextVar("GATHER", default=None)


def run(block: nnx.Module, *inputs: Any, remat: bool = False, **fixed: Any) -> Any:
    """A block's outputs.

    Where weights are split, they are gathered here and nowhere else. A backward pass that recomputes the block gathers
    them again, so that no more than a block's are whole at a time.

    Args:
      remat: recompute it in the backward pass, in place of keeping its activations.
      fixed: inputs that are the same for every block.
    """
    gather = GATHER.get()
    if gather is None:

        def function(*inputs: Any) -> Any:
            return block(*inputs, **fixed)

        return jax.checkpoint(function)(*inputs) if remat else function(*inputs)
    graph, split = nnx.split(block)

    def gathered(split: Any, *inputs: Any) -> Any:
        state, inputs = gather(split, inputs)
        return nnx.merge(graph, state)(*inputs, **fixed)

    return (jax.checkpoint(gathered) if remat else gathered)(split, *inputs)
