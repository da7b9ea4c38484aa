"""Floating-point operations of a program, counted in its jaxpr: matrix products, convolutions and fused attention.

A multiplication and an addition are two operations. What is elementwise is not counted, as is usual for utilisation.
XLA's own count is not available on GPUs and TPUs before a program is compiled, and misses cuDNN's kernels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Of each argument or result its value, or None where it is not known; None for all where nothing is to be followed.
Values = Sequence[Any] | None
# Numbers in an array that decides nothing, such as noise, and so is not computed.
LARGE = 4096


def count(program: ClosedJaxpr | Jaxpr, values: Values = None) -> Any:
    """FLOP of one pass through a program: the body of a `scan` counts in each of its rounds.

    Args:
      values: of the arguments, None for each unknown one. Where they decide how often the body of a `while` runs, or
        which branch is taken, that is what counts; else the body once, and the costliest branch. With values the
        count can be traced: `jax.jit` drops whatever does not decide.
    """
    return _followed(program, values)[0]


def mean(program: ClosedJaxpr | Jaxpr, values_of: Callable[[Any], Sequence[Any]], numbers: int) -> float:
    """The mean of `count(program, values_of(i))` over i in 0 .. numbers - 1."""
    counts = jax.jit(jax.vmap(lambda i: jnp.float32(count(program, values_of(i)))))(jnp.arange(numbers))
    return float(np.mean(np.asarray(counts, np.float64)))


def _followed(program: ClosedJaxpr | Jaxpr, values: Values) -> tuple[Any, list[Any]]:
    """(FLOP, the results' values)."""
    jaxpr = getattr(program, "jaxpr", program)
    if values is None:
        return sum((_of(eqn, None)[0] for eqn in jaxpr.eqns), 0.0), [None] * len(jaxpr.outvars)
    consts = getattr(program, "consts", None) or [None] * len(jaxpr.constvars)
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
    value_of = lambda atom: atom.val if isinstance(atom, Literal) else known.get(atom)  # noqa: E731
    flops = 0.0
    for eqn in jaxpr.eqns:
        cost, results = _of(eqn, [value_of(atom) for atom in eqn.invars])
        flops += cost
        known.update(zip(eqn.outvars, results, strict=True))
    return flops, [value_of(atom) for atom in jaxpr.outvars]


def _of(eqn: Any, values: Values) -> tuple[Any, list[Any]]:
    """(FLOP of an equation, its results' values)."""
    params, unknown = eqn.params, [None] * len(eqn.outvars)
    match eqn.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            return 2.0 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted), unknown
        case "conv_general_dilated":
            return _convolution(eqn), unknown
        case "dot_product_attention_fwd_wrapper" | "dot_product_attention_bwd_wrapper" as name:
            (batch, queries, heads, size), tokens = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
            # Two products forwards; five backwards, one of which makes the maps again.
            return (4.0 if "fwd" in name else 10.0) * batch * heads * queries * tokens * size, unknown
        case "while":
            return _while(params, _arrays(eqn, values))
        case "scan":
            return _scan(params, _arrays(eqn, values))
        case "cond":
            index, operands = (None, None) if values is None else (values[0], values[1:])
            costs = [count(branch, operands) for branch in params["branches"]]
            if operands is None:
                return max(costs), unknown
            return jnp.max(jnp.stack(costs)) if index is None else jnp.stack(costs)[index], unknown
        case "sharding_constraint" | "optimization_barrier":
            return 0.0, unknown if values is None else list(values)
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := params.get(key)) is not None:
            if _shapes(getattr(inner, "jaxpr", inner)) == _shapes(eqn):
                return _followed(inner, values)
            return count(inner), unknown  # no mere call
    large = any(v.aval.size > LARGE for v in eqn.outvars)
    if values is None or large or any(value is None for value in values):
        return 0.0, unknown
    results = eqn.primitive.bind(*_arrays(eqn, values), **params)
    return 0.0, list(results) if eqn.primitive.multiple_results else [results]


