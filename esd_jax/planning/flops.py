"""Floating-point operations of a program, counted in its jaxpr: matrix products, convolutions and fused attention.

A multiplication and an addition are two operations. What is elementwise is not counted, as is usual where utilisation
is told. XLA's own count is not available on GPUs and TPUs before a program is compiled, and misses cuDNN's kernels.
"""

import math
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


def count(program: ClosedJaxpr | Jaxpr) -> float:
    """FLOP of one pass through a program: the body of a `while` counts once, that of a `scan` in each of its rounds,
    and of branches the dearest."""
    return sum(_of(eqn) for eqn in getattr(program, "jaxpr", program).eqns)


def _of(eqn: Any) -> float:
    params, name = eqn.params, eqn.primitive.name
    match name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        case "conv_general_dilated":
            return _convolution(eqn)
        case "dot_product_attention_fwd_wrapper" | "dot_product_attention_bwd_wrapper":
            (batch, queries, heads, size), tokens = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
            # Two products forwards; five backwards, one of which makes the maps again.
            return (4 if "fwd" in name else 10) * batch * heads * queries * tokens * size
        case "while":
            return count(params["cond_jaxpr"]) + count(params["body_jaxpr"])
        case "scan":
            return params["length"] * count(params["jaxpr"])
        case "cond":
            return max(count(branch) for branch in params["branches"])
    return sum(count(params[key]) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)


def _convolution(eqn: Any) -> float:
    """Without products with padding, or with the gaps that a gradient has where its convolution had a stride."""
    image, kernel = (v.aval.shape for v in eqn.invars)
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    batch, channels, *spatial = numbers.out_spec
    result = eqn.outvars[0].aval.shape
    pairs = math.prod(
        _pairs(image[i], kernel[k], result[o], *settings)
        for i, k, o, *settings in zip(
            numbers.lhs_spec[2:], numbers.rhs_spec[2:], spatial,
            params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True,
        )
    )  # fmt: skip
    return 2 * result[batch] * result[channels] * pairs * kernel[numbers.rhs_spec[1]]


def _pairs(size: int, taps: int, results: int, stride: int, padding: tuple[int, int], gaps: int, dilation: int) -> int:
    """Along one axis, how many pairs of a result and a tap of the kernel meet a number of the image."""
    place = stride * np.arange(results)[:, None] + dilation * np.arange(taps) - padding[0]
    return int(((place >= 0) & (place <= (size - 1) * gaps) & (place % gaps == 0)).sum())
