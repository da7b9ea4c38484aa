"""A transformer's blocks, one after the other: what is recomputed, and when a block's weights are gathered."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
from flax import nnx

# (a block's weights, its inputs) -> both, for the time in which a network is traced whose weights lie split over
# devices (`sharding.gathering`).
GATHER: ContextVar[Callable[[Any, Any], tuple[Any, Any]] | None] = ContextVar("GATHER", default=None)


def run(block: nnx.Module, *inputs: Any, remat: bool = False, **fixed: Any) -> Any:
    """A block's outputs.

    Where weights are split, they are gathered here and nowhere else: in a backward pass that recomputes, too, so that
    no more than a block's are whole at a time.

    Args:
      remat: recompute it in the backward pass, in place of keeping its activations.
      fixed: inputs that are not recomputed.
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