def _shapes(program: Any) -> list[tuple[int, ...]]:
    """Of what a program, or an equation, takes and gives."""
    return [v.aval.shape for v in (*program.invars, *program.outvars)]


def _arrays(eqn: Any, values: Values) -> Any:
    """Values as an equation takes them: numbers in the program are Python's or NumPy's."""
    if values is None:
        return None
    return [
        value if value is None or isinstance(value, jax.Array) else jnp.asarray(value, atom.aval.dtype)
        for value, atom in zip(values, eqn.invars, strict=True)
    ]


def _while(params: dict[str, Any], values: Values) -> tuple[Any, list[Any]]:
    test, body, first = params["cond_jaxpr"], params["body_jaxpr"], params["cond_nconsts"]
    last = first + params["body_nconsts"]
    carried = len(body.jaxpr.outvars)
    if values is None:
        return count(test) + count(body), [None] * carried
    consts = values[first:last]
    carry = _carried(lambda carry: _followed(body, [*consts, *carry])[1], values[last:])
    again = lambda carry: _followed(test, [*values[:first], *carry])[1][0]  # noqa: E731
    if again(carry) is None:
        return count(test) + count(body, [*consts, *carry]), [None] * carried
    where, some = _known(carry)

    def turn(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        cost, results = _followed(body, [*consts, *_spread(state[1], where, carried)])
        return state[0] + cost, [results[i] for i in where]

    flops, some = jax.lax.while_loop(
        lambda state: again(_spread(state[1], where, carried)), turn, (jnp.float32(0), some)
    )  # fmt: skip
    return flops, _spread(some, where, carried)


def _scan(params: dict[str, Any], values: Values) -> tuple[Any, list[Any]]:
    body, first, carried = params["jaxpr"], params["num_consts"], params["num_carry"]
    results = len(body.jaxpr.outvars)
    if values is None:
        return params["length"] * count(body), [None] * results
    consts, inputs = values[:first], values[first + carried :]
    each = [None if x is None else x[0] for x in inputs]
    carry = _carried(
        lambda carry: _followed(body, [*consts, *carry, *each])[1][:carried], values[first : first + carried]
    )  # fmt: skip
    (where, some), (which, rows) = _known(carry), _known(inputs)

    def turn(state: list[Any], now: list[Any]) -> tuple[list[Any], Any]:
        arguments = [*consts, *_spread(state, where, carried), *_spread(now, which, len(inputs))]
        cost, results = _followed(body, arguments)
        return [results[i] for i in where], jnp.float32(cost)

    some, costs = jax.lax.scan(turn, some, rows, params["length"], params["reverse"])
    return jnp.sum(costs), _spread(some, where, results)


def _carried(body: Callable[[Sequence[Any]], Sequence[Any]], carry: Sequence[Any]) -> Sequence[Any]:
    """What a loop carries, without the values that are not known after a round."""
    while True:
        kept = [old if new is not None else None for old, new in zip(carry, body(carry), strict=True)]
        if all((a is None) == (b is None) for a, b in zip(kept, carry, strict=True)):
            return kept
        carry = kept


def _known(values: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """(where values are known, these)."""
    where = [i for i, value in enumerate(values) if value is not None]
    return where, [values[i] for i in where]


def _spread(some: Sequence[Any], where: Sequence[int], length: int) -> list[Any]:
    """What `_known` took apart; its inverse."""
    at = dict(zip(where, some, strict=True))
    return [at.get(i) for i in range(length)]


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
    return 2.0 * result[batch] * result[channels] * pairs * kernel[numbers.rhs_spec[1]]


def _pairs(size: int, taps: int, results: int, stride: int, padding: tuple[int, int], gaps: int, dilation: int) -> int:
    """Along one axis, how many pairs of a result and a tap of the kernel meet a number of the image."""
    place = stride * np.arange(results)[:, None] + dilation * np.arange(taps) - padding[0]
    return int(((place >= 0) & (place <= (size - 1) * gaps) & (place % gaps == 0)).sum())
